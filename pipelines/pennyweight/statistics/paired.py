"""Paired comparison of two candidates' answers to the same questions.

The interval is Tango's («Equivalence test and confidence interval for the difference in proportions for the
paired-sample design», Statistics in Medicine 17, 1998). Unlike Wald's, it keeps its level where few answers differ, and
is not empty where none do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PairedTable:
    """Answers to the same n questions: how often only the candidate, and only the base, was right."""

    n: int
    gained: float
    """Candidate right, base wrong. A whole number, but for expected tables."""
    lost: float
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
    def value(self) -> float:
        return self.difference

    @property
    def stderr(self) -> float:
        """Wald standard error of the difference."""
        discordant = (self.gained + self.lost) / self.n
        return math.sqrt(max(discordant - self.difference**2, 0.0) / self.n)

    def bound(self, z: float) -> float:
        """Where the score statistic equals z (Tango)."""
        return _root(self, z, *((-1.0, self.difference) if z > 0 else (self.difference, 1.0)))

    def statistic(self, threshold: float) -> float:
        """Tango's score statistic for the hypothesis that the difference is `threshold`."""
        return _score(self, threshold)

    def spread(self, threshold: float, truth: float) -> tuple[float, float]:
        """Of one question. Half a disagreement is added, so that a sample without any is not taken for a world without
        any; a larger difference than the one seen is made of as many more disagreements."""
        discordant = (self.gained + self.lost + 0.5) / (self.n + 1) + max(abs(truth) - abs(self.difference), 0.0)
        expected = PairedTable(self.n, (discordant + truth) / 2 * self.n, (discordant - truth) / 2 * self.n)
        return math.sqrt(_null_variance(expected, threshold)), math.sqrt(max(discordant - truth**2, 0.0))

    def mcnemar(self) -> float:
        """Two-sided p-value of the exact McNemar test: gained and lost answers are equally likely."""
        from scipy.special import bdtr

        discordant, fewer = self.gained + self.lost, min(self.gained, self.lost)
        return min(1.0, 2 * float(bdtr(fewer, discordant, 0.5))) if discordant else 1.0


def _null_variance(table: PairedTable, delta: float) -> float:
    """Variance of one question's difference, were `delta` the true difference: at Tango's restricted estimate."""
    n, gained, lost = table.n, table.gained, table.lost
    a = 2 * n
    b = -gained - lost + (2 * n - gained + lost) * delta
    c = -lost * delta * (1 - delta)
    q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    return max(2 * q + delta * (1 - delta), 0.0)


def _score(table: PairedTable, delta: float) -> float:
    """Tango's statistic for the hypothesis that the difference is `delta`; falls as delta rises."""
    variance = table.n * _null_variance(table, delta)
    distance = table.gained - table.lost - table.n * delta
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


@dataclass(frozen=True)
class Proportion:
    """`right` of `n` questions, with Wilson's score interval (1927)."""

    right: int
    n: int

    @property
    def value(self) -> float:
        return self.right / self.n

    @property
    def stderr(self) -> float:
        return math.sqrt(self.value * (1 - self.value) / self.n)

    def bound(self, z: float) -> float:
        square = z * z / self.n
        half = z * math.sqrt(self.value * (1 - self.value) / self.n + square / (4 * self.n))
        return (self.value + square / 2 - half) / (1 + square)

    def statistic(self, threshold: float) -> float:
        if not 0 < threshold < 1:
            return math.copysign(math.inf, self.value - threshold) if self.value != threshold else 0.0
        return (self.value - threshold) / math.sqrt(threshold * (1 - threshold) / self.n)

    def spread(self, threshold: float, truth: float) -> tuple[float, float]:
        null, seen = (math.sqrt(max(share * (1 - share), 0.0)) for share in (threshold, truth))
        return null, seen
