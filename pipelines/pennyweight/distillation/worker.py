"""One of several processes that train together: `python -m pennyweight.distillation.worker SPEC [--with-parent]`.

SPEC is a `Work` as JSON. The course ends in `<workspace>/course.json`; progress goes to stdout, a JSON list a line.
With `--with-parent` it ends as soon as the process does that holds the other end of its stdin.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pennyweight.distillation.train import COURSE, Lessons, Measure, Report, Work, train
from pennyweight.errors import StageError
from pennyweight.memory import reused_memory

#: Before a line of progress, so that it is told from what libraries print.
MARK = "pennyweight-progress "
SPEC = "work.json"
_ERROR = re.compile(r"(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception)\b.*)")
#: Of errors, those that say that another process has failed.
_ECHO = re.compile(r"ChildFailedError|Connection (?:reset|closed)|gloo|NCCL|SignalException")
_MEMORY = re.compile(r"OutOfMemoryError|not enough memory|can't allocate memory")
_SIGNAL = re.compile(r"failed \(exitcode: -(\d+)\) local_rank: (\d+)")


def train_in_processes(work: Work, report: Report, measure: Measure = lambda step, values: None) -> Lessons:
    """`train`, by as many processes of this machine as the settings say. Raises StageError where one of them fails."""
    spec, count = write_spec(work), work.settings.processes
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count),
        "-m", "pennyweight.distillation.worker", str(spec), "--with-parent",
    ]  # fmt: skip
    threads = str(max((os.cpu_count() or 1) // count, 1))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, text=True, **streams) as process:
        return hear(process, work, report, measure)


def write_spec(work: Work) -> Path:
    """The file that workers are started with."""
    workspace = Path(work.workspace)
    (workspace / SPEC).write_text(json.dumps(work.dump()))
    (workspace / COURSE).unlink(missing_ok=True)
    return workspace / SPEC


def hear(
    process: subprocess.Popen[str],
    work: Work,
    report: Report,
    measure: Measure,
    failures: Callable[[], list[str]] = list,
) -> Lessons:
    """What comes of a worker, or of a launcher of workers, that says so on its stdout.

    Raises StageError where it fails, and MemoryError where that is why. `failures` are those of other processes'
    workers, asked for where it gives no reason itself.
    """
    last: deque[str] = deque(maxlen=200)
    assert process.stdout
    try:
        for line in process.stdout:
            if line.startswith(MARK):
                heard, *said = json.loads(line.removeprefix(MARK))
                (measure if heard == "measure" else report)(*said)
            else:
                last.append(line.rstrip())
    except BaseException:
        process.terminate()
        raise
    course = Path(work.workspace) / COURSE
    if process.wait() or not course.exists():
        print(*last, sep="\n")
        killed = process.returncode < 0 and process.returncode != -signal.SIGTERM  # and not by us
        reason = [*(reasons(last) or ([] if killed else failures())), f"exit code {process.returncode}"][0]
        if _MEMORY.search(reason):
            raise MemoryError(reason)
        hint = "the run's log has more; run the same command again, and it goes on from the last saved state"
        raise StageError(f"distill: one of the processes that train failed: {reason}", hint)
    return Lessons.load(json.loads(course.read_text()))


def reasons(lines: Iterable[str]) -> list[str]:
    """Why workers failed, as far as it can be read in what they and torchrun printed."""
    found = [match[1] for line in lines if (match := _ERROR.match(line))]
    killed = [f"process {match[2]} was ended by signal {match[1]}" for line in lines if (match := _SIGNAL.search(line))]
    return [line for line in found if not _ECHO.search(line)] + killed


def _end_with_parent() -> None:
    """Its end of the pipe is closed however it ends. What would go on without it would be in the next run's way."""
    os.read(sys.stdin.fileno(), 1)  # sys.stdin itself would be locked as the interpreter ends
    os._exit(1)


def main() -> None:
    if "--with-parent" in sys.argv:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    work = Work.load(json.loads(Path(sys.argv[1]).read_text()))
    first = os.environ.get("RANK", "0") == "0"

    def say(*said: Any) -> None:
        if first:
            print(MARK + json.dumps(said), flush=True)

    with reused_memory():
        course = train(work, partial(say, "report"), partial(say, "measure"))
    if first:
        (Path(work.workspace) / COURSE).write_text(json.dumps(asdict(course)))


if __name__ == "__main__":
    main()
