"""AutoRound: learns whether each weight is rounded up or down, and where each group's scale ends.

Cheng et al., «Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs», EMNLP Findings 2024.
Its scales may be negative: the side of a group that reaches farther gets the spare integer of a symmetric grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pennyweight.plan.sizes import is_ignored
from pennyweight.quantization import decoder
from pennyweight.quantization.grid import QuantizedLinear
from pennyweight.quantization.methods import CALIBRATION_BATCH
from pennyweight.recipe import Quantize
from pennyweight.steps.backends import integers

if TYPE_CHECKING:
    from pathlib import Path

    from pennyweight.records import Checkpoint
    from pennyweight.steps import StepContext


def run(checkpoint: Checkpoint, step: Quantize, context: StepContext, files: Path) -> Any:
    """Write the quantized checkpoint to `files`. Returns the model that computes with its integers."""
    return integers.write(checkpoint, step, context, _learn(checkpoint, step, context), files)


def _learn(checkpoint: Checkpoint, step: Quantize, context: StepContext) -> dict[str, QuantizedLinear]:
    import torch
    from auto_round import AutoRound
    from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # In float32, which holds scale · integer exactly, so that the integer can be told from the product.
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    windows = torch.from_numpy(context.calibration)
    grid = {"bits": step.bits, "group_size": step.group_size, "sym": step.symmetric}
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(checkpoint.path),
        scheme=f"W{step.bits}A16",
        alg_configs=SignRoundConfig(iters=step.iterations, **grid),
        layer_config={name: {"bits": 16} for name in decoder.linears(model) if is_ignored(name, step.ignore)},
        dataset=list(windows.split(CALIBRATION_BATCH)),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=min(CALIBRATION_BATCH, len(windows)),
        scale_dtype=checkpoint.dtype,
        device_map=context.device,
        enable_torch_compile=context.device == "cuda",  # on a CPU compiling takes longer than learning
        seed=context.seed,
    )
    tuned, _ = tuner.quantize()
    return {
        name: _integers(module, step)
        for name, module in decoder.linears(tuned).items()
        if not is_ignored(name, step.ignore)
    }


def _integers(module: Any, step: Quantize) -> QuantizedLinear:
    import torch

    weight = module.weight.detach().float().cpu()
    scales = module.scale.detach().float().cpu().reshape(len(weight), -1)
    zeros = torch.as_tensor(module.zp).detach().float().cpu().expand(scales.shape)  # one for all where symmetric
    groups = weight.view(*scales.shape, step.group_size)
    found = (groups / scales.unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    return QuantizedLinear(found.to(torch.uint8).flatten(1), scales, zeros.to(torch.uint8), step.bits)
