"""Which blocks to take out: by their influence alone, or by a search that measures what goes with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pennyweight.pruning.config import BEAM, SEARCHED, SURVIVORS
from pennyweight.pruning.trials import Removed, Trials, batch_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Choice:
    """Blocks taken out together, and KL from the whole model on the windows that they were chosen on."""

    removed: Removed
    kl: float


def choose(
    model: Any, text: torch.Tensor, count: int, measure: str, report: Callable[[str, float], None]
) -> list[Choice]:
    """Choices of 1, 2, … `count` blocks, made on the first windows of `text`, token ids (windows, tokens)."""
    searched = text[:SEARCHED]
    trials = Trials(model, searched, batch_of(searched))
    if measure == "kl":
        return by_divergence(trials, count, report)
    chosen = [least_influential(trials, number) for number in range(1, count + 1)]
    return [Choice(removed, trials.kl(removed)) for removed in chosen]


def least_influential(trials: Trials, count: int) -> Removed:
    """The `count` blocks of least influence."""
    influence = trials.influence()
    return frozenset(sorted(range(len(influence)), key=influence.__getitem__)[:count])


def by_divergence(
    trials: Trials,
    count: int,
    report: Callable[[str, float], None],
    beam: int = BEAM,
    exchange: bool = True,
) -> list[Choice]:
    """The best choices of 1, 2, … `count` blocks that a search finds.

    Block by block, with the `beam` best choices carried on; then the last is improved by exchanging one block at a
    time, until nothing gets better.
    """
    found: list[Choice] = []
    carried: list[Removed] = [frozenset()]
    for number in range(1, count + 1):
        wider = {
            removed | {block} for removed in carried for block in range(len(trials.blocks)) if block not in removed
        }
        ranked = race(trials, list(wider), beam)
        carried = [choice.removed for choice in ranked]
        found.append(ranked[0])
        report(f"{number} of {count} blocks, KL {ranked[0].kl:.3f}", number / (count + 1))
    if exchange:
        found[-1] = exchanged(trials, found[-1])
    return found


def exchanged(trials: Trials, choice: Choice) -> Choice:
    """The choice after each exchange of a removed block for a kept one that makes it better, the best first."""
    while True:
        kept = [block for block in range(len(trials.blocks)) if block not in choice.removed]
        others = [choice.removed - {out} | {block} for out in choice.removed for block in kept]
        best = race(trials, others, 1)[0]
        if best.kl >= choice.kl:
            return choice
        choice = best


def race(trials: Trials, entries: list[Removed], count: int) -> list[Choice]:
    """The `count` best entries, best first, with their KL on all windows.

    All run on one batch; the best go on to twice as many, and so on, until all batches are used (successive halving:
    Jamieson and Talwalkar, 2016).
    """
    batches, left = 1, entries
    while True:
        measured = [Choice(e, found.mean().item()) for e, found in zip(left, trials.of(left, batches))]
        measured.sort(key=lambda choice: (choice.kl, sorted(choice.removed)))
        if batches == trials.batches:
            return measured[:count]
        left = [choice.removed for choice in measured[: max(count, -(-len(measured) // SURVIVORS))]]
        batches = min(2 * batches, trials.batches)
