"""How much a model loses with its blocks, one after the other: cheap, before any recipe is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from pennyweight import checkpoints
from pennyweight.columns import columns, spans
from pennyweight.errors import UsageError
from pennyweight.memory import out_of_memory_of, reused_memory
from pennyweight.pruning.config import layer_count, text_model
from pennyweight.quantization import decoder
from pennyweight.records import Checkpoint, Record

if TYPE_CHECKING:
    from pennyweight.pruning.trials import Removed


class Point(Record):
    removed: list[int] = Field(description="blocks taken out, by their numbers")
    parameters: int = Field(description="that stay")
    kl: float = Field(description="nats per token from the whole model")


class Scan(Record):
    """KL against blocks taken out, by both measures."""

    checkpoint: str
    text: str
    tokens: int
    layers: int
    parameters: int
    influence: list[float] = Field(description="of each block")
    by_kl: list[Point]
    by_influence: list[Point]
    seconds: float


def check(checkpoint: Checkpoint, most: int, length: int) -> None:
    """Raise UsageError where `most` blocks leave none, or where the model knows fewer than `length` positions."""
    config = checkpoints.read_config(Path(checkpoint.path))
    try:
        count, context = layer_count(config), getattr(text_model(config), "max_position_embeddings", None)
    except ValueError as error:
        raise UsageError(f"{checkpoint.origin}: {error}") from None
    if most >= count:
        hint = f"--layers {count - 1} at most" if count > 1 else "it has no other"
        raise UsageError(f"--layers {most}: {most} of {count} blocks leave none", hint)
    if context and length > context:
        raise UsageError(f"--length {length}: the model knows {context} positions", f"--length {context} at most")


def scan(
    checkpoint: Checkpoint,
    text: str,
    windows: np.ndarray,
    most: int,
    report: Callable[[str, float], None],
    device: str = "cpu",
) -> Scan:
    """Take out 1, 2, … `most` blocks on token ids (windows, tokens): greedily by KL, and by influence.

    The KL is that on the windows chosen on, which is a little kinder to the greedy choice than other text is. Raises
    what `check` raises.
    """
    import torch

    from pennyweight.pruning import depth
    from pennyweight.pruning.trials import Trials, batch_of

    begin = time.monotonic()
    check(checkpoint, most, windows.shape[1])
    with out_of_memory_of("prune-scan", "lower --windows or --length"), reused_memory():
        model = decoder.load(checkpoint, device)
        ids = torch.from_numpy(windows).to(device)
        trials = Trials(model, ids, batch_of(ids))
        greedy = depth.by_divergence(trials, most, report, beam=1, exchange=False)
        plain = [depth.least_influential(trials, number) for number in range(1, most + 1)]
        sizes = [sum(value.numel() for value in block.parameters()) for block in trials.blocks]
        whole = sum(value.numel() for value in model.parameters())

        def point(removed: Removed) -> Point:
            left = whole - sum(sizes[block] for block in removed)
            return Point(removed=sorted(removed), parameters=left, kl=trials.kl(removed))

        return Scan(
            checkpoint=checkpoint.origin,
            text=text,
            tokens=windows.size,
            layers=len(sizes),
            parameters=whole,
            influence=trials.influence(),
            by_kl=[point(choice.removed) for choice in greedy],
            by_influence=[point(removed) for removed in plain],
            seconds=time.monotonic() - begin,
        )


def format_scan(found: Scan) -> str:
    """A line and a bar for each number of blocks."""
    rows = [("removed", "parameters left", "greedily", "KL", "by influence", "KL")]
    top = max(point.kl for point in found.by_kl)
    bars = [""]
    for ours, theirs in zip(found.by_kl, found.by_influence):
        count, share = len(ours.removed), ours.parameters / found.parameters
        kls = [(spans(point.removed), f"{point.kl:.4f}") for point in (ours, theirs)]
        rows.append((f"{count} of {found.layers}", f"{share:.0%}", *kls[0], *kls[1]))
        bars.append("█" * max(1, round(30 * ours.kl / top)) if top > 0 else "")
    table = [f"{line}  {bar}".rstrip() for line, bar in zip(columns(rows), bars)]
    where = f"KL from the whole model in nats per token, on {found.tokens:,} tokens of {found.text}, chosen on the same"
    return "\n".join([*table, f"{where}; nothing is fitted or healed"])
