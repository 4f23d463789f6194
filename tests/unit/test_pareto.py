"""The Pareto front, point by point."""

import math

from pennyweight.pareto import pareto_front


def test_a_point_beaten_in_both_is_off_the_front():
    assert pareto_front([(1.0, 3.0), (2.0, 2.0), (3.0, 2.5), (4.0, 1.0)]) == [0, 1, 3]


def test_indices_come_sorted_by_x():
    assert pareto_front([(4.0, 1.0), (1.0, 3.0), (2.0, 2.0)]) == [1, 2, 0]


def test_equal_in_one_coordinate_and_worse_in_the_other_is_beaten():
    assert pareto_front([(1.0, 2.0), (1.0, 1.0)]) == [1]
    assert pareto_front([(1.0, 1.0), (2.0, 1.0)]) == [0]


def test_equal_points_stand_together():
    assert pareto_front([(2.0, 2.0), (1.0, 1.0), (1.0, 1.0)]) == [1, 2]


def test_negative_and_infinite_coordinates_are_numbers():
    assert pareto_front([(-1.0, math.inf), (0.0, -2.0), (0.5, -1.0)]) == [0, 1]


def test_nan_is_never_on_the_front_and_beats_nothing():
    assert pareto_front([(0.0, math.nan), (math.nan, 0.0), (1.0, 1.0)]) == [2]


def test_no_points_no_front():
    assert pareto_front([]) == []
    assert pareto_front([(math.nan, math.nan)]) == []


def test_the_front_is_what_the_definition_says():
    points = [(float(i * 7 % 11), float(i * 5 % 13)) for i in range(40)]

    def beaten(index: int) -> bool:
        x, y = points[index]
        return any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)

    expected = sorted((i for i in range(40) if not beaten(i)), key=lambda i: (*points[i], i))
    assert pareto_front(points) == expected
