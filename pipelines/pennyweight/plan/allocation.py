"""Bytes of checkpoints whose layers have bits of their own, and the least and the most that a budget can buy."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from pennyweight.plan.sizes import ITEMSIZE, ModelShape, dense_bytes, is_ignored, layer_bytes
from pennyweight.recipe import Quantize, scheme_bits

#: (bits, group size) of a layer; None leaves it as it is.
Widths = tuple[int, int] | None


def layer_shapes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """All layers that a step may quantize: name → (out, in)."""
    return {**shape.linears, shape.embedding_name: shape.head, shape.head_name: shape.head}


def layer_choices(shape: ModelShape, step: Quantize) -> dict[str, list[Widths]]:
    """Layers that scheme auto quantizes: name → what they may get. One choice where the recipe has made it."""
    found = {
        name: _choices(step, columns)
        for name, (_, columns) in shape.linears.items()
        if not is_ignored(name, step.ignore)
    }
    for name, scheme in ((shape.head_name, step.head), (shape.embedding_name, step.embedding)):
        if scheme == "auto":
            found[name] = _choices(step, shape.hidden)
        elif scheme != "none":
            found[name] = [(scheme_bits(scheme), step.group_size)]
    return found


def _choices(step: Quantize, columns: int) -> list[Widths]:
    sizes = [size for size in step.candidate_sizes if columns % size == 0]
    chosen: list[Widths] = [(bits, size) for bits, size in product(sorted(set(step.choices)), sizes) if bits < 16]
    return chosen + ([None] if 16 in step.choices else [])


def choice_bytes(shape: ModelShape, step: Quantize, name: str, choice: Widths) -> int:
    """Bytes that a layer takes in the checkpoint. A tied head that stays as it is takes none beside the embedding."""
    itemsize = ITEMSIZE[shape.dtype]
    rows, columns = layer_shapes(shape)[name]
    if choice is None:
        return 0 if shape.tied and name == shape.head_name else rows * columns * itemsize
    bits, group_size = choice
    return layer_bytes(rows, columns, bits, step.model_copy(update={"group_size": group_size}), itemsize)


def allocated_bytes(shape: ModelShape, step: Quantize, chosen: Mapping[str, Widths]) -> int:
    """Tensor bytes of the whole checkpoint with some layers quantized as given; exact."""
    changed = sum(
        choice_bytes(shape, step, name, choice) - choice_bytes(shape, step, name, None)
        for name, choice in chosen.items()
    )
    return dense_bytes(shape) + changed


def byte_limits(shape: ModelShape, step: Quantize) -> tuple[int, int]:
    """Tensor bytes of the smallest and of the largest checkpoint that scheme auto could make."""
    limits = []
    for end in (min, max):
        chosen = {
            name: end(choices, key=lambda choice, name=name: choice_bytes(shape, step, name, choice))
            for name, choices in layer_choices(shape, step).items()
        }
        limits.append(allocated_bytes(shape, step, chosen))
    return limits[0], limits[1]
