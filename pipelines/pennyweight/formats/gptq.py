"""The GPTQ layout, which GPTQModel, transformers, vLLM and onnxruntime-genai's model builder read.

For each quantized layer (out, in) in groups of g:

    qweight  int32 (in·bits/32, out)      integers along the input, low bits first, without gaps
    scales   (in/g, out)
    qzeros   int32 (in/g, out·bits/32)    packed along the output; the first version of the layout holds zero − 1
    g_idx    int32 (in)                   the group of each input

Three-bit integers lie without gaps too: 32 of them fill three words. A zero of 0 does not survive the first version,
whose readers add 1 to whole words at once, so the carry would reach the neighbour.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pennyweight.checkpoints import DTYPES, INDEX, read_config, read_headers, read_tensors
from pennyweight.errors import StageError
from pennyweight.formats.source import integer_layers
from pennyweight.quantization import packed
from pennyweight.quantization.grid import QuantizedLinear

if TYPE_CHECKING:
    import torch

Version = Literal["gptq", "gptq_v2"]


def export(source: Path, target: Path) -> dict[str, QuantizedLinear]:
    """Write a checkpoint for GPTQModel, transformers and vLLM. Returns its quantized layers.

    Scales are float16, which all readers take, where that holds them exactly, else what they are in the checkpoint.
    Raises StageError for a checkpoint that the layout cannot hold.
    """
    import torch

    layers = integer_layers(source)
    if not layers:
        raise StageError(f"{source} is not quantized", "a plain checkpoint is exported to gguf or onnx")
    if any(name.endswith("embed_tokens") for name in layers):
        raise StageError(
            "the GPTQ layout has no quantized embedding", "export to gguf, or quantize without `embedding`"
        )
    stored = next(t.dtype for t in read_headers(source) if t.name.endswith(".weight_scale"))
    exact = all(torch.equal(layer.scales.half().float(), layer.scales) for layer in layers.values())
    dtype = torch.float16 if exact else getattr(torch, DTYPES[stored])
    version: Version = "gptq" if all(layer.symmetric for layer in layers.values()) else "gptq_v2"
    write(source, target, layers, dtype, version)
    return layers


def write(
    source: Path,
    target: Path,
    layers: dict[str, QuantizedLinear],
    dtype: torch.dtype,
    version: Version,
    dense: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the compressed-tensors checkpoint `source` to `target` with `layers` as its integers and scales in `dtype`.

    `dense` are tensors to add. Raises StageError where a layer does not fill whole words.
    """
    from safetensors.torch import save_file

    tensors = {name: value for name, value in read_tensors(source).items() if not name.endswith(packed.PARTS)}
    tensors |= dense or {}
    floats = sorted(
        name.removesuffix(".weight") for name, value in tensors.items() if name.endswith(".weight") and value.ndim == 2
    )
    for name, layer in layers.items():
        tensors |= layer_tensors(name, layer, dtype, version)
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = read_config(source) | {"quantization_config": quantization_config(layers, floats, version)}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", INDEX):
            shutil.copy(path, target)


def layer_tensors(name: str, layer: QuantizedLinear, dtype: torch.dtype, version: Version) -> dict[str, torch.Tensor]:
    """The tensors that hold one layer, by their names in the file. Raises StageError for words that are not full."""
    import torch

    rows, columns = layer.integers.shape
    for size, side in ((rows, "outputs"), (columns, "inputs")):
        if size * layer.bits % 32:
            raise StageError(
                f"{name}: {size} {side} of {layer.bits} bits do not fill whole words, as the GPTQ layout needs",
                "leave this layer unquantized with `ignore`, or export to another format",
            )
    zeros = layer.zeros.T.to(torch.int16) - int(version == "gptq")
    return {
        f"{name}.qweight": packed.pack(layer.integers.T, layer.bits, dim=0),
        f"{name}.scales": layer.scales.T.to(dtype).contiguous(),
        f"{name}.qzeros": packed.pack((zeros & (2**layer.bits - 1)).to(torch.uint8), layer.bits, dim=1),
        f"{name}.g_idx": torch.arange(columns, dtype=torch.int32) // layer.group_size,
    }


def quantization_config(layers: dict[str, QuantizedLinear], floats: list[str], version: Version) -> dict[str, Any]:
    """What config.json says of the layers: the commonest kind, the others by name, and `floats` left alone."""
    kinds = {name: (layer.bits, layer.group_size) for name, layer in layers.items()}
    (bits, group_size), _ = Counter(kinds.values()).most_common(1)[0]
    others = {
        f"+:{_pattern(name)}": {"bits": kind[0], "group_size": kind[1]}
        for name, kind in kinds.items()
        if kind != (bits, group_size)
    }
    return {
        "quant_method": "gptq",
        "checkpoint_format": version,
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": all(layer.symmetric for layer in layers.values()),
        "lm_head": "lm_head" in layers,
        "dynamic": others | {f"-:{_pattern(name)}": {} for name in floats},
    }


def _pattern(name: str) -> str:
    """Matches a module, and its tensors: some readers ask with the one, some with the other."""
    return rf"^{re.escape(name)}(?:\.|$)"
