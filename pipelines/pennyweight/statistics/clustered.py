"""Averages and quantiles of values that come in clusters, as tokens come in documents.

Tokens of one document are alike, so their number overstates what was learned: standard errors count clusters (Liang and
Zeger, 1986, with the small-sample factor G / (G − 1) and Student's t with G − 1 degrees of freedom).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_NORMAL = NormalDist()
#: Standard normal quantile of a two-sided 95% interval.
NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Mean:
    """An average with a standard error.

    Where the values are skewed, as divergences are, the average and its standard error rise and fall together, and the
    plain interval misses on one side too often; Hall's transformation corrects that (Hall, «On the removal of skewness
    by transformation», JRSS B 54, 1992).
    """

    value: float
    stderr: float
    n: int
    degrees: int | None = None
    """Degrees of freedom of Student's t; None for a normal."""
    skewness: float = 0.0
    """Of the average: that of one cluster over the root of their number."""

    def bound(self, z: float) -> float:
        if self.stderr == 0:
            return self.value
        return self.value - _hall_inverse(_normal_to_t(z, self.degrees), self.skewness) * self.stderr

    def statistic(self, threshold: float) -> float:
        distance = self.value - threshold
        if self.stderr == 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return _t_to_normal(_hall(distance / self.stderr, self.skewness), self.degrees)

    def spread(self, threshold: float, truth: float) -> tuple[float, float]:
        one = self.stderr * math.sqrt(self.n)
        return one, one


@dataclass(frozen=True)
class LogRatio:
    """exp of an average of logarithms, such as a ratio of perplexities."""

    log: Mean

    @property
    def value(self) -> float:
        return math.exp(self.log.value)

    @property
    def n(self) -> int:
        return self.log.n

    def bound(self, z: float) -> float:
        return math.exp(self.log.bound(z))

    def statistic(self, threshold: float) -> float:
        return self.log.statistic(math.log(threshold)) if threshold > 0 else math.inf

    def spread(self, threshold: float, truth: float) -> tuple[float, float]:
        """On the scale of the ratio (delta method)."""
        one = self.log.spread(0, 0)[0] * self.value
        return one, one


class Quantile:
    """A quantile of clustered values.

    Tested through the share of values below the threshold, with the variance that this share has if the threshold is
    the quantile (a score test), times the design effect of the clusters (Woodruff, 1952; Kish, 1965). So a tail in
    which nothing was seen is not taken for a tail in which nothing is.
    """

    def __init__(self, values: np.ndarray, clusters: np.ndarray, share: float):
        """`values` and `clusters`: (n,), `share` such as 0.99."""
        self._sorted = np.sort(values)
        self._share = share
        self.value = float(np.quantile(self._sorted, share))
        self.n = len(values)
        binomial = share * (1 - share) / self.n
        below = clustered_mean((values <= self.value).astype(float), clusters)
        self._stderr = math.sqrt(max(below.stderr**2, binomial))
        self._degrees = below.degrees

    def bound(self, z: float) -> float:
        """Infinite where the sample has too few values to bound the quantile from above."""
        at = self._share - _normal_to_t(z, self._degrees) * self._stderr
        if at >= 1:
            return math.inf
        return float(np.quantile(self._sorted, at)) if at > 0 else -math.inf

    def statistic(self, threshold: float) -> float:
        below = np.searchsorted(self._sorted, threshold, side="right") / self.n
        return _t_to_normal((self._share - below) / self._stderr, self._degrees)

    def spread(self, threshold: float, truth: float) -> tuple[float, float]:
        """On the scale of the values, from the bounds one standard error away; infinite where there are none."""
        one = (self.bound(-1) - self.bound(1)) / 2 * math.sqrt(self.n)
        return one, one


def clustered_mean(values: np.ndarray, clusters: np.ndarray) -> Mean:
    """Average of `values` (n,), with a standard error that counts `clusters` (n,) of equal labels.

    A single cluster says nothing of the spread between clusters: its standard error is infinite.
    """
    n = len(values)
    value = float(np.mean(values))
    _, labels = np.unique(clusters, return_inverse=True)
    count = int(labels.max()) + 1
    if count < 2 or not math.isfinite(value):
        return Mean(value, math.inf, n, None)
    sums = np.bincount(labels, weights=np.asarray(values, dtype=float) - value, minlength=count)
    squares = float(np.sum(sums**2))
    stderr = math.sqrt(count / (count - 1) * squares) / n
    return Mean(value, stderr, n, count - 1, _skewness_of_average(sums))


def _skewness_of_average(sums: np.ndarray) -> float:
    """Skewness of the values, as corrected for small samples (Joanes and Gill, 1998), over the root of their number."""
    count, squares = len(sums), float(np.sum(sums**2))
    if count < 3 or not squares:
        return 0.0
    return math.sqrt(count * (count - 1)) / (count - 2) * float(np.sum(sums**3)) / squares**1.5


def paired_mean(differences: np.ndarray) -> Mean:
    """Average of independent differences (n,), as in the paired t-test."""
    return clustered_mean(differences, np.arange(len(differences)))


def _hall(t: float, skewness: float) -> float:
    return t + skewness * t * t / 3 + skewness**2 * t**3 / 27 + skewness / 6


def _hall_inverse(g: float, skewness: float) -> float:
    if abs(skewness) < 1e-9:
        return g
    return 3 / skewness * (math.copysign(abs(inner := 1 + skewness * (g - skewness / 6)) ** (1 / 3), inner) - 1)


def _normal_to_t(z: float, degrees: int | None) -> float:
    """The quantile of Student's t at the level of the standard normal quantile `z`."""
    if degrees is None:
        return z
    from scipy.special import stdtrit

    return math.copysign(float(-stdtrit(degrees, _NORMAL.cdf(-abs(z)))), z)


def _t_to_normal(t: float, degrees: int | None) -> float:
    if degrees is None or math.isinf(t):
        return t
    from scipy.special import ndtri, stdtr

    tail = float(stdtr(degrees, -abs(t)))
    return math.copysign(float(-ndtri(tail)) if tail > 0 else math.inf, t)
