"""Curves of a training while it goes on: an MLflow run of its own, beside the recipe's runs.

A server that fails costs the curves there and nothing else: the run's record has them too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from pennyweight.errors import TrackingError
from pennyweight.tracking import naming
from pennyweight.tracking.connection import session
from pennyweight.tracking.runs import log_values, open_experiment, start_run

Measure = Callable[[int, Mapping[str, float]], None]
TRAINING = "pennyweight.training"


@contextmanager
def training_curves(recipe: str, training: str) -> Iterator[Measure]:
    """A function of (step, values by name) that logs them to a run called `training`, which begins with its first
    call and ends with the block."""
    curves = _Curves(recipe, training)
    try:
        yield curves.log
    except BaseException:
        curves.end("FAILED")
        raise
    curves.end("FINISHED")


class _Curves:
    def __init__(self, recipe: str, training: str):
        self._recipe, self._training = recipe, training
        self._run: str | None = None
        self._failed = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._failed:
            return
        try:
            with session(f"the curves of {self._training} are not logged") as client:
                now = int(1000 * time.time())
                if self._run is None:
                    experiment = open_experiment(client, self._recipe)
                    self._run = start_run(
                        client, experiment, self._training, now, {TRAINING: self._training}
                    ).info.run_id
                measures = [naming.Measure(name, value, step) for name, value in values.items()]
                log_values(client, self._run, now, {}, measures)
        except TrackingError as error:
            print(error.message, file=sys.stderr)
            self._failed = True

    def end(self, status: str) -> None:
        if self._run is None or self._failed:
            return
        try:
            with session(f"the curves of {self._training} have no end") as client:
                client.set_terminated(self._run, status)
        except TrackingError as error:
            print(error.message, file=sys.stderr)
