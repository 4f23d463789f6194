"""Allocation's arithmetic: the exact knapsack."""

from __future__ import annotations

import itertools
import random

import pytest

from pennyweight.quantization.allocation import knapsack


def brute_force(losses: list[list[float]], costs: list[list[int]], budget: int) -> float:
    spans = [range(len(loss)) for loss in losses]
    return min(
        sum(loss[at] for loss, at in zip(losses, chosen))
        for chosen in itertools.product(*spans)
        if sum(cost[at] for cost, at in zip(costs, chosen)) <= budget
    )


@pytest.mark.parametrize("seed", range(60))
def test_knapsack_finds_what_trying_everything_finds(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.randint(1, 4) for _ in range(draw.randint(1, 7))]
    costs = [[draw.randint(1, 30) for _ in range(size)] for size in sizes]
    losses = [[draw.choice([0.0, draw.random(), draw.random() * 10]) for _ in range(size)] for size in sizes]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    for budget in {least, (least + most) // 2, draw.randint(least, most), most + 1}:
        found = knapsack.solve(losses, costs, budget)
        assert sum(cost[at] for cost, at in zip(costs, found)) <= budget
        total = sum(loss[at] for loss, at in zip(losses, found))
        assert total == pytest.approx(brute_force(losses, costs, budget), abs=1e-12)


def test_knapsack_that_cannot_be_filled_says_what_the_least_is() -> None:
    with pytest.raises(ValueError, match="7 is the least"):
        knapsack.solve([[1.0, 0.0], [1.0]], [[3, 9], [4]], 6)


def test_knapsack_of_a_large_model_is_solved_exactly_in_reasonable_time() -> None:
    """200 items of equal sizes, against dynamic programming over every cost."""
    draw = random.Random(0)
    costs = [[3, 4, 5, 8, 16] for _ in range(200)]
    losses = [[weight * 4.0**-bits for bits in (3, 4, 5, 8, 16)] for weight in (draw.expovariate(1) for _ in costs)]
    budget = 200 * 5 + 1
    least = [0.0] * (budget + 1)
    for loss, cost in zip(losses, costs):
        least = [
            min((least[at - c] + v for c, v in zip(cost, loss) if c <= at), default=float("inf"))
            for at in range(budget + 1)
        ]
    found = knapsack.solve(losses, costs, budget)
    assert sum(loss[at] for loss, at in zip(losses, found)) == pytest.approx(least[budget], rel=1e-12)
