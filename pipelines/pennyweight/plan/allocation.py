"""Bytes of checkpoints whose layers have bits of their own, and what a budget can buy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


def least_bytes(shape: ModelShape, step: Quantize) -> int:
    """Tensor bytes of the smallest checkpoint that scheme auto could make. Every layer must have a choice."""
    chosen = {
        name: min(choices, key=lambda choice, name=name: choice_bytes(shape, step, name, choice))
        for name, choices in layer_choices(shape, step).items()
    }
    return allocated_bytes(shape, step, chosen)


def budget_problems(shape: ModelShape, step: Quantize) -> Iterator[tuple[str, str, str]]:
    """(key, message, hint) of all that is wrong with a step of scheme auto for this model."""
    assert step.budget
    shapes, choices = layer_shapes(shape), layer_choices(shape, step)
    without = [name for name, given in choices.items() if not given or given == [None]]
    if without:
        sizes = ", ".join(map(str, step.candidate_sizes))
        message = f"{sizes} do not divide {shapes[without[0]][1]}, the input size of {without[0]}"
        yield "group_sizes", message, "add a size that does, or leave that layer alone with `ignore`"
        return
    dense, least = dense_bytes(shape), least_bytes(shape, step)
    budget = step.budget.allowed(shape.parameters, dense)
    if budget < least:
        possible = f"{least:,} bytes, {8 * least / shape.parameters:.3f} bits a weight, ratio {least / dense:.4f}"
        message = f"{budget:,} bytes are allowed, and the smallest checkpoint of these choices takes {least:,}"
        yield "budget", message, f"what is possible: {possible}; or add smaller `choices` or larger `group_sizes`"
    elif budget >= dense:
        message = f"nothing needs rounding: the unquantized checkpoint takes {dense:,} bytes, {budget:,} are allowed"
        yield "budget", message, "lower `budget`, or leave the step out"
