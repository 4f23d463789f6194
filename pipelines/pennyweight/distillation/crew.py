"""A recipe under `torchrun` or `accelerate launch`: the first process runs it, the others train with it.

Launchers start one command many times, on one machine or on several. The first of these processes runs the recipe as if
it were alone. When a step trains, a worker starts beside each of them, and the workers share the batches. Orders go
through the launcher's key-value store; files lie in our store and at the base, which all machines must see.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight import machine
from pennyweight.errors import StageError, UsageError
from pennyweight.recipe import Distill, Recipe

if TYPE_CHECKING:
    from pennyweight.distillation.train import Lessons, Measure, Report, Work

_LAUNCHERS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|(TORCHELASTIC|ACCELERATE|FSDP)_\w+"
)
_PASSED_ON = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
#: Seconds until a file of another machine is seen at last, until all processes have answered, and until a worker has
#: ended after the first one's did.
SEEN, ANSWERED, ENDED = 60.0, 120.0, 30.0
#: Seconds in which a process says why its worker failed, after another one's has noticed.
SAID = 5.0
_PAUSE = 0.2

_leading: Crew | None = None


def leading() -> Crew | None:
    """The processes that wait for this one's trainings."""
    return _leading


def join() -> Crew | None:
    """The processes that this one was launched with; None where it is alone.

    The launcher's variables leave the environment: libraries would take all of a run for a part of something larger.
    Raises StageError where the others cannot be reached.
    """
    launcher = {name: os.environ.pop(name) for name in list(os.environ) if _LAUNCHERS.fullmatch(name)}
    world = int(launcher.get("WORLD_SIZE", 1))
    if world == 1 or "RANK" not in launcher:
        return None
    if os.environ.get("OMP_NUM_THREADS") == "1":
        del os.environ["OMP_NUM_THREADS"]  # torchrun's default; all but the trainings would run on one core
    from torch.distributed import rendezvous

    os.environ |= launcher
    try:
        store, rank, _ = next(rendezvous("env://", timeout=timedelta(minutes=10)))
    except (RuntimeError, ValueError) as error:
        raise StageError(f"the processes launched with this one cannot be reached: {error}") from None
    finally:
        for name in launcher:
            del os.environ[name]
    return Crew(rank, world, store, {name: launcher[name] for name in _PASSED_ON if name in launcher})


