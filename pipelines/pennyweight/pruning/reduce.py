"""Taking parts out of a loaded decoder, block by block, and fitting what stays to what the whole one did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pennyweight.pruning import parts
from pennyweight.pruning.columns import without_inputs
from pennyweight.pruning.refit import refit
from pennyweight.pruning.trials import Removed, batch_of
from pennyweight.quantization import decoder
from pennyweight.quantization.walk import Block, at_the_first_block, input_moments

#: One batch in so many decides how far a refit goes, and is not fitted to.
CHECKED = 8


@dataclass(frozen=True)
class Cut:
    """What to take out of a decoder."""

    removed: Removed = frozenset()
    channels: int | None = None
    """Feed-forward channels that stay, of how many, where some go."""
    kept_channels: int = 0
    kept_groups: int = 0
    head_dim: int = 0
    refit: bool = True


def reduce(model: Any, cut: Cut, windows: torch.Tensor, report: Callable[[str, float], None]) -> int:
    """Make the narrower and fitted blocks of `cut` in place, on token ids (windows, tokens); blocks that are to go stay
    for `drop_blocks`. Returns how many blocks were refitted.

    Two streams of hidden states go through the text: the whole model's, and that of what stays, which sees its own
    errors. A block is fitted to the whole model's states at the next block that stays; the first that is fitted comes
    before the first that goes.
    """
    narrows = bool(cut.kept_groups or cut.kept_channels)
    if not (narrows or cut.refit):
        return 0
    name, blocks = decoder.blocks(model)
    batch = min(batch_of(windows), max(1, len(windows) // CHECKED))
    ids = [part for part in windows.split(batch) if len(part) == batch]
    states, keywords = at_the_first_block(model, blocks, ids)
    goal, reached, refitted = states, 0, 0
    kept = [index for index in range(len(blocks)) if index not in cut.removed]
    for number, index in enumerate(kept):
        following = kept[number + 1] if number + 1 < len(kept) else len(blocks)
        if states is goal and following == index + 1 and not narrows:
            # Nothing has gone yet: both streams are one, and there is no error to fit to.
            states = goal = list(Block(name, blocks[index], goal, keywords[index]).run())
            reached = following
            continue
        for other in range(reached, following):
            goal = list(Block(name, blocks[other], goal, keywords[other]).run())
        reached = following
        block = Block(f"{name}.{index}", blocks[index], states, keywords[index])
        if cut.kept_groups:
            _fewer_groups(block, cut)
        if cut.kept_channels:
            _fewer_channels(block, cut)
        if cut.refit and (down := parts.last_linear(block.module)) is not None:
            refitted += refit(block, down, goal, -(-len(ids) // CHECKED))
        states = list(block.run())
        report(f"block {index}", (number + 1) / len(kept))
    return refitted


def become(model: Any, removed: Removed, before: Any, after: Any) -> None:
    """Take blocks out of the list, number those that stay anew, as loading the checkpoint will, and let the model have
    what is other in the config `after` than `before`."""
    name, blocks = decoder.blocks(model)
    kept = [block for index, block in enumerate(blocks) if index not in removed]
    for index, block in enumerate(kept):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, torch.nn.ModuleList(kept))
    known = model.config.get_text_config()
    for key, value in after.to_dict().items():
        if before.to_dict().get(key) != value:
            setattr(known, key, value)


def _fewer_groups(block: Block, cut: Cut) -> None:
    attention = parts.attention(block.module, cut.head_dim)
    moment = _moment(block, attention.output)
    attention.keep(*without_inputs(attention.output.weight, moment, cut.kept_groups, attention.together))


def _fewer_channels(block: Block, cut: Cut) -> None:
    assert cut.channels
    net = parts.feed_forward(block.module, cut.channels)
    net.keep(*without_inputs(net.down.weight, _moment(block, net.down), cut.kept_channels))


def _moment(block: Block, layer: Any) -> torch.Tensor:
    """Σ x xᵀ of what reaches `layer`, float32 (in, in)."""
    with input_moments({"layer": layer}) as moments:
        for _ in block.run():
            pass
    return moments["layer"]
