"""From integers that somebody else found to a checkpoint of ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.quantization import decoder, methods, packed
from pennyweight.quantization.grid import Grid, QuantizedLinear
from pennyweight.recipe import Quantize, scheme_bits
from pennyweight.records import Checkpoint

if TYPE_CHECKING:
    from pennyweight.steps import StepContext


def write(
    checkpoint: Checkpoint, step: Quantize, context: StepContext, layers: dict[str, QuantizedLinear], files: Path
) -> Any:
    """Write `checkpoint` with the decoder's `layers` as integers to `files`, and the head rounded to nearest where the
    step has a scheme for it. Returns the model that computes with them."""
    import torch

    model = decoder.load(checkpoint, context.device)
    for name, layer in layers.items():
        methods.put(model.get_submodule(name), layer)
    if step.head != "none":
        decoder.untie(model)
        grid = Grid(scheme_bits(step.head), step.group_size, step.symmetric)
        settings = methods.Settings("rtn", step.scale_search, step.dampening, getattr(torch, checkpoint.dtype))
        head = methods.quantize(model, {decoder.head_name(model): grid}, settings, None, context.report)
        layers = {**layers, **head}
    packed.write(Path(checkpoint.path), files, model, layers)
    return model
