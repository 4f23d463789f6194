"""Shapes of a recipe's bases, and of what each variant's steps make of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pennyweight.distillation.config import student_config
from pennyweight.plan.sizes import ModelShape, model_shape
from pennyweight.pruning import blocks
from pennyweight.pruning.config import pruned_config
from pennyweight.recipe import Recipe, Step
from pennyweight.store import digest_of


def config_after(config: dict[str, Any], step: Step) -> dict[str, Any]:
    """The config.json that a step leaves of a model with `config`, weights taken as unquantized.

    Raises ValueError, in a user's words, where the step cannot be applied to such a model.
    """
    match step.kind:
        case "distill":
            return student_config(config, step)
        case "prune":
            blocks.check(config, step)
            return pruned_config(config, step)
        case "from" | "quantize" | "recover":
            return config


@dataclass(frozen=True)
class Start:
    """A base as far as it is known before its download."""

    config: dict[str, Any]
    dtype: str
    """What its checkpoint is stored in."""


@dataclass
class Shapes:
    """Shapes of all checkpoints of a recipe, without quantization."""

    recipe: Recipe
    _starts: dict[str, Start] = field(default_factory=dict)
    _made: dict[str, ModelShape] = field(default_factory=dict)

    def add(self, name: str, start: Start) -> None:
        """Let a base be known; `base` is the recipe's own. Raises what `model_shape` raises."""
        self._shape(start.config, start.dtype)
        self._starts[name] = start

    def of_base(self, name: str) -> ModelShape | None:
        """Shape of a base; None where it is not known yet."""
        start = self._starts.get(name)
        return self._shape(start.config, start.dtype) if start else None

    def of(self, variant: str, done: int | None = None) -> ModelShape | None:
        """Shape after a variant's first `done` steps, all by default; `base` is the base itself.

        None where the base is not known yet, or where a step cannot be applied (see `faults`).
        """
        try:
            return self._of(variant, done)
        except ValueError:
            return None

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key path, message) of the first step of each variant that cannot be applied to what is before it."""
        for variant, steps in self.recipe.variants.items():
            for index, step in enumerate(steps):
                try:
                    self._of(variant, index + 1)
                except ValueError as error:
                    yield f"variants.{variant}.{index}.{step.kind}", str(error)
                    break

    def _of(self, variant: str, done: int | None) -> ModelShape | None:
        start = self._starts.get(self.recipe.start_of(variant))
        if start is None:
            return None
        config = start.config
        for step in self.recipe.variants.get(variant, [])[:done]:
            config = config_after(config, step)
        return self._shape(config, start.dtype)

    def _shape(self, config: dict[str, Any], dtype: str) -> ModelShape:
        key = digest_of([config, dtype])
        if key not in self._made:
            self._made[key] = model_shape(config, dtype)
        return self._made[key]
