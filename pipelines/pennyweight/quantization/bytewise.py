"""Checkpoints in compressed-tensors' `int-quantized` and `float-quantized` formats, which round activations too.

For each quantized layer (out, in), with one group for each output channel or groups of g:

    weight        int8 or float8_e4m3fn (out, in)   a byte a weight, 4-bit integers too
    weight_scale  (out, 1) or (out, in/g)           in the checkpoint's dtype
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pennyweight.checkpoints import quantization_config, read_tensors

if TYPE_CHECKING:
    import torch

FORMATS = ("int-quantized", "float-quantized")


@dataclass(frozen=True)
class ByteLinear:
    """One layer as it is in the checkpoint. Its zero is 0."""

    values: torch.Tensor
    """int8 or float8_e4m3fn (out, in)."""
    scales: torch.Tensor
    """float32 (out, groups)."""
    bits: int

    @property
    def group_size(self) -> int:
        return self.values.shape[1] // self.scales.shape[1]

    def __str__(self) -> str:
        kind = "float8" if self.values.is_floating_point() else f"{self.bits} bits, symmetric"
        grid = "by channel" if self.scales.shape[1] == 1 else f"groups of {self.group_size}"
        return f"{kind}, {grid}, 8-bit activations"

    def dequantize(self) -> torch.Tensor:
        """float32 (out, in)."""
        rows, groups = self.scales.shape
        return (self.values.float().view(rows, groups, -1) * self.scales.unsqueeze(-1)).flatten(1)


def read_bytewise(folder: Path) -> dict[str, ByteLinear]:
    """The quantized layers that hold a byte a weight, by module name."""
    import torch

    groups = ((quantization_config(folder) or {}).get("config_groups") or {}).values()
    bits = {group["weights"]["num_bits"] for group in groups if group.get("format") in FORMATS}
    if not bits:
        return {}
    assert len(bits) == 1, "one scheme rounds all layers"
    tensors = read_tensors(folder)
    weights = {
        name.removesuffix(".weight"): value
        for name, value in tensors.items()
        if name.endswith(".weight") and value.dtype in (torch.int8, torch.float8_e4m3fn)
    }
    return {
        name: ByteLinear(value, tensors[f"{name}.weight_scale"].float(), min(bits)) for name, value in weights.items()
    }
