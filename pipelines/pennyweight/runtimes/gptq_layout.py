"""From compressed-tensors to the GPTQ layout, integer by integer.

The ONNX exporter reads GPTQ checkpoints and not compressed-tensors. Both store the same thing, unsigned integers with a
scale (and zero point) for each group along a layer's input, so one can be rewritten as the other without rounding:

    compressed-tensors  weight_packed  int32 (out, in·bits/32)   packed along the input, offset by 2^(bits−1)
                        weight_scale   (out, groups)             weight_zero_point, packed along the output
    GPTQ                qweight        int32 (in·bits/32, out)   packed along the input
                        scales (groups, out), qzeros int32 (groups, out·bits/32) holding zero − 1, g_idx (in)
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pennyweight.checkpoints import read_tensors
from pennyweight.errors import StageError

if TYPE_CHECKING:
    import torch

PACKED = ".weight_packed"
_PARTS = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point")


@dataclass(frozen=True)
class QuantizedLinear:
    """One layer's integers as they are in the checkpoint."""

    integers: torch.Tensor
    """uint8 (out, in), from 0 to 2^bits − 1."""
    scales: torch.Tensor
    """float32 (out, groups)."""
    zeros: torch.Tensor
    """uint8 (out, groups): the integer that stands for 0."""
    bits: int

    @property
    def group_size(self) -> int:
        return self.integers.shape[1] // self.scales.shape[1]


def read_quantized(folder: Path) -> dict[str, QuantizedLinear]:
    """All quantized layers of a compressed-tensors checkpoint, by module name."""
    tensors = read_tensors(folder)
    layers = {}
    for name in sorted(name.removesuffix(PACKED) for name in tensors if name.endswith(PACKED)):
        packed = tensors[f"{name}.weight_packed"]
        rows, columns = (int(size) for size in tensors[f"{name}.weight_shape"])
        bits = _bits(packed.shape[1], columns)
        scales = tensors[f"{name}.weight_scale"].float()
        zero_point = tensors.get(f"{name}.weight_zero_point")
        layers[name] = QuantizedLinear(
            integers=unpack(packed, bits, columns),
            scales=scales,
            zeros=_zeros(zero_point, scales, bits, rows),
            bits=bits,
        )
    return layers


def rewrite(source: Path, target: Path) -> dict[str, QuantizedLinear]:
    """Write `source`'s checkpoint to `target` in GPTQ layout. Returns the layers rewritten."""
    import torch
    from safetensors.torch import save_file

    layers = read_quantized(source)
    if not layers:
        raise StageError(f"{source} has no packed integers: not a compressed-tensors checkpoint that can be exported")
    tensors = {name: value for name, value in read_tensors(source).items() if not name.endswith(_PARTS)}
    for name, layer in layers.items():
        tensors[f"{name}.qweight"] = pack(layer.integers.T, layer.bits, dim=0)
        tensors[f"{name}.scales"] = layer.scales.T.contiguous()
        stored_zeros = (layer.zeros.T.int() - 1) & (2**layer.bits - 1)
        tensors[f"{name}.qzeros"] = pack(stored_zeros, layer.bits, dim=1)
        tensors[f"{name}.g_idx"] = torch.arange(layer.integers.shape[1], dtype=torch.int32) // layer.group_size
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = _gptq_config(layers)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(path, target)
    return layers


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """uint8 (rows, columns) from int32 words (rows, words), low bits first."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    spread = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return spread.flatten(-2)[:, :columns].to(torch.uint8).contiguous()


def pack(values: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """int32 words holding 32/bits values each along `dim`, low bits first, padded with zeros."""
    import torch

    rows = values.T if dim == 0 else values
    per_word = 32 // bits
    padding = -rows.shape[1] % per_word
    wide = torch.nn.functional.pad(rows.long(), (0, padding)).reshape(rows.shape[0], -1, per_word)
    words = (wide << torch.arange(0, 32, bits)).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return (words.T if dim == 0 else words).contiguous()


def _zeros(zero_point: torch.Tensor | None, scales: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    import torch

    if zero_point is None:
        return torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
    return unpack(zero_point.T.contiguous(), bits, rows).T.contiguous()


def _bits(words: int, columns: int) -> int:
    for bits in (4, 8):
        if words == -(-columns * bits // 32):
            return bits
    raise StageError(f"{words} words for {columns} inputs are neither 4 nor 8 bits a weight")


def _gptq_config(layers: dict[str, QuantizedLinear]) -> dict[str, object]:
    shapes = {name: (layer.bits, layer.group_size) for name, layer in layers.items()}
    (bits, group_size), _ = Counter(shapes.values()).most_common(1)[0]
    others = {
        rf"+:^{re.escape(name)}\.": {"bits": shape[0], "group_size": shape[1]}
        for name, shape in shapes.items()
        if shape != (bits, group_size)
    }
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "dynamic": others,
    }
