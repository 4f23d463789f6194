"""GPTQModel, the successor of AutoGPTQ, driven through optimum: GPTQ with its kernels on NVIDIA GPUs.

Not yet run on a GPU: its solver has run on a CPU with a tiny model, and what is tested is the way from the layout that
it writes to a checkpoint of ours. Scales are float16 there and become what the checkpoint stores; integers and zeros
stay.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.checkpoints import quantization_config, read_tensors
from pennyweight.errors import StageError
from pennyweight.formats.gptq import Version
from pennyweight.plan.sizes import is_ignored
from pennyweight.quantization import decoder, packed
from pennyweight.quantization.grid import QuantizedLinear
from pennyweight.quantization.methods import CALIBRATION_BATCH
from pennyweight.recipe import Quantize
from pennyweight.steps.backends import integers

if TYPE_CHECKING:
    import torch

    from pennyweight.records import Checkpoint
    from pennyweight.steps import StepContext

QWEIGHT = ".qweight"


def run(checkpoint: Checkpoint, step: Quantize, context: StepContext, files: Path) -> Any:
    """Write the quantized checkpoint to `files`. Returns the model that computes with its integers.

    Raises StageError on a CPU, where GPTQModel does not run.
    """
    import torch

    if context.device != "cuda":
        raise StageError("gptqmodel runs on an NVIDIA GPU", "leave `backend` out: pennyweight's own gptq runs here")
    with tempfile.TemporaryDirectory() as scratch:
        version = _solve(checkpoint, step, context, Path(scratch))
        found = read_layout(Path(scratch), version, getattr(torch, checkpoint.dtype))
    kept = {name: layer for name, layer in found.items() if not is_ignored(name, step.ignore)}
    return integers.write(checkpoint, step, context, kept, files)


def _solve(checkpoint: Checkpoint, step: Quantize, context: StepContext, target: Path) -> Version:
    """Quantize the decoder, all its blocks alike, and write it to `target` in GPTQ's layout.

    Returns which version of it. config.json, as optimum 2.3 writes it, names the version before saving converts it.
    """
    from optimum.gptq import GPTQQuantizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=checkpoint.dtype).to(context.device)
    name, _ = decoder.blocks(model)
    chosen = [n for n in decoder.linears(model) if n.startswith(f"{name}.") and not is_ignored(n, step.ignore)]
    inside = dict.fromkeys(n.removeprefix(f"{name}.").partition(".")[2] for n in chosen)
    solver = GPTQQuantizer(
        bits=step.bits,
        dataset=[{"input_ids": [row], "attention_mask": [[1] * len(row)]} for row in context.calibration.tolist()],
        group_size=step.group_size,
        damp_percent=step.dampening,
        sym=step.symmetric,
        modules_in_block_to_quantize=[[part] for part in inside],
        block_name_to_quantize=name,
        batch_size=CALIBRATION_BATCH,
        pad_token_id=0,
        model_seqlen=context.calibration.shape[1],
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    solver.save(solver.quantize_model(model, tokenizer), str(target))
    return solver.format


def read_layout(folder: Path, version: Version, dtype: torch.dtype) -> dict[str, QuantizedLinear]:
    """The quantized layers of a checkpoint in GPTQ's layout, scales rounded to `dtype`.

    Raises StageError for groups that are not made of neighbours, which our compressed-tensors checkpoints cannot say.
    """
    import torch

    bits = (quantization_config(folder) or {})["bits"]
    tensors = read_tensors(folder)
    layers = {}
    for name in sorted(key.removesuffix(QWEIGHT) for key in tensors if key.endswith(QWEIGHT)):
        scales = tensors[f"{name}.scales"].T.to(dtype).float().contiguous()
        rows, groups = scales.shape
        columns = len(tensors[f"{name}.g_idx"])
        if not torch.equal(tensors[f"{name}.g_idx"].long(), torch.arange(columns) // (columns // groups)):
            raise StageError(f"{name}: its groups are not made of neighbouring inputs", "quantize without act-order")
        words = packed.unpack(tensors[f"{name}{QWEIGHT}"], bits, (columns, rows), dim=0)
        zeros = packed.unpack(tensors[f"{name}.qzeros"], bits, (groups, rows)).T
        # The first version of the layout holds zero − 1.
        zeros = (zeros + 1) & (2**bits - 1) if version == "gptq" else zeros
        layers[name] = QuantizedLinear(words.T.contiguous(), scales, zeros.contiguous(), bits)
    return layers
