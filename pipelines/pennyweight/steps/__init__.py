"""Steps: checkpoint → checkpoint. One file a step; `STEPS` names them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight import recipe as schema
from pennyweight.records import Checkpoint
from pennyweight.steps import quantize


@dataclass(frozen=True)
class StepContext:
    """What a step may use besides its checkpoint and its own settings."""

    device: str
    seed: int
    calibration: Any | None = None
    """Token ids, int64 of shape (samples, length), where the step's settings name calibration text."""


@dataclass(frozen=True)
class StepKind:
    version: int
    """Raised whenever the same settings would give other weights."""
    libraries: tuple[str, ...]
    run: Callable[[Checkpoint, Any, StepContext, Path], None]
    """(checkpoint, settings, context, folder to write the new checkpoint to)"""


STEPS: dict[str, StepKind] = {
    "quantize": StepKind(
        version=1,
        libraries=("llmcompressor", "compressed-tensors", "transformers", "torch"),
        run=quantize.run,
    ),
}
assert set(STEPS) == set(schema.STEPS)
