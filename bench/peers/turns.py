"""Contenders that take turns, and what their turns say of each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pennyweight.benchmark.cost import log_ratios, saving_of
from pennyweight.records import Interval

CONFIDENCE = 0.95


def order(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name): in each round everyone in turn and then back again, A B B A, so that a machine that gets slower or
    faster by the minute favours nobody."""
    for number in range(1, rounds + 1):
        for name in (*names, *reversed(names)):
            yield number, name


def mean(values: Sequence[float]) -> Interval:
    """The mean of two turns or more, with Student's interval."""
    from scipy.stats import t

    count, centre = len(values), math.fsum(values) / len(values)
    variance = math.fsum((value - centre) ** 2 for value in values) / (count - 1)
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * math.sqrt(variance / count)
    return Interval(value=centre, low=centre - half, high=centre + half)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """ours/theirs, turn by turn: the geometric mean, with Student's interval on the logarithms."""
    saving = saving_of(log_ratios(list(ours), list(theirs)), CONFIDENCE)
    return Interval(value=1 - saving.value, low=1 - saving.high, high=1 - saving.low)


def show(interval: Interval, digits: int = 3) -> str:
    """Such as `1.02 (0.99 to 1.05)`, to so many significant digits of the value."""
    places = max(0, digits - 1 - math.floor(math.log10(abs(interval.value)))) if interval.value else digits
    return f"{interval.value:.{places}f} ({interval.low:.{places}f} to {interval.high:.{places}f})"
