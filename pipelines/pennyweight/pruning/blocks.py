"""Whether a model's blocks can lose what a step takes out, found on one that takes no memory for its weights."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from pennyweight.errors import StageError
from pennyweight.pruning.config import cut_config, head_dim, parse, text_model, whole
from pennyweight.recipe import Prune

Kind = frozenset[tuple[str, tuple[int, ...]]]
"""A block's tensors: names and shapes."""


def check(config: dict[str, Any], step: Prune) -> None:
    """Raise ValueError, with a message for the recipe's author, where the blocks of a model are not put together in a
    way that `step` can cut."""
    text = json.dumps(config)
    if (step.ffn or step.kv_groups) and (reason := _too_whole(text, bool(step.ffn), bool(step.kv_groups))):
        raise ValueError(reason)
    if step.drop:
        check_order(config, step.drop)
    elif step.layers:
        kinds = _kinds(text)
        firsts = sorted({kinds.index(kind) for kind in kinds})
        for first in firsts if len(firsts) > 1 else ():
            check_order(config, [first])


def check_order(config: dict[str, Any], removed: list[int]) -> None:
    """Raise ValueError where a block that stays would be of another kind under its new number: some architectures go by
    numbers, such as DeepSeek's, whose first blocks have no experts."""
    before = _kinds(json.dumps(config))
    after = _kinds(json.dumps(cut_config(config, removed)))
    kept = [block for block in range(len(before)) if block not in removed]
    for number, block in enumerate(kept):
        if before[block] != after[number]:
            raise ValueError(
                f"without block {removed[0]}, block {block} becomes number {number}, which is put together in another "
                "way in this architecture; take out other blocks, by name, with `drop`"
            )


@lru_cache(maxsize=64)
def _too_whole(config: str, ffn: bool, kv_groups: bool) -> str | None:
    """Why the blocks of a model, its config as JSON, cannot be made narrower."""
    from pennyweight.pruning import parts

    known = text_model(json.loads(config))
    channels = whole(known, "intermediate_size", "ffn") if ffn else None
    try:
        parts.check(_weightless(config), channels, head_dim(known) if kv_groups else None)
    except StageError as error:
        return f"{error.message}; {error.hint}"
    return None


@lru_cache(maxsize=64)
def _kinds(config: str) -> list[Kind]:
    """Of each block of a model, its config as JSON."""
    from pennyweight.quantization import decoder

    blocks = decoder.blocks(_weightless(config))[1]
    return [frozenset((name, tuple(value.shape)) for name, value in block.named_parameters()) for block in blocks]


def _weightless(config: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(parse(json.loads(config)))
