"""Paired comparison of two candidates' answers to the same questions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class PairedTable:
    """Answers to the same n questions: how often only the candidate, and only the base, was right."""

    n: int
    gained: int
    """Candidate right, base wrong."""
    lost: int
    """Candidate wrong, base right."""

    @classmethod
    def from_scores(cls, candidate: list[float], base: list[float]) -> PairedTable:
        """From 0/1 scores in the same order. Raises ValueError where the lengths differ."""
        if len(candidate) != len(base):
            raise ValueError(f"{len(candidate)} answers against {len(base)}: not the same questions")
        pairs = list(zip(candidate, base))
        return cls(len(pairs), sum(c > b for c, b in pairs), sum(c < b for c, b in pairs))

    @property
    def difference(self) -> float:
        """Accuracy of the candidate minus accuracy of the base."""
        return (self.gained - self.lost) / self.n

    @property
    def stderr(self) -> float:
        """Wald standard error of the difference."""
        discordant = (self.gained + self.lost) / self.n
        return math.sqrt(max(discordant - self.difference**2, 0.0) / self.n)


def score_interval(table: PairedTable, confidence: float) -> tuple[float, float]:
    """Two-sided score interval for the difference of two paired proportions.

    Tango, «Equivalence test and confidence interval for the difference in proportions for the paired-sample design»,
    Statistics in Medicine 17 (1998). Unlike Wald's, it keeps its level where few answers differ, and is not empty where
    none do.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    difference = table.difference
    low = _root(table, z, -1.0, difference)
    high = _root(table, -z, difference, 1.0)
    return low, high


def non_inferiority_bounds(table: PairedTable, confidence: float) -> tuple[float, float]:
    """One-sided lower and upper bounds of the difference, each at `confidence`."""
    return score_interval(table, 2 * confidence - 1)


def _score(table: PairedTable, delta: float) -> float:
    """Tango's statistic for the hypothesis that the difference is `delta`; falls as delta rises."""
    n, gained, lost = table.n, table.gained, table.lost
    a = 2 * n
    b = -gained - lost + (2 * n - gained + lost) * delta
    c = -lost * delta * (1 - delta)
    q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * q + delta * (1 - delta))
    distance = gained - lost - n * delta
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def _root(table: PairedTable, z: float, low: float, high: float) -> float:
    """Where the statistic equals z, by bisection to 1e-12."""
    while high - low > 1e-12:
        middle = (low + high) / 2
        if _score(table, middle) > z:
            low = middle
        else:
            high = middle
    return (low + high) / 2
