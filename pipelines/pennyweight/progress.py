"""What a person sees while a run works: stages on stderr, everything that libraries print in the run's log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent
from typing import IO, Any


class Progress:
    """Lines, or on a terminal a bar with the time left, on the stderr that the process started with."""

    def __init__(self, stream: IO[str] | None = None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty() and not os.environ.get("NO_COLOR")
        self._expected_total = 0.0
        self._done_expected = 0.0
        self._bar: Any = None
        self._task: Any = None
        self._last_line = 0.0

    def begin(self, headline: str, expected_seconds: float) -> None:
        self._expected_total = expected_seconds
        self.say(headline)
        if self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
            )
            self._bar = Bar(*columns, console=Console(file=self._stream), transient=True)
            self._task = self._bar.add_task("starting", total=max(expected_seconds, 1.0), left="")
            self._bar.start()

    def say(self, line: str) -> None:
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._stream, flush=True)

    def start(self, stage: str, subject: str, expected: float) -> None:
        self._update(f"{stage} {subject}", 0.0, expected)

    def fraction(self, stage: str, detail: str, fraction: float, expected: float) -> None:
        """Part of a stage is done. On a terminal the bar moves; elsewhere there is a line every half minute."""
        self._update(f"{stage} {detail}", fraction, expected)
        if not self._bar and time.monotonic() - self._last_line > 30:
            self.say(f"    {stage}: {fraction:.0%}, {detail}")
            self._last_line = time.monotonic()

    def end(self, stage: str, subject: str, seconds: float, expected: float, reused: bool, error: str | None) -> None:
        self._done_expected += expected
        took = "reused" if reused else duration(seconds)
        mark = "failed" if error else took
        self.say(f"  {stage:<10} {subject:<28} {mark}" + (f"\n{indent(error, '      ')}" if error else ""))
        self._last_line = time.monotonic()

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _update(self, what: str, fraction: float, expected: float) -> None:
        if self._bar:
            position = self._done_expected + fraction * expected
            left = max(self._expected_total - position, 0.0)
            self._bar.update(self._task, description=what, completed=position, left=f"about {duration(left)} left")


def duration(seconds: float) -> str:
    """`8 s`, `4 min 05 s`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


@contextmanager
def output_to(log: Path) -> Iterator[IO[str]]:
    """Send what this process and its children print to `log`; yields the stderr that was.

    The descriptors themselves are turned, since compiled libraries and subprocesses do not ask Python.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept_out, kept_err = os.dup(1), os.dup(2)
    screen = os.fdopen(os.dup(kept_err), "w")
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        try:
            yield screen
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(kept_out, 1)
            os.dup2(kept_err, 2)
            os.close(kept_out)
            os.close(kept_err)
            screen.close()
