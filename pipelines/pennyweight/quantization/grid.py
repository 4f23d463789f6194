"""The integers that weights are rounded to, and the scales that give them back.

A group of weights along a layer's input shares one scale s and one zero z: w ≈ s · (q − z), 0 ≤ q < 2^bits. Without
zero points z = 2^(bits−1). Scales are rounded to the dtype that they are stored in *before* anything is rounded by
them, so what is computed here is what every runtime computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

#: Fractions of a group's largest weight that a search for its scale tries.
SHRINKS = tuple(1 - step / 40 for step in range(17))
#: Rows that a search handles at once, so that its temporaries stay small.
SEARCH_ROWS = 256


@dataclass(frozen=True)
class Grid:
    bits: int
    group_size: int
    symmetric: bool = True

    @property
    def top(self) -> int:
        """The largest integer; the smallest is 0."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero of a symmetric grid."""
        return 2 ** (self.bits - 1)


@dataclass(frozen=True)
class QuantizedLinear:
    """One layer's integers as they are in the checkpoint."""

    integers: torch.Tensor
    """uint8 (out, in), from 0 to 2^bits − 1."""
    scales: torch.Tensor
    """float32 (out, groups), each a value of the dtype that it is stored in."""
    zeros: torch.Tensor
    """uint8 (out, groups): the integer that stands for 0."""
    bits: int

    @property
    def group_size(self) -> int:
        return self.integers.shape[1] // self.scales.shape[1]

    @property
    def symmetric(self) -> bool:
        return bool((self.zeros == 2 ** (self.bits - 1)).all())

    def __str__(self) -> str:
        return f"{self.bits} bits, {'' if self.symmetric else 'a'}symmetric, groups of {self.group_size}"

    def dequantize(self) -> torch.Tensor:
        """float32 (out, in)."""
        rows, groups = self.scales.shape
        centred = self.integers.view(rows, groups, -1).float() - self.zeros.float().unsqueeze(-1)
        return (centred * self.scales.unsqueeze(-1)).flatten(1)

    def rows(self, order: torch.Tensor) -> QuantizedLinear:
        """The same layer with its outputs in another order."""
        return replace(self, integers=self.integers[order], scales=self.scales[order], zeros=self.zeros[order])


def find_scales(
    weight: torch.Tensor,
    grid: Grid,
    dtype: torch.dtype,
    search: Literal["max", "mse"] = "max",
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales, zeros) of a weight (out, in), each float32 (out, groups), scales being values of `dtype`.

    `max` lets the grid reach the group's extreme weights: s = 2·max|w| / (2^bits − 1), or (max − min) / (2^bits − 1)
    with a zero point. `mse` takes the fraction of that range which makes Σ importance · (w − ŵ)² smallest;
    `importance` is (in,), all alike where it is not given.
    """
    import torch

    groups = weight.float().view(weight.shape[0], -1, grid.group_size)
    if search == "max":
        return _range_scales(groups, grid, dtype, 1.0)
    weights = torch.ones(weight.shape[1]) if importance is None else importance.float()
    weights = weights.to(weight.device).view(1, -1, grid.group_size)
    parts = [_search(groups[at : at + SEARCH_ROWS], grid, dtype, weights) for at in range(0, len(groups), SEARCH_ROWS)]
    return torch.cat([scales for scales, _ in parts]), torch.cat([zeros for _, zeros in parts])


def _search(
    groups: torch.Tensor, grid: Grid, dtype: torch.dtype, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    best_scales, best_zeros = _range_scales(groups, grid, dtype, 1.0)
    best = torch.full_like(best_scales, torch.inf)
    for shrink in SHRINKS:
        scales, zeros = _range_scales(groups, grid, dtype, shrink)
        kept = _round(groups, scales.unsqueeze(-1), zeros.unsqueeze(-1), grid.top).sub_(zeros.unsqueeze(-1))
        error = kept.mul_(scales.unsqueeze(-1)).sub_(groups).square_().mul_(weights).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros


def _range_scales(
    groups: torch.Tensor, grid: Grid, dtype: torch.dtype, shrink: float
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    if grid.symmetric:
        reach = groups.abs().amax(-1) * (2 * shrink)
        zeros = torch.full_like(reach, grid.middle)
    else:
        low, high = groups.amin(-1).clamp(max=0) * shrink, groups.amax(-1).clamp(min=0) * shrink
        reach = high - low
    # A group of zeros keeps a scale of 1 and integers that stand for 0.
    scales = torch.where(reach > 0, reach / grid.top, 1.0).to(dtype).float()
    scales = scales.clamp(min=torch.finfo(dtype).tiny)
    if not grid.symmetric:
        zeros = (-low / scales).round_().clamp_(0, grid.top)
    return scales, zeros


def _round(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int) -> torch.Tensor:
    return (values / scales).round_().add_(zeros).clamp_(0, top)


def round_to_nearest(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, grid: Grid) -> QuantizedLinear:
    """Each weight (out, in) becomes the nearest integer of its group's grid."""
    import torch

    groups = weight.float().view(weight.shape[0], -1, grid.group_size)
    integers = _round(groups, scales.unsqueeze(-1), zeros.unsqueeze(-1), grid.top)
    return QuantizedLinear(integers.to(torch.uint8).flatten(1), scales, zeros.to(torch.uint8), grid.bits)
