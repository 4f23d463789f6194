"""A student whose quantized layers are integers times scales, so that what makes up for the rounding can learn.

What learns is always what will be stored: scales and norms are rounded to the dtype of the checkpoint before they are
used, with the gradient going straight through.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.utils import parametrize

from pennyweight.checkpoints import read_tensors
from pennyweight.quantization import decoder
from pennyweight.quantization.grid import QuantizedLinear
from pennyweight.quantization.packed import pack, read_quantized

if TYPE_CHECKING:
    from pennyweight.records import Checkpoint

#: Where a weight starts between two integers, at most: just short of where it would change to the other one.
MARGIN = 0.49
#: Learning rate of places, in quantization steps, for a scale's, in fractions of itself.
PLACES_RATE = 2.0
#: Learning rate of an adapter's matrices for a scale's.
ADAPTER_RATE = 0.3

Moves = Literal["none", "by-one", "low-rank"]


@dataclass(frozen=True)
class Trainable:
    """One tensor that learns. Its learning rate is the recipe's times `rate`."""

    parameter: torch.nn.Parameter
    rate: float = 1.0


class ScaledLinear(torch.nn.Module):
    """y = x · (scales ∘ (integers − zeros))ᵀ + bias, whose scales learn, and its integers where `moves` says so.

    Scales learn by their logarithm: `change` is 0 at the start. With `by-one` every weight has a place between its two
    neighbouring integers, which learns through the rounding (Bengio et al., 2013); with `low-rank` the places move by a
    product of two thin matrices (Bondarenko et al., LR-QAT, 2024), and the integers go as far as the grid does.
    """

    def __init__(self, layer: QuantizedLinear, stored: torch.dtype, compute: torch.dtype, bias: Any, moves: Moves):
        super().__init__()
        rows, groups = layer.scales.shape
        self._stored, self._moves, self._top = stored, moves, 2**layer.bits - 1
        self.register_buffer("integers", layer.integers.to(compute).view(rows, groups, -1))
        self.register_buffer("zeros", layer.zeros.to(compute).unsqueeze(-1))
        self.register_buffer("scales", layer.scales.float())
        self.register_buffer("start", None)
        self.change = torch.nn.Parameter(torch.zeros_like(self.scales), requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias.to(compute), requires_grad=False)
        self.places: torch.nn.Parameter | None = None
        self.left: torch.nn.Parameter | None = None
        self.right: torch.nn.Parameter | None = None
        self.down: torch.nn.Parameter | None = None
        self.up: torch.nn.Parameter | None = None

    def learn_places(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> list[Trainable]:
        """Let the integers move. `weight` (out, in) is what they were rounded from."""
        exact = weight.float().view_as(self.integers) / self.scales.unsqueeze(-1)
        residue = exact + self.zeros.float() - self.integers.float()
        # A method that looks further than the nearest integer has moved away from the weight on purpose.
        residue = torch.where(residue.abs() <= 0.5, residue.clamp(-MARGIN, MARGIN), 0.0)
        if self._moves == "by-one":
            self.places = torch.nn.Parameter(residue)
            return [Trainable(self.places, PLACES_RATE)]
        rows, columns = weight.shape
        right = torch.randn(rank, columns, generator=generator).to(weight.device)
        self.start = residue
        self.left = torch.nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        self.right = torch.nn.Parameter(right)
        return [Trainable(self.left, PLACES_RATE / rank**0.5), Trainable(self.right, PLACES_RATE / rank**0.5)]

    def learn_adapter(self, rank: int, generator: torch.Generator) -> list[Trainable]:
        """Add x · downᵀ · upᵀ, nothing at the start."""
        rows, columns = len(self.scales), self.integers[0].numel()
        down = (torch.rand(rank, columns, generator=generator) * 2 - 1) / columns**0.5
        self.down = torch.nn.Parameter(down.to(self.scales.device))
        self.up = torch.nn.Parameter(torch.zeros(rows, rank, device=self.scales.device))
        return [Trainable(self.down, ADAPTER_RATE), Trainable(self.up, ADAPTER_RATE)]

    def healed_adapter(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """down (rank, in) and up (out, rank), float32, each a value of the dtype that it is stored in."""
        if self.down is None or self.up is None:
            return None
        return _through(self.down, self._stored), _through(self.up, self._stored)

    def healed_scales(self) -> torch.Tensor:
        """float32 (out, groups), each a value of the dtype that it is stored in."""
        return _through(self.scales * self.change.exp(), self._stored)

    def healed_integers(self) -> torch.Tensor:
        """(out, groups, group size), from 0 to 2^bits − 1, in the dtype computed in."""
        if self.places is not None:
            moved = self.places.round().clamp_(-1, 1).to(self.integers.dtype)
            return moved.add_(self.integers).clamp_(0, self._top)
        if self.left is not None and self.right is not None:
            moved = (self.start + self._product()).round_().to(self.integers.dtype)
            return moved.add_(self.integers).clamp_(0, self._top)
        return self.integers

    def _product(self) -> torch.Tensor:
        """Where low-rank places have gone from their start, (out, groups, group size)."""
        assert self.left is not None and self.right is not None
        return (self.left @ self.right).view_as(self.integers)

    def moved(self) -> int:
        """Integers that are not what they were."""
        if self.places is None and self.left is None:
            return 0
        with torch.no_grad():
            return int((self.healed_integers() != self.integers).sum())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            centred = self.healed_integers() - self.zeros
        places = self.places
        if self.left is not None:
            places = self._product()
        scales = self.healed_scales().to(inputs.dtype)
        output = _ScaledProduct.apply(inputs, centred, scales, places) + (0 if self.bias is None else self.bias)
        if pair := self.healed_adapter():
            down, up = (matrix.to(inputs.dtype) for matrix in pair)
            output = output + (inputs @ down.T) @ up.T
        return output


class _ScaledProduct(torch.autograd.Function):
    """x (…, in) · (scales ∘ integers)ᵀ. The weight is made anew on the way back rather than kept.

    `places` only stand for the integers' own gradient, which goes straight through their rounding.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor, places: Any) -> Any:
        ctx.save_for_backward(inputs, integers, scales)
        ctx.places = None if places is None else places.dtype
        return torch.nn.functional.linear(inputs, (integers * scales.unsqueeze(-1)).flatten(1))

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[Any, None, Any, Any]:
        inputs, integers, scales = ctx.saved_tensors
        weight = (integers * scales.unsqueeze(-1)).flatten(1)
        to_inputs = outer @ weight
        to_weight = (outer.flatten(0, -2).T @ inputs.flatten(0, -2)).view_as(integers)
        to_places = None
        if ctx.needs_input_grad[3]:
            to_places = (to_weight * scales.unsqueeze(-1)).to(ctx.places)
        to_scales = (to_weight.mul_(integers)).sum(-1, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        return to_inputs, None, None if to_scales is None else to_scales.to(scales.dtype), to_places


class _RoundedTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return value.to(dtype).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        return outer, None


def _through(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _RoundedTo.apply(value, dtype)


def learn_stored(module: torch.nn.Module, name: str, stored: torch.dtype) -> Trainable:
    """Let a parameter learn in float32. It is used as `stored` would hold it, in the dtype that it had."""
    value = getattr(module, name).detach()
    setattr(module, name, torch.nn.Parameter(value.float(), requires_grad=False))
    parametrize.register_parametrization(module, name, _Stored(stored, value.dtype), unsafe=True)
    original = getattr(module.parametrizations, name).original
    return Trainable(original.requires_grad_(True), rate=max(original.abs().mean().item(), 1e-3))


class _Stored(torch.nn.Module):
    def __init__(self, stored: torch.dtype, compute: torch.dtype):
        super().__init__()
        self._stored, self._compute = stored, compute

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return _through(value, self._stored).to(self._compute)


class Student:
    """The model that was quantized, with the quantized checkpoint's weights."""

    def __init__(self, checkpoint: Checkpoint, exact: Any, moves: Moves):
        """`exact` gives the architecture, and the weights that integers were rounded from."""
        self.model: Any = copy.deepcopy(exact)
        self.layers = read_quantized(Path(checkpoint.path))
        self._exact, self._stored = exact, getattr(torch, checkpoint.dtype)
        self.scaled: dict[str, ScaledLinear] = {}
        self._fill(read_tensors(Path(checkpoint.path)), moves)

    def _fill(self, stored: dict[str, torch.Tensor], moves: Moves) -> None:
        outside = {decoder.head_name(self.model), decoder.embedding_name(self.model)}
        if decoder.head_name(self.model) in self.layers:
            decoder.untie(self.model)
        for name, value in {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}.items():
            if name in stored:
                value.data.copy_(stored[name])
        for name, layer in self.layers.items():
            module = self.model.get_submodule(name)
            if name in outside:
                module.weight.data.copy_(layer.dequantize())
                continue
            scaled = ScaledLinear(layer, self._stored, module.weight.dtype, module.bias, moves).to(module.weight.device)
            self.scaled[name] = scaled
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, scaled)

    def trainables(self, train: list[str], rank: int, seed: int) -> Iterator[Trainable]:
        """What learns, of what the recipe names in `train`."""
        generator = torch.Generator().manual_seed(seed)
        for name, layer in self.scaled.items():
            if "scales" in train:
                yield Trainable(layer.change.requires_grad_(True))
            if "biases" in train and layer.bias is not None:
                yield learn_stored(layer, "bias", self._stored)
            if {"rounding", "low_rank"} & set(train):
                yield from layer.learn_places(self._exact.get_submodule(name).weight.data, rank, generator)
            if "adapter" in train:
                yield from layer.learn_adapter(rank, generator)
        if "norms" in train:
            for module in list(self.model.modules()):
                if type(module).__name__.lower().endswith("norm") and getattr(module, "weight", None) is not None:
                    yield learn_stored(module, "weight", self._stored)

    def healed_tensors(self) -> dict[str, torch.Tensor]:
        """What the checkpoint stores of everything that may have learnt, by its name in the file."""
        tensors = {}
        with torch.no_grad():
            for name, layer in self.scaled.items():
                tensors[f"{name}.weight_scale"] = layer.healed_scales()
                if layer.moved():
                    integers = layer.healed_integers().flatten(1).to(torch.uint8)
                    tensors[f"{name}.weight_packed"] = pack(integers.cpu(), self.layers[name].bits, dim=1)
            for name, module in self.model.named_modules():
                if parametrize.is_parametrized(module):
                    tensors |= {f"{name}.{key}": getattr(module, key) for key in module.parametrizations}
        return tensors

    def healed_adapter(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Layer → down (rank, in), up (out, rank), in the dtype of the checkpoint; empty where none has learnt."""
        pairs = {name: layer.healed_adapter() for name, layer in self.scaled.items()}
        return {name: (pair[0].to(self._stored), pair[1].to(self._stored)) for name, pair in pairs.items() if pair}

    def moved(self) -> int:
        """Integers that are not what they were."""
        return sum(layer.moved() for layer in self.scaled.values())
