"""Where a measurement's warm-up ends, and whether what follows stays level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

#: Observations that MSER averages before it looks (White and Spratt, 2000).
MSER_BATCH = 5
#: A cut's squared standard error over the smallest one's that is as good as it.
CLOSE = 1.5
#: Blocks of time that the trend test sees: averages, so that neighbours hardly depend on each other.
BLOCKS = 20
#: Chance of calling a level series drifting.
ALPHA = 0.01
#: A drift over the whole measurement that is smaller than this fraction of its level does not matter.
TOLERATED_DRIFT = 0.05


@dataclass(frozen=True)
class Drift:
    """What the Mann–Kendall test (Mann, 1945; Kendall, 1975) says of a series, with Sen's slope (1968)."""

    change: float
    """Fraction of its level by which the series changes from its start to its end."""
    p_value: float
    """Two-sided."""

    @property
    def steady(self) -> bool:
        return self.p_value >= ALPHA or abs(self.change) < TOLERATED_DRIFT


def warm_up(values: np.ndarray) -> int:
    """How many of the first `values` to leave out, by MSER-5: the cut that leaves the smallest standard error of what
    follows (White, 1997), or the first that comes close, as the smallest one wanders where there is no warm-up. At most
    half of them."""
    batches = len(values) // MSER_BATCH
    if batches < 4:
        return 0
    means = values[: batches * MSER_BATCH].reshape(batches, MSER_BATCH).mean(1)
    errors = np.array([means[cut:].var() / (batches - cut) for cut in range(batches // 2 + 1)])
    return int(np.argmax(errors <= CLOSE * errors.min())) * MSER_BATCH


def drift(values: np.ndarray) -> Drift:
    """Trend of a series of averages over blocks of equal length."""
    n = len(values)
    if n < 4:
        return Drift(0.0, 1.0)
    first, second = np.triu_indices(n, 1)
    steps = values[second] - values[first]
    score = float(np.sign(steps).sum())
    _, ties = np.unique(values, return_counts=True)
    variance = (n * (n - 1) * (2 * n + 5) - (ties * (ties - 1) * (2 * ties + 5)).sum()) / 18
    if variance == 0:
        return Drift(0.0, 1.0)
    z = (score - math.copysign(1, score)) / math.sqrt(variance) if score else 0.0
    slope = float(np.median(steps / (second - first)))
    level = float(np.median(values))
    change = slope * (n - 1) / level if level else math.copysign(math.inf, slope) if slope else 0.0
    return Drift(change, math.erfc(abs(z) / math.sqrt(2)))
