"""The trunk: the first blocks, where a student and its teacher are one, so that one pass does for both."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pennyweight import checkpoints
from pennyweight.quantization import decoder
from pennyweight.quantization.walk import acting


def shared_blocks(teacher: Path, student: Path) -> int:
    """Blocks, from the first on, whose tensors are the same in both checkpoints, but the student's last. 0 where the
    embeddings differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student))
    name, blocks = decoder.blocks(model)
    of_block = re.compile(rf"{re.escape(name)}\.(\d+)\.")
    theirs, ours = checkpoints.read_tensors(teacher), checkpoints.read_tensors(student)
    differing = {key for key, value in ours.items() if key not in theirs or not torch.equal(theirs[key], value)}
    if f"{decoder.embedding_name(model)}.weight" in differing:
        return 0
    return min((int(found[1]) for key in differing if (found := of_block.match(key))), default=len(blocks) - 1)


def freeze(student: Any, shared: int) -> None:
    """Let nothing but the blocks after the first `shared` ones learn."""
    student.requires_grad_(False)
    decoder.blocks(student)[1][shared:].requires_grad_(True)


@contextmanager
def beginning_with(states: torch.Tensor | None, blocks: list[Any]) -> Iterator[None]:
    """Within the context, `blocks`, a model's first, hand on `states` (windows, tokens, width), whatever reaches them;
    where that is None, what they compute."""

    def hand_on(index: int) -> Callable[..., torch.Tensor]:
        return lambda hidden_states, *_, **__: states.to(hidden_states.dtype)

    with acting(blocks if states is not None else [], hand_on):
        yield


@contextmanager
def overheard(block: Any) -> Iterator[list[torch.Tensor]]:
    """The hidden states that reach a block meanwhile, one for each pass."""
    heard: list[torch.Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, positional: heard.append(positional[0]))
    try:
        yield heard
    finally:
        handle.remove()
