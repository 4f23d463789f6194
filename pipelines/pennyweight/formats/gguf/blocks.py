"""Integers, scales and zeros as GGUF's blocks of 32 weights along a layer's input.

    Q4_0  d       w = d · (q − 8)    integers of up to 4 bits without zero points
    Q4_1  d, m    w = d · q + m      with them: m = −d · z
    Q8_0  d       w = d · q          −128 ≤ q < 128: integers of 5 to 8 bits without zero points

d and m are float16; 4-bit integers j and j + 16 of a block share a byte, j in its low half. A group of 64 becomes two
blocks of one scale. Integers narrower than a block's keep their values and take its width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pennyweight.errors import StageError
from pennyweight.quantization.grid import QuantizedLinear

if TYPE_CHECKING:
    import numpy as np
    import torch

BLOCK = 32
#: Largest |Δw|, in quantization steps, that float16 may make. Rounding a scale within float16's normal range moves the
#: outermost 8-bit integer by at most 128 · 2⁻¹¹ = 1/16 of a step.
LARGEST_CHANGE = 1 / 16

BlockType = Literal["Q4_0", "Q4_1", "Q8_0"]


@dataclass(frozen=True)
class Blocks:
    type: BlockType
    data: np.ndarray
    """uint8 (out, bytes of a row)."""
    change: float
    """Largest |Δw| that float16 made, in quantization steps; 0 where every weight is exactly what it was."""


def from_layer(name: str, layer: QuantizedLinear) -> Blocks:
    """A layer as blocks. Raises StageError where no block type holds its values."""
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    kind = block_type(name, layer)
    rows, columns = layer.integers.shape
    repeats = layer.group_size // BLOCK
    scales = layer.scales.repeat_interleave(repeats, dim=1)
    parts = [_float16(scales)]
    if kind == "Q4_1":
        parts.append(_float16(-scales * layer.zeros.repeat_interleave(repeats, dim=1)))
    parts.append(_integers(layer, kind).reshape(rows, columns // BLOCK, -1))
    data = np.concatenate(parts, axis=-1).reshape(rows, -1)
    with np.errstate(invalid="ignore"):  # an infinite scale gives a change that is no number, and is refused
        change = _largest_change(layer, dequantize(data, GGMLQuantizationType[kind]))
    if not change <= LARGEST_CHANGE:
        raise StageError(
            f"{name}: float16, which GGUF keeps scales in, moves a weight by {change:.2g} quantization steps",
            "its scales are outside float16's range: leave this layer unquantized with `ignore`",
        )
    return Blocks(kind, data, change)


def block_type(name: str, layer: QuantizedLinear) -> BlockType:
    """The narrowest block type that holds a layer's integers. Raises StageError where there is none."""
    if layer.group_size % BLOCK:
        raise StageError(
            f"{name}: groups of {layer.group_size} are no multiple of GGUF's blocks of {BLOCK}",
            "quantize with group_size: 32, 64 or 128, or export to another format",
        )
    if layer.symmetric:
        return "Q4_0" if layer.bits <= 4 else "Q8_0"
    if layer.bits > 4:
        raise StageError(
            f"{name}: GGUF has no blocks of {layer.bits}-bit integers with zero points",
            "quantize with symmetric: true, or export to another format",
        )
    return "Q4_1"


def _integers(layer: QuantizedLinear, kind: BlockType) -> np.ndarray:
    """uint8 (out, blocks · bytes of a block's integers)."""
    import numpy as np

    values = layer.integers.numpy()
    middle = 2 ** (layer.bits - 1)
    if kind == "Q8_0":
        return (values.astype(np.int16) - middle).astype(np.int8).view(np.uint8)
    shifted = values + (8 - middle if kind == "Q4_0" else 0)
    low, high = np.split(shifted.reshape(len(values), -1, 2, BLOCK // 2), 2, axis=2)
    return (low | high << 4).astype(np.uint8).reshape(len(values), -1)


def _float16(values: torch.Tensor) -> np.ndarray:
    """uint8 (out, blocks, 2)."""
    import numpy as np

    with np.errstate(over="ignore"):
        return values.numpy().astype(np.float16)[..., None].view(np.uint8)


def _largest_change(layer: QuantizedLinear, found: np.ndarray) -> float:
    import torch

    change = (torch.from_numpy(found) - layer.dequantize()).abs_().view(*layer.scales.shape, -1)
    return (change / layer.scales.unsqueeze(-1)).max().item()
