"""How many items a test needs, and what it can see with those it has."""

from __future__ import annotations

import math
from statistics import NormalDist

from pennyweight.statistics import Estimate

_NORMAL = NormalDist()
#: Chance that the sizes printed for a test are enough.
POWER = 0.8


def items_needed(
    estimate: Estimate, threshold: float, truth: float, alpha: float, inflation: float = 1.0
) -> int | None:
    """Items that decide for or against `threshold` with 80% power if `truth` is so. None where none would.

    n = ((z_α σ₀ + z_β σ₁) / (truth − threshold))², with σ₀ the spread of an item if the threshold were the truth and σ₁
    as observed (for paired proportions: Liu et al., Statistics in Medicine 21, 2002). `inflation` is what looking early
    costs.
    """
    distance = abs(truth - threshold)
    null, seen = estimate.spread(threshold)
    needed = _NORMAL.inv_cdf(1 - alpha) * null + _NORMAL.inv_cdf(POWER) * seen
    if not (distance > 0 and math.isfinite(needed)):
        return None
    return math.ceil((needed / distance) ** 2 * inflation)


def detectable(estimate: Estimate, threshold: float, alpha: float) -> float:
    """The smallest distance from the threshold that `estimate`'s number of items tells apart with 80% power."""
    null, seen = estimate.spread(threshold)
    return (_NORMAL.inv_cdf(1 - alpha) * null + _NORMAL.inv_cdf(POWER) * seen) / math.sqrt(estimate.n)
