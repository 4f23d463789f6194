"""Looks at growing data that spend one error probability between them (Lan and DeMets, 1983)."""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import numpy as np

_NORMAL = NormalDist()
#: Points of the grid that densities are integrated on; 400 give boundaries to four digits.
_POINTS = 400
_REACH = 8.0


def spend(alpha: float, fraction: float) -> float:
    """How much of `alpha` is spent when `fraction` of the information is in.

    The spending function that resembles Pocock's boundaries: it leaves a first look enough to decide clear cases on.
    """
    return alpha * math.log(1 + (math.e - 1) * min(fraction, 1.0))


@cache
def boundaries(alpha: float, fractions: tuple[float, ...]) -> tuple[float, ...]:
    """Critical values, one for each look, for a one-sided test at `alpha` in all.

    `fractions`: rising shares of the final information; the last is 1 where the data run out. A statistic that is
    standard normal at each look, under the null hypothesis, crosses any of them with probability `alpha`.
    """
    if len(fractions) == 1 and fractions[0] >= 1:
        return (_NORMAL.inv_cdf(1 - alpha),)
    found: list[float] = []
    grid, density = None, None
    before = 0.0
    for index, fraction in enumerate(fractions):
        target = spend(alpha, fraction) - before
        before = spend(alpha, fraction)
        step = fraction - (fractions[index - 1] if index else 0.0)
        limit = _solve(grid, density, fraction, step, target)
        found.append(limit / math.sqrt(fraction))
        grid, density = _advance(grid, density, fraction, step, limit)
    return tuple(found)


def crossing_probability(drift: float, limits: tuple[float, ...], fractions: tuple[float, ...]) -> float:
    """Probability of crossing any limit when the final statistic has mean `drift` and variance 1."""
    stayed_grid, stayed, crossed, previous = None, None, 0.0, 0.0
    for limit, fraction in zip(limits, fractions):
        step = fraction - previous
        at = limit * math.sqrt(fraction)
        crossed += _beyond(stayed_grid, stayed, step, at, drift)
        stayed_grid, stayed = _advance(stayed_grid, stayed, fraction, step, at, drift)
        previous = fraction
    return crossed


@cache
def inflation(alpha: float, power: float, fractions: tuple[float, ...]) -> float:
    """How much larger the last look must be than a single one of the same power."""
    limits = boundaries(alpha, fractions)
    single = _NORMAL.inv_cdf(1 - alpha) + _NORMAL.inv_cdf(power)
    low, high = 0.5 * single, 3 * single
    while high - low > 1e-6:
        middle = (low + high) / 2
        reached = crossing_probability(middle, limits, fractions) >= power
        low, high = (low, middle) if reached else (middle, high)
    return (high / single) ** 2


def _beyond(
    grid: np.ndarray | None, density: np.ndarray | None, step: float, limit: float, drift: float = 0.0
) -> float:
    """Probability of lying above `limit` after one more step of a Brownian motion."""
    from scipy.special import ndtr

    if grid is None or density is None:
        return float(ndtr((drift * step - limit) / math.sqrt(step)))
    return float(np.trapezoid(density * ndtr((grid + drift * step - limit) / math.sqrt(step)), grid))


def _solve(grid: np.ndarray | None, density: np.ndarray | None, fraction: float, step: float, target: float) -> float:
    low, high = -_REACH * math.sqrt(fraction), _REACH * math.sqrt(fraction)
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _beyond(grid, density, step, middle) > target else (low, middle)
    return (low + high) / 2


def _advance(
    grid: np.ndarray | None, density: np.ndarray | None, fraction: float, step: float, limit: float, drift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Density of the paths that have stayed below the limit, after this step."""
    mean = drift * fraction
    points = np.linspace(min(mean, 0.0) - _REACH * math.sqrt(fraction), limit, _POINTS)
    if grid is None or density is None:
        return points, _pdf((points - drift * step) / math.sqrt(step)) / math.sqrt(step)
    kernel = _pdf((points[:, None] - grid[None, :] - drift * step) / math.sqrt(step)) / math.sqrt(step)
    return points, np.trapezoid(kernel * density[None, :], grid, axis=1)


def _pdf(x: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
