"""Going through a decoder block by block, so that each sees what the quantized blocks before it hand on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pennyweight.errors import StageError
from pennyweight.quantization import decoder

if TYPE_CHECKING:
    import torch


@dataclass
class Block:
    """One decoder block, and the hidden states that reach it."""

    name: str
    module: Any
    states: list[torch.Tensor]
    """(windows, tokens, width), one for each batch."""
    keywords: dict[str, Any]
    """What the model hands to it beside them; the same for every batch."""

    def run(self) -> Iterator[torch.Tensor]:
        """Hidden states after the block, batch by batch."""
        import torch

        with torch.no_grad():
            for state in self.states:
                found = self.module(state, **self.keywords)
                yield found[0] if isinstance(found, tuple) else found

    def linears(self) -> dict[str, Any]:
        """Linear layers by their names in the model."""
        return {f"{self.name}.{name}": module for name, module in decoder.all_linears(self.module).items()}


def walk(model: Any, windows: torch.Tensor, batch: int, visit: Callable[[Block], None]) -> None:
    """Call `visit` for every block in order. What it changes in a block is in the states that reach the next.

    `windows` are token ids (windows, tokens), `batch` of them go through together.
    """
    name, blocks = decoder.blocks(model)
    batches = list(windows.split(batch))
    if len(batches) > 1 and len(batches[-1]) != batch:
        batches.pop()  # masks and positions are shared by all batches, so all must have one shape
    states, keywords = at_the_first_block(model, blocks, batches)
    for index, module in enumerate(blocks):
        block = Block(f"{name}.{index}", module, states, keywords[index])
        visit(block)
        states = list(block.run())


def at_the_first_block(
    model: Any, blocks: Any, batches: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Hidden states that reach the first block, batch by batch, and what the model hands to each block beside them.

    The model is run with blocks that hand on what they get, so this costs no more than the embedding. Raises StageError
    where blocks hand on more than hidden states, as some older architectures' do.
    """
    import torch

    states: list[torch.Tensor] = []
    keywords: list[dict[str, Any]] = [{} for _ in blocks]

    def hand_on(index: int) -> Callable[..., torch.Tensor]:
        def forward(hidden_states: torch.Tensor, *_: Any, **named: Any) -> torch.Tensor:
            if index == 0:
                states.append(hidden_states)
            elif hidden_states.shape != states[-1].shape:
                raise StageError(
                    f"{type(model).__name__} hands on more than hidden states, and cannot be gone through by block"
                )
            keywords[index] = named
            return hidden_states

        return forward

    with acting(blocks, hand_on), torch.no_grad():
        for ids in batches:
            model.base_model(ids, use_cache=False)
    return states, keywords


@contextmanager
def acting(blocks: Any, forward_of: Callable[[int], Callable[..., torch.Tensor]]) -> Iterator[None]:
    """Within the block, each of a model's blocks does what `forward_of(its number)` does."""
    kept = [block.forward for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = forward_of(index)
        yield
    finally:
        for block, forward in zip(blocks, kept):
            block.forward = forward


@contextmanager
def input_moments(layers: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
    """Σ x xᵀ over the tokens that pass through each layer meanwhile, float32 (in, in).

    Layers that read one tensor, such as q, k and v, share one matrix: the same object under each of their names.
    """
    moments: dict[str, torch.Tensor] = {}
    leader: dict[str, str] = {}
    latest: list[Any] = [None, ""]  # layers that share an input are called one after the other

    def hook(name: str) -> Callable[..., None]:
        def add(_: Any, positional: tuple[Any, ...]) -> None:
            inputs = positional[0]
            if latest[0] is not inputs:
                latest[:] = inputs, name
            if leader.setdefault(name, latest[1]) != name:
                return
            flat = inputs.detach().flatten(0, -2).float()
            if name not in moments:
                moments[name] = flat.T @ flat
            else:
                moments[name].addmm_(flat.T, flat)

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
        latest.clear()
    moments |= {name: moments[first] for name, first in leader.items()}
