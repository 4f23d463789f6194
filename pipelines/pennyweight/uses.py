"""Who uses the store's results: each process while it lives, each run for as long as its folder is there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

FOLDER = "uses"
LOCK = "lock"

#: How a result's folder reads in a run's record.
_RESULT = re.compile(r"(\w+)/([0-9a-f]{64})\b")


class Uses:
    """What one process uses of a store, line by line in a file that stays when the process ends.

    While it lives the process holds a lock on its file, which the system releases however the process ends. So no
    process number is trusted, and containers that share a store see each other, as do hosts where the file system
    passes locks on.
    """

    def __init__(self, root: Path) -> None:
        self._folder = root / FOLDER
        self._stream: IO[str] | None = None
        self.path: Path | None = None

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Nothing is collected in here: what is found is there until its use is noted."""
        with _locked(self._folder / LOCK, fcntl.LOCK_SH):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody finds or finishes a result in here."""
        with _locked(self._folder / LOCK, fcntl.LOCK_EX):
            yield

    def begin(self) -> None:
        """Say that this process is at work. What it leaves half-built is not collected while it lives."""
        if self._stream is None:
            with self.steady():
                self._open()

    def note(self, stage: str, key: str) -> None:
        """Say that this process uses a result. For a caller inside `steady`."""
        if self._stream is None:
            self._open()
        self._write({"used": f"{stage}/{key}"})

    def belong_to(self, run_dir: Path) -> None:
        """What this process uses is used by the run in `run_dir` too, for as long as that folder is there."""
        self.begin()
        self._write({"run": str(run_dir.resolve())})

    def _open(self) -> None:
        """Where nothing can be written, nothing can be collected either."""
        path = self._folder / f"{uuid.uuid4().hex}.jsonl"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("x")
        except OSError:
            return
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path = path
        self._write({"pid": os.getpid()})

    def _write(self, line: dict[str, str | int]) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):  # a full disk; its age protects what was used just now
                self._stream.write(json.dumps(line) + "\n")
                self._stream.flush()


@dataclass
class Reached:
    """What is in use, and by whom. `results` are `<stage>/<key>`."""

    results: set[str] = field(default_factory=set)
    pids: set[int] = field(default_factory=set)
    """Of processes at work, as they know themselves."""
    forgotten: list[Path] = field(default_factory=list)
    """Files of processes that ended, and of runs that are gone."""


def reached(root: Path, runs: Iterable[Path], own: Path | None = None) -> Reached:
    """What processes at work and runs use of the store at `root`. For a caller inside `Uses.alone`.

    A run uses what it used while it ran and what its record names. `runs` are folders of runs that the store need not
    know of: those made elsewhere, moved, or made before it kept account. `own` is the caller's file, which counts for
    nothing.
    """
    found = Reached()
    for path in sorted((root / FOLDER).glob("*.jsonl")):
        if path == own:
            continue
        lines = _read(path)
        run_dirs = [Path(line["run"]) for line in lines if "run" in line]
        there = [run_dir for run_dir in run_dirs if run_dir.is_dir()]
        at_work = _held(path)
        if not (at_work or there):
            found.forgotten.append(path)
            continue
        found.results |= {line["used"] for line in lines if "used" in line}
        if at_work:
            found.pids |= {line["pid"] for line in lines if "pid" in line}
        for run_dir in there:
            found.results |= _named(run_dir / "run.json")
    for folder in runs:
        for path in sorted(folder.glob("*/run.json")):
            found.results |= _named(path)
    return found


def _named(record: Path) -> set[str]:
    """The results whose folders a run's record names."""
    try:
        return {"/".join(match) for match in _RESULT.findall(record.read_text())}
    except OSError:
        return set()


def _read(path: Path) -> list[dict[str, str | int]]:
    """A file's lines, but those that a killed process or a full disk left half-written."""
    lines = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def _held(path: Path) -> bool:
    """Whether a living process holds its lock on the file."""
    with path.open() as stream:
        return not take_lock(stream)


def take_lock(stream: IO[str]) -> bool:
    """Take a file's lock, which the system releases however the process ends. False: another process has it. Not every
    file system has locks; then it counts as taken."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    """A lock on a file, where one can be had: a store that cannot be written needs none."""
    stream = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a")
        fcntl.flock(stream, how)
    except OSError:
        pass
    try:
        yield
    finally:
        if stream is not None:
            stream.close()