@dataclass
class Crew:
    rank: int
    world: int
    _store: Any
    _launcher: dict[str, str]
    _trainings: Any = field(default_factory=itertools.count)

    # --- the first ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Crew:
        global _leading
        _leading = self
        return self

    def __exit__(self, *error: object) -> None:
        global _leading
        _leading = None
        with contextlib.suppress(RuntimeError):  # they may have gone before
            self._store.set(f"training-{next(self._trainings)}", "null")
            for rank in range(1, self.world):  # the key-value store may be this process's
                self._await(f"left-{rank}", 10.0)

    def check(self, recipe: Recipe) -> None:
        """Raise UsageError where a step's batch cannot be shared."""
        for variant, steps in recipe.variants.items():
            for index, step in enumerate(steps):
                if isinstance(step, Distill) and not step.on_policy and step.batch % self.world:
                    raise UsageError(
                        f"variants.{variant}.{index}.distill.batch: {self.world} processes were launched, and they "
                        f"cannot share a batch of {step.batch} windows evenly",
                        "launch another number, or change `batch`, and `accumulate` with it",
                    )

    def train(self, work: Work, report: Report, measure: Measure) -> Lessons:
        """`train`, by a worker beside each process. Raises StageError where one of them fails."""
        from pennyweight.distillation.worker import hear, write_spec

        name = f"training-{next(self._trainings)}"
        paths = [str(write_spec(work)), *work.paths()]
        order = {"paths": paths, "port": _free_port()}
        self._store.set(name, json.dumps(order))
        faults = [self._await(f"{name}/ready-{rank}", ANSWERED) for rank in range(1, self.world)]
        self._store.set(f"{name}/begins", json.dumps(not any(faults)))
        if found := next(filter(None, faults), None):
            hint = "all machines must see the store (PENNYWEIGHT_HOME) and the base in the same places"
            raise StageError(f"distill: {found}", hint)
        try:
            with self._worker(order, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as worker:
                threading.Thread(target=self._watch, args=(name, worker), daemon=True).start()
                return hear(worker, work, report, measure, partial(self._failures, name))
        finally:
            self._store.set(f"{name}/ended", "")

    def _watch(self, name: str, worker: subprocess.Popen[str]) -> None:
        """End the worker once another one has failed, which it may not notice for long."""
        while worker.poll() is None:
            if self._store.check([f"{name}/failed"]):
                worker.terminate()
                return
            time.sleep(_PAUSE)

    def _failures(self, name: str) -> list[str]:
        """Why another process's worker failed, where one did."""
        failed = f"{name}/failed"
        self._await(failed, SAID)
        return [self._store.get(failed).decode()] if self._store.check([failed]) else []

    # --- the others ---------------------------------------------------------------------------------------------------

    def follow(self, say: Callable[[str], None]) -> int:
        """Train with the first process whenever it trains, until it has ended. Returns the exit code.

        Raises StageError where it is gone without a word.
        """
        try:
            return self._follow(say)
        except RuntimeError as error:
            raise StageError(f"the process that runs the recipe is gone: {error}") from None

    def _follow(self, say: Callable[[str], None]) -> int:
        if self._launcher.get("LOCAL_RANK") == "0":
            say(f"{socket.gethostname()} trains with {self._launcher['MASTER_ADDR']}, which runs the recipe")
        for number in itertools.count():
            name = f"training-{number}"
            order = json.loads(self._await(name))
            if order is None:
                self._store.set(f"left-{self.rank}", "")
                return 0
            self._store.set(f"{name}/ready-{self.rank}", _unseen(order["paths"]))
            if json.loads(self._await(f"{name}/begins")):
                self._work(name, order, say)
        raise AssertionError

    def _work(self, name: str, order: dict[str, Any], say: Callable[[str], None]) -> None:
        from pennyweight.distillation.worker import reasons

        with tempfile.TemporaryFile("w+") as log:
            with self._worker(order, stdout=log, stderr=subprocess.STDOUT) as worker:
                while worker.poll() is None and not self._store.check([f"{name}/ended"]):
                    time.sleep(_PAUSE)
                try:
                    worker.wait(ENDED)
                except subprocess.TimeoutExpired:
                    worker.kill()
            if worker.returncode:
                log.seek(0)
                printed = log.read()
                say(printed)
                where = f"process {self.rank} of {self.world}, on {socket.gethostname()}"
                why = [*reasons(printed.splitlines()), f"exit code {worker.returncode}"][0]
                self._store.set(f"{name}/failed", f"{where}: {why}")

    # --- both ---------------------------------------------------------------------------------------------------------

    def _worker(self, order: dict[str, Any], **options: Any) -> subprocess.Popen[str]:
        """This process's share of a training. It does not outlive this process."""
        threads = machine.threads() // int(self._launcher.get("LOCAL_WORLD_SIZE", 1))
        environment = {"OMP_NUM_THREADS": str(max(threads, 1)), **os.environ, **self._launcher}
        environment["MASTER_PORT"] = str(order["port"])
        command = [sys.executable, "-m", "pennyweight.distillation.worker", order["paths"][0], "--with-parent"]
        return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, **options)

    def _await(self, key: str, seconds: float | None = None) -> str:
        """The value of a key once it is there; that nobody wrote it, where it is not there in time."""
        end = None if seconds is None else time.monotonic() + seconds
        while not self._store.check([key]):
            if end is not None and time.monotonic() > end:
                return f"no answer in {seconds:.0f} s ({key})"
            time.sleep(_PAUSE)
        return self._store.get(key).decode()


def _unseen(paths: list[str]) -> str:
    """The first of these that this machine does not see, as a sentence; empty where it sees all."""
    end = time.monotonic() + SEEN
    for path in paths:
        while not Path(path).exists():
            if time.monotonic() > end:
                return f"{socket.gethostname()} sees no {path}"
            time.sleep(_PAUSE)
    return ""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]
