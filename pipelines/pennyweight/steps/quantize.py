"""`quantize`: round the weights of linear layers to integers, and prove that it was done.

Whoever does it, the checkpoint is in compressed-tensors' format, which transformers and vLLM load.
"""

from __future__ import annotations

import importlib
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight import checkpoints, installed
from pennyweight.errors import StageError
from pennyweight.plan.sizes import ModelShape, is_ignored, model_shape, packed_bytes
from pennyweight.quantization import decoder, methods, packed, verify
from pennyweight.quantization.allocation import allocate
from pennyweight.quantization.bytewise import read_bytewise
from pennyweight.quantization.grid import Grid
from pennyweight.recipe import Quantize, scheme_bits
from pennyweight.records import Allocation, Checkpoint, Rounding

if TYPE_CHECKING:
    from pennyweight.steps import StepContext

#: Backend → the module that drives it.
BACKENDS = {"llm-compressor": "llmcompressor", "auto-round": "autoround", "gptqmodel": "gptqmodel"}


def run(checkpoint: Checkpoint, step: Quantize, context: StepContext, files: Path) -> Rounding:
    """Write the quantized checkpoint to `files`. Raises StageError where nothing is quantized, or where the checkpoint
    written is not the one that was made."""
    import torch

    begin = time.monotonic()
    torch.manual_seed(context.seed)
    shape = model_shape(checkpoints.read_config(Path(checkpoint.path)), checkpoint.dtype)
    allocation = None
    if step.maker == "pennyweight":
        model, allocation = _quantize(checkpoint, shape, step, context, files)
    else:
        model = _backend(step.maker).run(checkpoint, step, context, files)
    quantized = packed.read_quantized(files) or read_bytewise(files)
    verify.check_layers(Path(checkpoint.path), quantized)
    verify.check_bytes(files, allocation.bytes if allocation else packed_bytes(shape, step))
    difference = verify.check_reload(files, model)
    return Rounding(
        backend=step.maker,
        method=step.method,
        layers=Counter(str(layer) for layer in quantized.values()),
        allocation=allocation,
        reload_difference=difference,
        seconds=time.monotonic() - begin,
    )


def _backend(name: str) -> Any:
    installed.require(name)
    return importlib.import_module(f"pennyweight.steps.backends.{BACKENDS[name]}")


def _quantize(
    checkpoint: Checkpoint, shape: ModelShape, step: Quantize, context: StepContext, files: Path
) -> tuple[Any, Allocation | None]:
    """Our own way. Returns the model that computes what the checkpoint written should, and who got which bits."""
    import torch

    model = decoder.load(checkpoint, context.device)
    dtype = getattr(torch, checkpoint.dtype)
    windows = None if context.calibration is None else torch.from_numpy(context.calibration).to(context.device)
    allocation = None
    if step.scheme == "auto":
        assert windows is not None
        grids, allocation = allocate(model, shape, step, windows, dtype, context.seed, context.report)
        windows = windows[: -step.search.held_out]
    else:
        grids = layer_grids(model, step)
    if decoder.head_name(model) in grids:
        decoder.untie(model)
    settings = methods.Settings(step.method, step.scale_search, step.dampening, dtype)
    layers = methods.quantize(model, grids, settings, windows, context.report)
    packed.write(Path(checkpoint.path), files, model, layers)
    return model, allocation


def layer_grids(model: Any, step: Quantize) -> dict[str, Grid]:
    """What each layer is rounded to. Raises StageError if no layer is left."""
    grids = {
        name: Grid(step.bits, step.group_size, step.symmetric)
        for name in decoder.linears(model)
        if not is_ignored(name, step.ignore)
    }
    if step.head != "none":
        grids[decoder.head_name(model)] = Grid(scheme_bits(step.head), step.group_size, step.symmetric)
    if step.embedding != "none":
        grids[decoder.embedding_name(model)] = Grid(scheme_bits(step.embedding), step.group_size, step.symmetric)
    if not grids:
        raise StageError("nothing is left to quantize", "shorten `ignore`")
    return grids
