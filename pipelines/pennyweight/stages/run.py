"""What all stages of one run share: the store, the plan, the clock, and who is to blame for an error."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from pennyweight.errors import PennyweightError, StoreError
from pennyweight.memory import PeakMemory, release_memory, reused_memory
from pennyweight.plan import Plan
from pennyweight.progress import Progress
from pennyweight.recipe import Recipe
from pennyweight.records import StageTime
from pennyweight.store import Entry, Store


@dataclass
class Stage:
    """One stage at work: what it is told to remember of itself."""

    reused: bool = False
    library_seconds: float = 0.0

    @contextmanager
    def library(self) -> Iterator[None]:
        """Time in here is other people's code: training, exporting, scoring, logging."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.library_seconds += time.perf_counter() - begin


@dataclass
class Run:
    """What all stages of one run share."""

    recipe: Recipe
    store: Store
    progress: Progress
    plan: Plan
    device: str
    times: list[StageTime] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, subject: str) -> Iterator[Stage]:
        expected = self.plan.expected_seconds(name, subject) or 0.0
        self.progress.start(name, subject, expected)
        stage, begin, error = Stage(), time.perf_counter(), None
        used = PeakMemory()
        # What a benchmark measures is to be what a server would give.
        memory = nullcontext() if name == "benchmark" else reused_memory()
        try:
            with memory, used:
                yield stage
        except PennyweightError as failure:
            error = failure.message
            raise
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
            raise
        finally:
            seconds = time.perf_counter() - begin
            if not stage.reused:
                release_memory()
            self.times.append(
                StageTime(
                    stage=name,
                    subject=subject,
                    seconds=seconds,
                    library_seconds=stage.library_seconds,
                    reused=stage.reused,
                    peak_memory_bytes=used.peak_bytes,
                    error=error,
                )
            )
            self.progress.end(name, subject, seconds, expected, stage.reused, error)

    @contextmanager
    def forgiving(self, name: str, errors: dict[str, str]) -> Iterator[None]:
        """What goes wrong in here is `name`'s error and nobody else's; a full disk is everybody's."""
        try:
            yield
        except StoreError:
            raise
        except PennyweightError as error:
            errors[name] = str(error)
        except Exception as error:
            traceback.print_exc()  # to the run's log
            errors[name] = f"{type(error).__name__}: {error}"


def placed(kind: Any, entry: Entry) -> Any:
    """A record read back from the store, its path where the store has its files now."""
    return kind.model_validate({**entry.record, "path": str(entry.files)})
