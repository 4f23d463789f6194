"""What a teacher says to each token of a text, computed once: its most probable tokens, and draws from the others.

A cache is a folder of shards of some windows each. A shard is complete once it is there, so a killed run goes on after
the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pennyweight.distillation.losses import Sampled, TopK, spans
from pennyweight.recipe import TeacherCache

VERSION = 1
#: Windows in a shard.
SHARD = 32
HELD_OUT = "held-out.npy"
#: Below this a log-probability in nats counts for nothing, and float16 still holds it.
LEAST = -60.0


def write(
    teacher: Any,
    windows: torch.Tensor,
    held_out: torch.Tensor,
    settings: TeacherCache,
    temperature: float,
    seed: int,
    folder: Path,
    report: Callable[[str, float], None] = lambda detail, done: None,
) -> None:
    """Fill `folder` with what `teacher` says to `windows`, token ids (windows, tokens), and with its hidden states on
    `held_out`. Shards that are there whole stay as they are."""
    if not is_whole(folder / HELD_OUT, held_out.numel()):
        states = torch.cat([last_states(teacher, ids) for ids in held_out.split(4)])
        save(folder / HELD_OUT, states.float().cpu().numpy().astype(np.float32))
    shards = windows.split(SHARD)
    for number, shard in enumerate(shards):
        report("what the teacher says", number / len(shards))
        if is_whole(shard_path(folder, number), len(shard)):
            continue
        generator = torch.Generator(windows.device).manual_seed(seed * 1_000_003 + number)
        rows = [_say(teacher, ids, settings, temperature, generator) for ids in shard.split(4)]
        save(shard_path(folder, number), np.concatenate(rows))


class Cached:
    """A folder that `write` filled."""

    def __init__(self, folder: Path, settings: TeacherCache, device: Any):
        self._settings, self._device = settings, device
        self._shards = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("shard-*.npy"))]
        self.held_out = torch.from_numpy(np.load(folder / HELD_OUT))

    def target(self, indices: list[int], chosen: torch.Tensor | None = None) -> TopK | Sampled:
        """What the teacher says to the windows of these numbers, one position after the other. Of the `chosen` alone,
        bool, where given."""
        rows = np.stack([self._shards[index // SHARD][index % SHARD] for index in indices])
        words = torch.from_numpy(rows.view(np.uint8)).to(self._device).flatten(0, 1)
        words = select(words, chosen)
        settings, wide = self._settings, np.dtype(rows.dtype).itemsize
        k, exact = settings.k, settings.exact
        ids = _numbers(words[:, : k * wide].contiguous(), wide)
        held = words[:, k * wide :].contiguous().view(torch.float16)[:, : exact + 1].float()
        said = torch.log_softmax(held, -1)  # float16 has rounded the sum away from 1
        if settings.cache == "top_k":
            return TopK(ids, said)
        probable = said.exp()
        return Sampled(ids, torch.cat([probable[:, :-1], probable[:, -1:].expand(-1, k - exact) / (k - exact)], -1))


def _numbers(words: torch.Tensor, wide: int) -> torch.Tensor:
    """Unsigned integers of 2 or 4 bytes as int64."""
    return words.view(torch.uint16 if wide == 2 else torch.int32).long()


def _say(
    teacher: Any, ids: torch.Tensor, settings: TeacherCache, temperature: float, generator: torch.Generator
) -> np.ndarray:
    """What a batch's rows of a shard hold, (windows, tokens, words)."""
    head = teacher.get_output_embeddings().weight
    states = last_states(teacher, ids)
    number = np.uint16 if len(head) <= 2**16 else np.uint32
    rows = []
    for span in spans(len(states), len(head)):
        said = torch.log_softmax((states[span] @ head.T).float() / temperature, -1)
        rows.append(_row(said, settings, generator, number))
    return np.concatenate(rows).reshape(*ids.shape, -1)


def _row(said: torch.Tensor, settings: TeacherCache, generator: torch.Generator, number: Any) -> np.ndarray:
    """Of log-probabilities (positions, vocabulary): the most probable tokens, the draws from the others, and the
    log-probabilities of the former and of all others together."""
    values, ids = said.topk(settings.exact)
    others = said.exp().scatter_(-1, ids, 0.0)
    rest = others.sum(-1, keepdim=True)
    if draws := settings.k - settings.exact:
        sums = others.cumsum(-1)
        places = torch.rand(len(said), draws, generator=generator, device=said.device) * sums[:, -1:]
        drawn = torch.searchsorted(sums, places, right=True).clamp_(max=said.shape[1] - 1)
        ids = torch.cat([ids, drawn], -1)
    held = torch.cat([values, rest.log()], -1).clamp_(min=LEAST).cpu().numpy().astype(np.float16)
    named = ids.cpu().numpy().astype(number)
    words = math.ceil(held.nbytes / len(held) / named.itemsize)
    padded = np.zeros((len(held), words * named.itemsize // 2), np.float16)
    padded[:, : held.shape[1]] = held
    return np.concatenate([named, padded.view(number)], -1)


def last_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the head is applied to, (windows × tokens, width)."""
    return model.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)


def select(values: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    """The rows of the chosen positions; all where it is None."""
    return values if chosen is None else values[chosen]


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.npy"


def is_whole(path: Path, rows: int) -> bool:
    """Whether an array of so many rows is there. A machine that went down can leave a file with less in it."""
    try:
        return len(np.load(path, mmap_mode="r")) == rows
    except (OSError, ValueError, EOFError):
        return False


def save(path: Path, values: np.ndarray) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.save(stream, values)
    partial.replace(path)
