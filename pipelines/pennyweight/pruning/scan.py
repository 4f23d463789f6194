"""How much a model loses with its blocks, one after the other: cheap, before any recipe is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import Field

from pennyweight import checkpoints
from pennyweight.columns import columns
from pennyweight.errors import StageError
from pennyweight.pruning.config import layer_count
from pennyweight.quantization import decoder
from pennyweight.records import Checkpoint, Record


class Point(Record):
    removed: list[int] = Field(description="blocks taken out, by their numbers")
    kl: float = Field(description="nats per token from the whole model")


class Scan(Record):
    """KL against blocks taken out, by both measures."""

    checkpoint: str
    text: str
    tokens: int
    layers: int
    influence: list[float] = Field(description="of each block")
    by_kl: list[Point]
    by_influence: list[Point]
    seconds: float


def scan(
    checkpoint: Checkpoint, text: str, windows: np.ndarray, most: int, report: Callable[[str, float], None]
) -> Scan:
    """Take out 1, 2, … `most` blocks on token ids (windows, tokens): greedily by KL, and by influence.

    The KL is that on the windows chosen on, which is a little kinder to the greedy choice than other text is.
    """
    import torch

    from pennyweight.pruning import depth
    from pennyweight.pruning.trials import Trials, batch_of

    begin, count = time.monotonic(), layer_count(checkpoints.read_config(Path(checkpoint.path)))
    if most >= count:
        raise StageError(f"{most} of {count} blocks leave none", f"--layers {count - 1} at most")
    model = decoder.load(checkpoint, "cpu")
    ids = torch.from_numpy(windows)
    trials = Trials(model, ids, batch_of(ids))
    greedy = depth.by_divergence(trials, most, report, beam=1, exchange=False)
    plain = [depth.least_influential(trials, number) for number in range(1, most + 1)]
    return Scan(
        checkpoint=checkpoint.origin,
        text=text,
        tokens=windows.size,
        layers=count,
        influence=trials.influence(),
        by_kl=[Point(removed=sorted(choice.removed), kl=choice.kl) for choice in greedy],
        by_influence=[Point(removed=sorted(removed), kl=trials.kl(removed)) for removed in plain],
        seconds=time.monotonic() - begin,
    )


def format_scan(found: Scan) -> str:
    rows = [("removed", "layers", "KL", "by influence", "")]
    top = max(point.kl for point in found.by_kl)
    for ours, theirs in zip(found.by_kl, found.by_influence):
        bar = "█" * max(1, round(30 * ours.kl / top)) if top > 0 else ""
        named = ", ".join(map(str, ours.removed))
        rows.append((f"{len(ours.removed)} of {found.layers}", named, f"{ours.kl:.4f}", f"{theirs.kl:.4f}", bar))
    table = columns([row[:4] for row in rows], left=2)
    lines = [f"{line}  {row[4]}".rstrip() for line, row in zip(table, rows)]
    return "\n".join([*lines, f"nats per token, on {found.tokens:,} tokens of {found.text}"])
