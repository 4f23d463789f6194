"""One number for several tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pennyweight.statistics.clustered import Mean
from pennyweight.statistics.paired import PairedTable

#: Beyond this many standard errors nothing is told apart.
_FAR = 12.0


@dataclass(frozen=True)
class MeanOfTasks:
    """Unweighted mean of the tasks' differences, each task counting alike whatever its size.

    The bounds recover the variance from the tasks' own bounds (MOVER: Zou and Donner, 2008), and so keep their level
    where few answers differ.
    """

    parts: tuple[PairedTable | Mean, ...]

    @property
    def value(self) -> float:
        return sum(part.value for part in self.parts) / len(self.parts)

    @property
    def n(self) -> int:
        return sum(part.n for part in self.parts)

    def bound(self, z: float) -> float:
        distance = math.sqrt(sum((part.value - part.bound(z)) ** 2 for part in self.parts)) / len(self.parts)
        return self.value - math.copysign(distance, z)

    def statistic(self, threshold: float) -> float:
        """The z at which the bound meets the threshold, by bisection."""
        low, high = -_FAR, _FAR
        while high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (middle, high) if self.bound(middle) > threshold else (low, middle)
        return (low + high) / 2

    def spread(self, threshold: float, truth: float) -> tuple[float, float]:
        """Of one item, were all tasks drawn in the proportions they have."""
        sides = zip(*(part.spread(threshold, truth) for part in self.parts))
        n, tasks = self.n, len(self.parts)
        null, seen = (
            math.sqrt(sum(one**2 / part.n for one, part in zip(side, self.parts)) * n) / tasks for side in sides
        )
        return null, seen
