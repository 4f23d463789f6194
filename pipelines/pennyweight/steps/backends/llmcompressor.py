"""llm-compressor: schemes that round activations or the KV cache too, and a second opinion on integer weights.

Its checkpoints are in compressed-tensors' formats: `pack-quantized` where weights alone are integers, else
`int-quantized` or `float-quantized`, which give every weight a byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.quantization import decoder
from pennyweight.quantization.methods import CALIBRATION_BATCH
from pennyweight.quantization.packed import write_folder
from pennyweight.recipe import Quantize, scheme_bits
from pennyweight.records import Checkpoint

if TYPE_CHECKING:
    import torch

    from pennyweight.steps import StepContext


def run(checkpoint: Checkpoint, step: Quantize, context: StepContext, files: Path) -> Any:
    """Write the quantized checkpoint to `files`. Returns the model, which rounds as it goes, in float32."""
    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # bfloat16 counts to 256 in steps of 1 at best: a weight divided by its scale can miss the nearest of 255 integers.
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).to(context.device)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    stored = getattr(torch, checkpoint.dtype)
    if step.head != "none":
        decoder.untie(model)
    recipe = modifiers(step, model, stored)
    with _without_pinning():
        oneshot(model=model, recipe=recipe, tokenizer=tokenizer, **_calibration(context.calibration))
    tensors = _compressed(model, stored)
    write_folder(Path(checkpoint.path), files, tensors, _config(model), untied=step.head != "none")
    return model.eval().requires_grad_(False)


@contextmanager
def _without_pinning() -> Iterator[None]:
    """Its AWQ pins memory, which fails where there is no accelerator (seen in 0.14)."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    kept = IntermediatesCache.pin_memory
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = kept


def modifiers(step: Quantize, model: Any, stored: torch.dtype) -> list[Any]:
    """llm-compressor's modifiers: what prepares the weights, what rounds the decoder, what rounds the head."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    head = decoder.head_name(model)
    names = sorted({name.rpartition(".")[2] for name in decoder.linears(model)})
    targets = [rf"re:.*\.{name}$" for name in names]
    body: dict[str, Any] = {
        "config_groups": {"group_0": _scheme(step.scheme, targets, step, stored)},
        "ignore": [head, *step.ignore],
        "kv_cache_scheme": _cache_scheme(step.kv_cache),
    }
    found: list[Any] = []
    if step.method == "awq":
        found.append(AWQModifier())
    elif step.method == "smoothquant":
        found.append(SmoothQuantModifier(smoothing_strength=step.smoothing))
    if step.method == "gptq":
        found.append(GPTQModifier(**body, dampening_frac=step.dampening))
    else:
        found.append(QuantizationModifier(**body))
    if step.head != "none":
        groups = {"group_0": _scheme(step.head, [head], step, stored)}
        found.append(QuantizationModifier(config_groups=groups, ignore=[]))
    return found


def _scheme(scheme: str, targets: list[str], step: Quantize, stored: torch.dtype) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    kind = "float" if scheme == "fp8" else "int"
    grid: dict[str, Any] = {"strategy": "group", "group_size": step.group_size, "symmetric": step.symmetric}
    if scheme in ("w8a8", "fp8"):
        grid = {"strategy": "channel", "symmetric": True}
    weights = QuantizationArgs(num_bits=scheme_bits(scheme), type=kind, scale_dtype=stored, **grid)
    if scheme.endswith("a16"):
        return QuantizationScheme(targets=targets, weights=weights)
    inputs = QuantizationArgs(num_bits=8, type=kind, strategy="token", dynamic=True, symmetric=True)
    return QuantizationScheme(targets=targets, weights=weights, input_activations=inputs)


def _cache_scheme(kind: str) -> Any:
    """One scale for a layer's keys and one for its values, calibrated."""
    from compressed_tensors.quantization import QuantizationArgs

    if kind == "none":
        return None
    number = {"fp8": "float", "int8": "int"}[kind]
    return QuantizationArgs(num_bits=8, type=number, strategy="tensor", dynamic=False, symmetric=True)


def _calibration(windows: Any) -> dict[str, Any]:
    from datasets import Dataset

    if windows is None:
        return {}
    rows = {"input_ids": windows.tolist(), "attention_mask": [[1] * windows.shape[1]] * len(windows)}
    return {
        "dataset": Dataset.from_dict(rows),
        "num_calibration_samples": len(windows),
        "max_seq_length": windows.shape[1],
        "batch_size": CALIBRATION_BATCH,
        "shuffle_calibration_samples": False,
    }


def _compressed(model: Any, stored: torch.dtype) -> dict[str, torch.Tensor]:
    """What the checkpoint holds. Floats that no integer stands for, such as norms that were scaled, are rounded to what
    is stored in the model too, so that it computes with them."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.utils.module import get_direct_state_dict

    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        own, stored_names = get_direct_state_dict(module), module.state_dict().keys()
        state = {key: value for key, value in own.items() if key in stored_names}
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            for value in state.values():
                value.copy_(value.to(stored))
        else:
            scheme.format = infer_module_format(type(module), scheme)
            state = BaseCompressor.get_value_from_registry(scheme.format.value).compress(state, scheme)
        tensors |= {f"{name}.{key}": value.cpu() for key, value in state.items()}
    if decoder.is_tied(model):
        del tensors[f"{decoder.head_name(model)}.weight"]
    return {name: value.to(stored) if value.dtype == torch.float32 else value for name, value in tensors.items()}


def _config(model: Any) -> dict[str, Any]:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationStatus

    config = ModelCompressor.from_pretrained_model(model).quantization_config
    config.quantization_status = QuantizationStatus.COMPRESSED
    return config.model_dump(mode="json")
