"""The arithmetic of cost. Pure functions."""

from __future__ import annotations

import math
from statistics import NormalDist

from pennyweight.records import Interval, Price
from pennyweight.statistics import Mean


def usd_per_million(usd_per_hour: float, tokens: int, seconds: float) -> float:
    """US dollars per million tokens of a machine that does `tokens` in `seconds`, at what its busy hour costs."""
    return usd_per_hour / 3600 * seconds / tokens * 1e6


def usd(price: Price, output_tokens: int, seconds: float) -> float:
    """US dollars of a piece of work: the machine's busy time, and the egress of what it answered."""
    return price.usd_per_busy_hour / 3600 * seconds + price.egress_usd_per_1m_output * output_tokens / 1e6


def log_ratios(candidate: list[float], base: list[float]) -> list[float]:
    """ln(candidate / base) of what both cost for the same work, round by round.

    Rounds pair the two, so a machine that drifts moves both alike.
    """
    return [math.log(ours / theirs) for ours, theirs in zip(candidate, base, strict=True)]


def mean_log_ratio(logs: list[float]) -> Mean:
    """The average of the rounds' log ratios (two at least), with Student's interval.

    On logarithms, because a ratio and its inverse are equally likely to be off by the same factor.
    """
    n = len(logs)
    mean = sum(logs) / n
    variance = sum((value - mean) ** 2 for value in logs) / (n - 1)
    return Mean(mean, math.sqrt(variance / n), n, n - 1)


def saving_of(logs: list[float], confidence: float = 0.95) -> Interval:
    """1 − cost of the candidate / cost of the base, from the rounds' log ratios."""
    mean, z = mean_log_ratio(logs), NormalDist().inv_cdf(0.5 + confidence / 2)
    low, high = (1 - math.exp(mean.bound(side)) for side in (-z, z))
    return Interval(value=1 - math.exp(mean.value), low=low, high=high)
