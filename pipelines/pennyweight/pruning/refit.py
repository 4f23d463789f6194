"""Fitting what stays of a decoder to the hidden states of the whole one, by least squares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from pennyweight.quantization.walk import Block

#: Ridges that are tried, as fractions of the moment's mean diagonal.
RIDGES = (1.0, 0.1, 0.01, 0.001)


def refit(block: Block, down: Any, goal: list[torch.Tensor], held_out: int) -> bool:
    """Change `down` so that the block hands on what comes nearest to `goal`, batch by batch (windows, tokens, width).

    Every token's error counts relative to its state's size, as the norms after it see it. The ridge is the one whose
    error on the last `held_out` batches is smallest. Returns False, with nothing changed, where none makes it smaller,
    or where the block does more to what `down` gives than to add it. With the whole block's own states as the goal this
    is He et al. (2017), Channel pruning, eq. 2; with those after blocks that were taken out, near Shopkhoev et al.
    (2025), ReplaceMe, who fit a linear map in their place.
    """
    if not _adds(block, down):
        return False
    fitted, checked = Moments(down), Moments(down)
    for index, ((inputs, outputs), expected) in enumerate(zip(inputs_and_outputs(block, down), goal)):
        moments = fitted if index < len(goal) - held_out else checked
        moments.add(inputs.flatten(0, -2), outputs.flatten(0, -2), expected.flatten(0, -2))
    changes = [fitted.change(ridge) for ridge in RIDGES]
    gains = [checked.gain(change) for change in changes]
    best = max(range(len(gains)), key=gains.__getitem__)
    if gains[best] <= 0:
        return False
    down.weight.data = (down.weight.float() + changes[best]).to(down.weight.dtype)
    return True


class Moments:
    """Σ w x xᵀ and Σ w e xᵀ of inputs x and errors e of what comes out, tokens weighed by w = 1 / ‖expected‖²."""

    def __init__(self, down: Any):
        like = {"dtype": torch.float32, "device": down.weight.device}
        self._inputs = torch.zeros(down.in_features, down.in_features, **like)
        self._errors = torch.zeros(down.out_features, down.in_features, **like)

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor, expected: torch.Tensor) -> None:
        """All are (tokens, …)."""
        inputs, expected = inputs.float(), expected.float()
        weighed = inputs / expected.square().sum(-1, keepdim=True).clamp(min=1e-12)
        self._inputs.addmm_(weighed.T, inputs)
        self._errors.addmm_((expected - outputs.float()).T, weighed)

    def change(self, ridge: float) -> torch.Tensor:
        """The change D of the weight, (out, in), with the smallest Σ w ‖e − D x‖² + λ‖D‖²."""
        damped = self._inputs.clone()
        damped.diagonal().add_(ridge * self._inputs.diagonal().mean())
        return torch.cholesky_solve(self._errors.T, torch.linalg.cholesky(damped)).T

    def gain(self, change: torch.Tensor) -> float:
        """By how much a change makes Σ w ‖e − D x‖² smaller."""
        return (2 * (change * self._errors).sum() - (change @ self._inputs * change).sum()).item()


def inputs_and_outputs(block: Block, layer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What reaches `layer` in the block, and what the block hands on, batch by batch."""
    latest: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, positional: latest.append(positional[0]))
    try:
        for outputs in block.run():
            yield latest.pop(), outputs
    finally:
        handle.remove()


def _adds(block: Block, down: Any) -> bool:
    """Whether the block only adds what `down` gives, found by taking it away on some tokens."""
    some = Block(block.name, block.module, block.states[:1], block.keywords)
    weight = down.weight.data
    inputs, whole = next(iter(inputs_and_outputs(some, down)))
    given = torch.nn.functional.linear(inputs, weight)
    try:
        down.weight.data = torch.zeros_like(weight)
        without = next(iter(some.run()))
    finally:
        down.weight.data = weight
    off = (whole.float() - without.float() - given.float()).norm() / given.float().norm().clamp(min=1e-12)
    return off.item() < 0.05
