"""The Pareto front of points in two dimensions."""

from __future__ import annotations

import math


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats, both coordinates to be minimised, sorted by x.

    A point is beaten by one that is at most as large in both coordinates and smaller in one; so equal points stand or
    fall together. A point with a NaN is never on the front.
    """
    order = sorted(
        (index for index, point in enumerate(points) if not any(map(math.isnan, point))),
        key=lambda index: (*points[index], index),
    )
    front: list[int] = []
    for index in order:
        if not front or points[index][1] < points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front
