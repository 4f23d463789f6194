"""The config of a student that is drawn from its teacher. Pure: no weights, no libraries."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.recipe import Distill


def student_config(config: dict[str, Any], step: Distill) -> dict[str, Any]:
    """`config` after the step: as it was, or with the student's layers. Raises ValueError where it has too few."""
    if step.student is None:
        return config
    student = copy.deepcopy(config)
    text = student.get("text_config") or student
    total = text.get("num_hidden_layers")
    if not isinstance(total, int):
        raise ValueError("this model's config has no num_hidden_layers, so no layers can be drawn from it")
    chosen = copied_layers(total, step.student.layers)
    for key, value in text.items():
        if isinstance(value, list) and len(value) == total:  # layer_types and the like: one value a layer
            text[key] = [value[index] for index in chosen]
    if isinstance(text.get("max_window_layers"), int):
        text["max_window_layers"] = sum(index < text["max_window_layers"] for index in chosen)
    text["num_hidden_layers"] = len(chosen)
    return student


def copied_layers(total: int, wanted: int) -> list[int]:
    """Layers of the teacher that the student begins with: evenly spread, the first and the last among them.

    Raises ValueError where the teacher has not more than `wanted`.
    """
    if wanted >= total:
        raise ValueError(f"a student of {wanted} layers drawn from {total} would be no smaller")
    return [round(index * (total - 1) / (wanted - 1)) for index in range(wanted)]
