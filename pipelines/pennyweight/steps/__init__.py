"""Steps: checkpoint → checkpoint. One file a step; `STEPS` names them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight import installed
from pennyweight import recipe as schema
from pennyweight.records import Checkpoint, Distillation, Healing, Pruning, Rounding
from pennyweight.steps import distill, prune, quantize, recover
from pennyweight.store import Store


@dataclass(frozen=True)
class StepContext:
    """What a step may use besides its checkpoint and its own settings."""

    device: str
    seed: int
    calibration: Any | None = None
    """Token ids, int64 of shape (samples, length), where the step's settings name text."""
    base: Checkpoint | None = None
    """What the variant was made from: the recipe's base, or the one that its `from` step names."""
    report: Callable[[str, float], None] = lambda detail, done: None
    """Told how it goes, and which part is done."""
    say: Callable[[str], None] = lambda line: None
    """Told what a person should know now."""
    teacher: Checkpoint | None = None
    """The recipe's base, whatever the variant was made from."""
    rounded: Checkpoint | None = None
    """What the variant's `quantize` step was given; None before that step."""
    measure: Callable[[int, Mapping[str, float]], None] = lambda step, values: None
    """Told the points of a training's curves: (step, values by name)."""
    store: Store | None = None
    """Where a step may keep what other steps can use."""
    key: str = ""
    """Of what the step makes, in the store; names the workspace that it goes on from."""
    answers: Any | None = None
    """Which tokens of `calibration` are an answer's, bool (samples, length); None where the text is plain."""


@dataclass(frozen=True)
class StepKind:
    version: int
    """Raised whenever the same settings would give other weights."""
    libraries: tuple[str, ...]
    run: Callable[[Checkpoint, Any, StepContext, Path], Pruning | Distillation | Rounding | Healing]
    """(checkpoint, settings, context, folder to write the new checkpoint to)"""
    record: str
    """Where in the checkpoint's record its report goes."""
    needs_base: bool = False
    needs_teacher: bool = False
    needs_rounded: bool = False


STEPS: dict[str, StepKind] = {
    "prune": StepKind(version=1, libraries=("transformers", "torch"), run=prune.run, record="pruning"),
    "quantize": StepKind(
        version=2,
        libraries=("compressed-tensors", "transformers", "torch"),
        run=quantize.run,
        record="rounding",
    ),
    "recover": StepKind(
        version=2,
        libraries=("compressed-tensors", "transformers", "torch"),
        run=recover.run,
        record="healing",
        needs_base=True,
        needs_rounded=True,
    ),
    "distill": StepKind(
        version=3,
        libraries=distill.LIBRARIES,
        run=distill.run,
        record="distillation",
        needs_teacher=True,
    ),
}
assert set(STEPS) == set(schema.STEPS) - {"from"}, "`from` says where a variant starts, and makes nothing"


def libraries(step: schema.Step) -> tuple[str, ...]:
    """Distributions whose versions change what a step makes."""
    has_maker = isinstance(step, schema.Quantize | schema.Distill)
    backend = installed.BACKEND_PACKAGES.get(step.maker, ()) if has_maker else ()
    return (*STEPS[step.kind].libraries, *backend[:1])
