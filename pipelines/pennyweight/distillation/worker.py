"""One of several processes that train together, as `accelerate launch -m pennyweight.distillation.worker SPEC`.

SPEC is a `Work` as JSON. The course ends in `<workspace>/course.json`; progress goes to stdout, a JSON list a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pennyweight.distillation.train import COURSE, Lessons, Measure, Report, Work, train
from pennyweight.errors import StageError

#: Before a line of progress, so that it is told from what libraries print.
MARK = "pennyweight-progress "
SPEC = "work.json"


def train_in_processes(work: Work, report: Report, measure: Measure = lambda step, values: None) -> Lessons:
    """`train`, by as many processes of this machine as the settings say. Raises StageError where one of them fails."""
    workspace = Path(work.workspace)
    (workspace / SPEC).write_text(json.dumps(work.dump()))
    (workspace / COURSE).unlink(missing_ok=True)
    count = work.settings.processes
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count),
        "-m", "pennyweight.distillation.worker", str(workspace / SPEC),
    ]  # fmt: skip
    threads = str(max((os.cpu_count() or 1) // count, 1))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    last: deque[str] = deque(maxlen=20)
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
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
    if process.returncode or not (workspace / COURSE).exists():
        print(*last, sep="\n")
        reason = next((line for line in reversed(last) if "Error" in line), f"exit code {process.returncode}")
        raise StageError(f"distill: one of {count} processes failed: {reason.strip()}", "the run's log has more")
    return Lessons.load(json.loads((workspace / COURSE).read_text()))


def main() -> None:
    work = Work.load(json.loads(Path(sys.argv[1]).read_text()))
    first = os.environ.get("RANK", "0") == "0"

    def say(*said: Any) -> None:
        if first:
            print(MARK + json.dumps(said), flush=True)

    course = train(work, partial(say, "report"), partial(say, "measure"))
    if first:
        (Path(work.workspace) / COURSE).write_text(json.dumps(asdict(course)))


if __name__ == "__main__":
    main()
