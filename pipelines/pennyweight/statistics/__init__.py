"""The statistics behind a verdict. Pure functions of numbers: no files, no models.

Every estimate has the same shape (`Estimate`): a value, and a confidence bound and a test statistic on the standard
normal scale, so that one gate can judge paired answers, token averages, quantiles and ratios alike.
"""

from __future__ import annotations

from typing import Protocol

from pennyweight.statistics.clustered import LogRatio, Mean, Quantile, clustered_mean, paired_mean
from pennyweight.statistics.paired import PairedTable, Proportion
from pennyweight.statistics.tasks import MeanOfTasks

__all__ = [
    "Estimate",
    "LogRatio",
    "Mean",
    "MeanOfTasks",
    "PairedTable",
    "Proportion",
    "Quantile",
    "clustered_mean",
    "paired_mean",
]


class Estimate(Protocol):
    """A quantity, and how sure it is."""

    @property
    def value(self) -> float: ...

    @property
    def n(self) -> int:
        """Items, tokens or prompts that it is an estimate from."""

    def bound(self, z: float) -> float:
        """Confidence bound: lower for z > 0, at the level that a standard normal exceeds −z; upper for z < 0."""

    def statistic(self, threshold: float) -> float:
        """How far the value lies above `threshold`: standard normal if that were the truth. Falls as it rises."""

    def spread(self, threshold: float, truth: float) -> tuple[float, float]:
        """Standard deviations that one item contributes, if `threshold` were so, and if `truth` were."""
