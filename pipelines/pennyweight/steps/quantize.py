"""`quantize`: round the weights of linear layers to integers, through llm-compressor.

The checkpoint written is compressed-tensors' `pack-quantized` format, which transformers and vLLM load.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.errors import StageError
from pennyweight.recipe import Quantize, scheme_bits
from pennyweight.records import Checkpoint

if TYPE_CHECKING:
    import torch

    from pennyweight.steps import StepContext

HEAD = "lm_head"
#: Calibration sequences that go through the model together. It changes peak memory, and the last digits.
CALIBRATION_BATCH = 8


def run(checkpoint: Checkpoint, step: Quantize, context: StepContext, files: Path) -> None:
    """Write the quantized checkpoint to `files`. Raises StageError where the model has nothing to quantize."""
    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(context.seed)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=getattr(torch, _work_dtype(checkpoint, step)))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    if context.device == "cuda":
        model.to("cuda")
    data: dict[str, Any] = {}
    if step.method == "gptq":
        data = _calibration(context.calibration)
    oneshot(model=model, recipe=modifiers(step, body_targets(model), checkpoint.dtype), tokenizer=tokenizer, **data)
    model.save_pretrained(files, save_compressed=True)
    tokenizer.save_pretrained(files)
    _store_floats_as(checkpoint.dtype, files)


def _work_dtype(checkpoint: Checkpoint, step: Quantize) -> str:
    """dtype to round in. bfloat16 counts to 256 in steps of 1 at best, so dividing a weight by its scale in bfloat16
    can miss the nearest of 255 integers; of 15 it cannot, and there calibration runs twice as fast in it."""
    return checkpoint.dtype if step.method == "gptq" and step.bits == 4 else "float32"


def _store_floats_as(dtype: str, files: Path) -> None:
    """Store what is not quantized, and the scales, in the base's dtype. The scales were rounded to it beforehand."""
    import torch
    from safetensors.torch import load_file, save_file

    for path in files.glob("*.safetensors"):
        tensors = load_file(path)
        if any(tensor.dtype == torch.float32 for tensor in tensors.values()) and dtype != "float32":
            wanted = getattr(torch, dtype)
            cast = {name: t.to(wanted) if t.dtype == torch.float32 else t for name, t in tensors.items()}
            save_file(cast, path, metadata={"format": "pt"})
    config = json.loads((files / "config.json").read_text())
    (files / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")


def body_targets(model: torch.nn.Module) -> list[str]:
    """Patterns that match every linear layer of the decoder and nothing else, such as `re:.*\\.q_proj$`.

    They name layers rather than the class `Linear`, so that a head with a scheme of its own is matched once only.
    """
    import torch

    head = model.get_output_embeddings()
    suffixes = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if not suffixes:
        raise StageError(f"{type(model).__name__} has no linear layers to quantize")
    return [rf"re:.*\.{suffix}$" for suffix in sorted(suffixes)]


def modifiers(step: Quantize, targets: list[str], dtype: str) -> list[Any]:
    """llm-compressor's modifiers for this step: one for the decoder, and one for the head where it has a scheme."""
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    groups = {"group_0": _scheme(step.scheme, targets, step, dtype)}
    body: Any
    if step.method == "gptq":
        body = GPTQModifier(config_groups=groups, ignore=[HEAD, *step.ignore], dampening_frac=step.dampening)
    else:
        body = QuantizationModifier(config_groups=groups, ignore=[HEAD, *step.ignore])
    if step.head == "none":
        return [body]
    head = QuantizationModifier(config_groups={"group_0": _scheme(step.head, [HEAD], step, dtype)}, ignore=[])
    return [body, head]


def _scheme(scheme: str, targets: list[str], step: Quantize, dtype: str) -> Any:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=scheme_bits(scheme),
        type="int",
        symmetric=step.symmetric,
        strategy="group",
        group_size=step.group_size,
        scale_dtype=getattr(torch, dtype),
    )
    return QuantizationScheme(targets=targets, weights=weights)


def _calibration(windows: Any) -> dict[str, Any]:
    from datasets import Dataset

    rows = {"input_ids": windows.tolist(), "attention_mask": [[1] * windows.shape[1]] * len(windows)}
    return {
        "dataset": Dataset.from_dict(rows),
        "num_calibration_samples": len(windows),
        "max_seq_length": windows.shape[1],
        "batch_size": CALIBRATION_BATCH,
        "shuffle_calibration_samples": False,
    }
