"""The multiple-choice knapsack problem, solved exactly: one choice for each item, least loss within a budget.

Dynamic programming over undominated partial solutions (Nemhauser and Ullmann, 1969), each bounded from below by the
linear relaxation of what is left (Sinha and Zoltners, 1979) and dropped where that cannot beat the best solution known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

#: A bound must be worse than the best solution by this fraction to be trusted over floating-point sums.
SLACK = 1e-9


#: Losses and costs of one item's choices.
Item = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Step:
    """From one choice of an item to the next better one."""

    gain: float
    """Loss saved for each unit of cost."""
    item: int
    before: int
    after: int


@dataclass(frozen=True)
class Relaxation:
    """Least loss of some items for each budget, if choices could be mixed: a convex, piecewise linear function."""

    budgets: np.ndarray
    losses: np.ndarray

    def __call__(self, budget: np.ndarray) -> np.ndarray:
        """Infinite where even the smallest choices do not fit."""
        return np.where(budget < self.budgets[0], np.inf, np.interp(budget, self.budgets, self.losses))


def solve(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Number of the choice for each item, so that Σ loss is least and Σ cost ≤ budget.

    Raises ValueError if no choice of all items fits.
    """
    items = [(np.asarray(loss, float), np.asarray(cost, np.int64)) for loss, cost in zip(losses, costs, strict=True)]
    if sum(int(cost.min()) for _, cost in items) > budget:
        raise ValueError(f"nothing fits into {budget}: {sum(int(cost.min()) for _, cost in items)} is the least")
    hulls = [_hull(loss, cost) for loss, cost in items]
    steps = _steps(items, hulls)
    rest = [_relax(items, hulls, steps, first) for first in range(len(items) + 1)]
    best = _greedy(items, hulls, steps, budget)
    limit = sum(loss[choice] for (loss, _), choice in zip(items, best))
    limit += SLACK * max(abs(limit), 1e-300)
    spent, lost = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for (loss, cost), relaxation in zip(items, rest[1:]):
        spread = len(loss)
        parents, choices = np.repeat(np.arange(len(spent)), spread), np.tile(np.arange(spread), len(spent))
        spent, lost = spent[parents] + cost[choices], lost[parents] + loss[choices]
        kept = np.flatnonzero(lost + relaxation(budget - spent) <= limit)
        kept = kept[_undominated(spent[kept], lost[kept])]
        spent, lost = spent[kept], lost[kept]
        trail.append((parents[kept], choices[kept]))
    if not len(spent):
        return best
    at, found = int(np.argmin(lost)), []
    for parents, choices in reversed(trail):
        found.append(int(choices[at]))
        at = int(parents[at])
    return found[::-1]


def _undominated(spent: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Those that no other undercuts in both, by rising cost."""
    order = np.lexsort((lost, spent))
    before = np.minimum.accumulate(np.concatenate([[np.inf], lost[order][:-1]]))
    return order[lost[order] < before]


def _hull(loss: np.ndarray, cost: np.ndarray) -> list[int]:
    """Choices on the lower convex hull, from the cheapest to the one of least loss."""
    hull: list[int] = []
    for at in _undominated(cost, loss):
        while len(hull) > 1 and _gain(loss, cost, hull[-2], hull[-1]) <= _gain(loss, cost, hull[-1], at):
            hull.pop()
        hull.append(int(at))
    return hull


def _gain(loss: np.ndarray, cost: np.ndarray, before: int, after: int) -> float:
    """Loss saved for each unit of cost."""
    return float(loss[before] - loss[after]) / float(cost[after] - cost[before])


def _steps(items: list[Item], hulls: list[list[int]]) -> list[Step]:
    """All steps along the hulls, the largest gain first."""
    steps = [
        Step(_gain(loss, cost, before, after), item, before, after)
        for item, ((loss, cost), hull) in enumerate(zip(items, hulls))
        for before, after in pairwise(hull)
    ]
    return sorted(steps, key=lambda step: (-step.gain, step.item))


def _relax(items: list[Item], hulls: list[list[int]], steps: list[Step], first: int) -> Relaxation:
    """The relaxation of the items from `first` on."""
    spent = [sum(float(cost[hull[0]]) for (_, cost), hull in zip(items[first:], hulls[first:]))]
    lost = [sum(float(loss[hull[0]]) for (loss, _), hull in zip(items[first:], hulls[first:]))]
    for step in steps:
        if step.item >= first:
            loss, cost = items[step.item]
            spent.append(spent[-1] + float(cost[step.after] - cost[step.before]))
            lost.append(lost[-1] + float(loss[step.after] - loss[step.before]))
    return Relaxation(np.array(spent), np.array(lost))


def _greedy(items: list[Item], hulls: list[list[int]], steps: list[Step], budget: int) -> list[int]:
    """A good solution: steps along the hulls by falling gain, those that fit."""
    found = [hull[0] for hull in hulls]
    left = budget - sum(int(cost[at]) for (_, cost), at in zip(items, found))
    for step in steps:
        cost = items[step.item][1]
        if found[step.item] == step.before and cost[step.after] - cost[step.before] <= left:
            left -= int(cost[step.after] - cost[step.before])
            found[step.item] = step.after
    return found
