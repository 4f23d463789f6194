"""How many items a test needs, and what it can see with those it has."""

from __future__ import annotations

import math
from statistics import NormalDist

from pennyweight.statistics import Estimate

_NORMAL = NormalDist()
#: Chance that the sizes printed for a gate are enough. 80% is what one wants; the spread is itself an estimate.
POWER = 0.85


def items_needed(
    estimate: Estimate, threshold: float, truth: float, alpha: float, inflation: float = 1.0, power: float = POWER
) -> int | None:
    """Items that decide for or against `threshold` with that power if `truth` is so. None where none would.

    n = ((z_α σ₀ + z_β σ₁) / (truth − threshold))², with σ₀ and σ₁ the spread of an item if the threshold or `truth`
    were so (for paired proportions: Liu et al., Statistics in Medicine 21, 2002). `inflation` is what looking early
    costs.
    """
    distance = abs(truth - threshold)
    null, seen = estimate.spread(threshold, truth)
    needed = _NORMAL.inv_cdf(1 - alpha) * null + _NORMAL.inv_cdf(power) * seen
    if not (distance > 0 and math.isfinite(needed)):
        return None
    return math.ceil((needed / distance) ** 2 * inflation)


def detectable(estimate: Estimate, threshold: float, alpha: float, power: float = POWER) -> float:
    """The smallest distance from the threshold that `estimate`'s number of items tells apart with that power."""
    null, seen = estimate.spread(threshold, estimate.value)
    return (_NORMAL.inv_cdf(1 - alpha) * null + _NORMAL.inv_cdf(power) * seen) / math.sqrt(estimate.n)
