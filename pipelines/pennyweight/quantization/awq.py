"""AWQ: scale up the inputs that matter before rounding, and let the layer in front scale them down again.

Lin et al., «AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration», MLSys 2024. The
scales are s = r^α, r being the root mean square of each input over the calibration text (in the paper, the mean of the
absolute values); α is searched for the smallest error of the layers' outputs, which Σ x xᵀ gives without another pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pennyweight.quantization.grid import Grid, find_scales, round_to_nearest
from pennyweight.quantization.walk import Block

if TYPE_CHECKING:
    import torch

#: Exponents tried; 0 leaves the layer as it is.
EXPONENTS = tuple(step / 10 for step in range(10))


@dataclass(frozen=True)
class Fold:
    """A place where inputs can be scaled for free."""

    producer: Any
    """A norm, or a linear layer, whose outputs are the inputs."""
    consumers: dict[str, Any]
    """Linear layers that read them and nothing else does, by name."""
    offset: float = 0.0
    """What the producer adds to its weight before it multiplies: 1 for Gemma's norms."""


def folds(block: Block) -> list[Fold]:
    """Norms whose output only linear layers read, and gated feed-forward layers' up → down, in one block."""
    import torch

    outputs: dict[int, Any] = {}
    held: list[Any] = []
    readers: dict[int, dict[str, Any]] = {}
    linears = block.linears()

    def produced(module: Any, _: Any, output: Any) -> None:
        outputs[id(output)] = module
        held.append(output)

    def read(name: str) -> Callable[..., None]:
        def note(module: Any, inputs: tuple[Any, ...]) -> None:
            readers.setdefault(id(inputs[0]), {})[name] = module

        return note

    handles = [module.register_forward_pre_hook(read(name)) for name, module in linears.items()]
    handles += [module.register_forward_hook(produced) for module in block.module.modules() if _is_norm(module)]
    try:
        with torch.no_grad():
            block.module(block.states[0], **block.keywords)
    finally:
        for handle in handles:
            handle.remove()
    found = [
        Fold(outputs[key], consumers, _offset(outputs[key])) for key, consumers in readers.items() if key in outputs
    ]
    names = {name.rpartition(".")[2]: name for name in linears}
    if {"gate_proj", "up_proj", "down_proj"} <= names.keys():
        found.append(Fold(linears[names["up_proj"]], {names["down_proj"]: linears[names["down_proj"]]}))
    return found


def _is_norm(module: Any) -> bool:
    return type(module).__name__.lower().endswith("norm") and getattr(module, "weight", None) is not None


def _offset(norm: Any) -> float:
    """1 where a norm multiplies by 1 + weight: with a weight of 0 it still lets something through."""
    import torch

    probe = torch.randn(1, norm.weight.numel(), generator=torch.Generator().manual_seed(0))
    kept = norm.weight.data.clone()
    with torch.no_grad():
        norm.weight.zero_()
        passes = norm(probe.to(kept.device, kept.dtype)).abs().sum() > 0
        norm.weight.copy_(kept)
    return 1.0 if passes and getattr(norm, "bias", None) is None else 0.0


def scale(fold: Fold, moments: torch.Tensor, tokens: int, grids: dict[str, Grid], dtype: torch.dtype) -> torch.Tensor:
    """Scale the fold's inputs by the best s, in place. Returns the moments Σ x xᵀ of the scaled inputs.

    `moments` is Σ x xᵀ (in, in) over `tokens` tokens; `grids` says how each consumer will be rounded.
    """
    import torch

    spread = (moments.diagonal() / tokens).sqrt().clamp(min=1e-6)
    weights = {name: module.weight.float() for name, module in fold.consumers.items()}
    best, chosen = torch.inf, torch.ones_like(spread)
    for exponent in EXPONENTS:
        scales = spread**exponent
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = sum(
            _output_error(weight, scales, moments, grids[name], dtype)
            for name, weight in weights.items()
            if name in grids
        )
        if error < best:
            best, chosen = error, scales
    applied = _divide(fold, chosen)
    for name, module in fold.consumers.items():
        module.weight.data = (weights[name] * applied).to(module.weight.dtype)
    return moments / applied.unsqueeze(0) / applied.unsqueeze(1)


def _output_error(
    weight: torch.Tensor, scales: torch.Tensor, moments: torch.Tensor, grid: Grid, dtype: torch.dtype
) -> float:
    """‖(W − Ŵ) X‖², W being rounded on the grid after its columns are multiplied by `scales`."""
    scaled = weight * scales
    steps = find_scales(scaled, grid, dtype, "mse", moments.diagonal() / scales**2)
    rounded = round_to_nearest(scaled, *steps, grid).dequantize() / scales
    difference = weight - rounded
    return float(((difference @ moments) * difference).sum())


def _divide(fold: Fold, scales: torch.Tensor) -> torch.Tensor:
    """Divide the producer's outputs. Returns what they were divided by, after rounding to the producer's dtype."""
    import torch

    weight = fold.producer.weight
    with torch.no_grad():
        before = weight.float() + fold.offset
        by = scales if weight.ndim == 1 else scales.unsqueeze(1)
        weight.copy_((before / by - fold.offset).to(weight.dtype))
        if getattr(fold.producer, "bias", None) is not None:
            fold.producer.bias.div_(scales.to(fold.producer.bias.dtype))
        if weight.ndim != 1:
            return scales
        after = weight.float() + fold.offset
        return torch.where(after != 0, before / after, scales)
