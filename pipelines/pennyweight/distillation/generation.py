"""Text that the teacher writes itself: it goes on from the beginnings of another text's windows.

Learning from it is sequence-level distillation (Kim and Rush, 2016). Shards are complete once they are there, as the
cache's are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pennyweight.distillation.cache import is_whole, save, shard_path
from pennyweight.recipe import Generate

VERSION = 1
#: Windows that are written together, a shard.
SHARD = 16


def write(
    teacher: Any,
    windows: torch.Tensor,
    settings: Generate,
    seed: int,
    folder: Path,
    report: Callable[[str, float], None] = lambda detail, done: None,
) -> None:
    """Fill `folder` with windows as long as `windows`, token ids (windows, tokens), each beginning with the same
    `prompt` tokens and drawn from `teacher` from there on. An end of a text is followed by what the teacher begins
    next, as in packed text."""
    shards, new = windows.split(SHARD), windows.shape[1] - settings.prompt
    for number, shard in enumerate(shards):
        report("the teacher writes", number / len(shards))
        path = shard_path(folder, number)
        if is_whole(path, len(shard)):
            continue
        prompts = shard[:, : settings.prompt]
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed * 1_000_003 + number)
            said = teacher.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=settings.temperature,
                top_k=0, top_p=1.0, min_new_tokens=new, max_new_tokens=new, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        save(path, said.cpu().numpy())


def read(folder: Path) -> np.ndarray:
    """The windows of a folder that `write` filled, int64 (windows, tokens)."""
    return np.concatenate([np.load(path) for path in sorted(folder.glob("shard-*.npy"))])
