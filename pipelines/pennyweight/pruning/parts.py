"""The parts of a decoder block that can be made narrower, found by their roles and shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pennyweight.errors import StageError
from pennyweight.quantization import decoder


@dataclass(frozen=True)
class FeedForward:
    """y = down(act(gate(x)) · up(x)), or without a gate."""

    inward: list[Any]
    """gate and up, (channels, width)."""
    down: Any
    """(width, channels)"""

    def keep(self, channels: torch.Tensor, weight: torch.Tensor) -> None:
        """Leave those channels alone, with `weight` (width, kept) for down."""
        for linear in self.inward:
            keep_outputs(linear, channels)
        set_weight(self.down, weight)


@dataclass(frozen=True)
class Attention:
    """Grouped attention: query heads i · n … share key/value head i."""

    query: Any
    key: Any
    value: Any
    output: Any
    head_dim: int

    @property
    def groups(self) -> int:
        return self.key.out_features // self.head_dim

    @property
    def together(self) -> int:
        """Inputs of `output` that belong to one key/value head."""
        return self.output.in_features // self.groups

    def keep(self, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        """Leave the heads alone whose inputs of `output` are these, with `weight` (width, kept) for it."""
        groups = inputs.view(-1, self.together)[:, 0] // self.together
        own = (groups[:, None] * self.head_dim + torch.arange(self.head_dim, device=groups.device)).flatten()
        keep_outputs(self.query, inputs)
        keep_outputs(self.key, own)
        keep_outputs(self.value, own)
        set_weight(self.output, weight)


def feed_forward(block: Any, channels: int) -> FeedForward:
    """The block's linear layers that have `channels` on one side. Raises StageError where they are no such net."""
    linears = decoder.all_linears(block)
    attention = {id(part) for name, part in linears.items() if name.rpartition(".")[2] in _ATTENTION}
    rest = [part for part in linears.values() if id(part) not in attention]
    inward = [part for part in rest if part.out_features == channels]
    down = [part for part in rest if part.in_features == channels]
    if len(down) != 1 or len(inward) not in (1, 2) or len(rest) != len(inward) + 1:
        has = "experts" if any("expert" in name for name, _ in block.named_modules()) else _layers(block)
        raise StageError(
            f"ffn: {type(block).__name__} has {has}, and no feed-forward net of {channels} channels that can be cut",
            "leave `ffn` out: experts and merged projections stay whole, `layers` takes out blocks",
        )
    return FeedForward(inward, down[0])


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def attention(block: Any, head_dim: int) -> Attention:
    """The block's attention. Raises StageError where its projections are merged, or hold more than heads."""
    named = {name.rpartition(".")[2]: (name, part) for name, part in decoder.all_linears(block).items()}
    hint = "leave `kv_groups` out: merged and compressed heads stay whole, `layers` takes out blocks"
    if missing := [name for name in _ATTENTION if name not in named]:
        raise StageError(f"kv_groups: {type(block).__name__} has {_layers(block)}, and no {missing[0]}", hint)
    query, key, value, output = (named[name][1] for name in _ATTENTION)
    owner = block.get_submodule(named["q_proj"][0].rpartition(".")[0])
    inside = {id(p) for linear in (query, key, value, output) for p in linear.parameters()}
    others = [p for p in owner.parameters() if id(p) not in inside]
    plain = query.out_features == output.in_features and key.out_features == value.out_features
    if not plain or any(p.numel() != head_dim for p in others):
        raise StageError(f"kv_groups: {type(owner).__name__} holds more than heads of {head_dim}", hint)
    return Attention(query, key, value, output, head_dim)


def check(model: Any, channels: int | None, head_dim: int | None) -> None:
    """Raise StageError where a block has no feed-forward net of `channels`, or no heads of `head_dim`, to cut; None: it
    need not. The model may be one without memory for its weights."""
    for block in decoder.blocks(model)[1]:
        if channels is not None:
            feed_forward(block, channels)
        if head_dim is not None:
            attention(block, head_dim)


def _layers(block: Any) -> str:
    names = [name.rpartition(".")[2] for name in decoder.all_linears(block)]
    return f"the linear layers {', '.join(dict.fromkeys(names))}" if names else "no linear layers"


def keep_outputs(linear: Any, kept: torch.Tensor) -> None:
    linear.weight.data = linear.weight.data[kept].contiguous()
    if linear.bias is not None:
        linear.bias.data = linear.bias.data[kept].contiguous()
    linear.out_features = len(kept)


def set_weight(linear: Any, weight: torch.Tensor) -> None:
    """Give the layer a weight for fewer inputs."""
    linear.weight.data = weight.to(linear.weight.dtype).contiguous()
    linear.in_features = weight.shape[1]


def last_linear(block: Any) -> Any | None:
    """The last linear layer of a block, which in a decoder gives what its feed-forward net adds; None: it has none."""
    return next(reversed(decoder.all_linears(block).values()), None)
