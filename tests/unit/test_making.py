"""What a step is given besides its checkpoint, and what of it is part of its key in the store."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_plan import recipe

from pennyweight import checkpoints, stages, steps
from pennyweight.progress import Progress
from pennyweight.recipe import From, Quantize, Recover
from pennyweight.records import Checkpoint, Healing, Rounding
from pennyweight.stages.making import Bases
from pennyweight.stages.texts import Texts
from pennyweight.steps import StepContext
from pennyweight.store import Store

QUANTIZE, RECOVER = Quantize(scheme="w8a16", group_size=32), Recover(text="wiki")
ROUNDING = Rounding(backend="x", method="rtn", layers={}, reload_difference=0.0, seconds=0.0)
HEALING = Healing(
    steps=1, tokens=1, ended_by="steps", trained=1, moved=0, kl_before=1.0, kl_after=0.5, curve=[],
    tokens_per_second=1.0, seconds=0.0,
)  # fmt: skip


class Made:
    """Variants made by steps that copy a checkpoint and add a file, and what each step was told."""

    def __init__(self, folder: Path, model: Path, small: Path, monkeypatch: pytest.MonkeyPatch):
        self.contexts: list[tuple[str, StepContext]] = []
        self.inputs: list[dict[str, Any]] = []
        self.bases = Bases({"base": checkpoints.describe(model, "b"), "small": checkpoints.describe(small, "s")}, {})
        self._store = Store(folder)
        for kind, report in (("quantize", ROUNDING), ("recover", HEALING)):
            monkeypatch.setitem(steps.STEPS, kind, replace(steps.STEPS[kind], run=self._runs(kind, report)))
        asked = self._store.get_or_build
        monkeypatch.setattr(self._store, "get_or_build", lambda s, i, b: self.inputs.append(i) or asked(s, i, b))

    def _runs(self, kind: str, report: Any) -> Any:
        def run(checkpoint: Checkpoint, step: Any, context: StepContext, files: Path) -> Any:
            self.contexts.append((kind, context))
            shutil.copytree(checkpoint.path, files, dirs_exist_ok=True)
            (files / f"{kind}-{len(self.contexts)}").write_text("")
            return report

        return run

    def make(self, *given: Any) -> Checkpoint:
        made = recipe().model_copy(update={"variants": {"a": list(given)}})
        plan: Any = SimpleNamespace(expected_seconds=lambda stage, subject: None)
        run = stages.Run(made, self._store, Progress(io.StringIO()), plan, "cpu")
        return stages.make_variant(run, "a", list(given), self.bases, Texts({}, {}))


@pytest.fixture
def made(tmp_path: Path, tiny_model: Path, tiny_small: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    return Made(tmp_path, tiny_model, tiny_small, monkeypatch)


def test_recover_of_the_base_itself_is_keyed_as_ever(made: Made) -> None:
    made.make(QUANTIZE, RECOVER)
    base = made.bases.found["base"]
    (_, rounding), (_, healing) = made.contexts
    assert (rounding.base, rounding.rounded) == (base, None)
    assert (healing.base, healing.rounded, healing.teacher) == (base, base, base)
    always = {"version", "checkpoint", "step", "calibration", "seed", "device", "libraries", "isa", "threads"}
    assert [inputs.keys() for inputs in made.inputs] == [always, always | {"base"}]


def test_recover_is_given_what_was_quantized_where_that_is_not_the_base(made: Made) -> None:
    """A step that changes floating-point weights stands before quantize; here the first quantize plays it."""
    made.make(QUANTIZE, QUANTIZE, RECOVER)
    (_, first), (_, second), (_, healing) = made.contexts
    assert (first.rounded, second.rounded) == (None, made.bases.found["base"])
    assert healing.rounded.digest == made.inputs[1]["checkpoint"] == made.inputs[2]["rounded"]
    assert healing.rounded.digest != healing.base.digest == made.inputs[2]["base"]


def test_a_variant_of_another_base_starts_there(made: Made) -> None:
    small = made.bases.found["small"]
    assert made.make(From(base="small")) == small
    assert (made.contexts, made.inputs) == ([], [])
    done = made.make(From(base="small"), QUANTIZE, RECOVER)
    assert done.origin == f"s → {QUANTIZE.describe()} → {RECOVER.describe()}"
    healing = made.contexts[-1][1]
    assert (healing.base, healing.rounded, healing.teacher) == (small, small, made.bases.found["base"])
    assert made.inputs[-1]["base"] == small.digest
    assert "rounded" not in made.inputs[-1]
