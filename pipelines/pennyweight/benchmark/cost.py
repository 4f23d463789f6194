"""The arithmetic of cost. Pure functions."""

from __future__ import annotations

import math

from pennyweight.records import Interval, Price


def usd_per_million(usd_per_hour: float, tokens: int, seconds: float) -> float:
    """US dollars per million tokens of a machine that does `tokens` in `seconds`, at what its busy hour costs."""
    return usd_per_hour / 3600 * seconds / tokens * 1e6


def usd(price: Price, output_tokens: int, seconds: float) -> float:
    """US dollars of a piece of work: the machine's busy time, and the egress of what it answered."""
    return price.usd_per_busy_hour / 3600 * seconds + price.egress_usd_per_1m_output * output_tokens / 1e6


def paired_saving(candidate: list[float], base: list[float], confidence: float = 0.95) -> Interval:
    """1 − cost of the candidate / cost of the base, from what both cost for the same work, round by round.

    Rounds pair the two, so a machine that drifts moves both alike. The interval is Student's, on the logarithms of the
    rounds' ratios: a ratio and its inverse are equally likely to be off by the same factor.
    """
    from scipy.stats import t

    logs = [math.log(ours / theirs) for ours, theirs in zip(candidate, base, strict=True)]
    n = len(logs)
    mean = sum(logs) / n
    variance = sum((value - mean) ** 2 for value in logs) / (n - 1)
    half = float(t.ppf(0.5 + confidence / 2, n - 1)) * math.sqrt(variance / n)
    return Interval(value=1 - math.exp(mean), low=1 - math.exp(mean + half), high=1 - math.exp(mean - half))
