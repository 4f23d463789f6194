import math
import random

import pytest

from pennyweight.evaluate.paired import PairedTable, non_inferiority_bounds, score_interval


def test_interval_agrees_with_the_published_example() -> None:
    # Fagerland, Lydersen and Laake (2014): 1 gained and 7 lost of 21; Tango's interval is (−0.517, −0.026).
    low, high = score_interval(PairedTable(21, gained=1, lost=7), 0.95)
    assert (round(low, 3), round(high, 3)) == (-0.517, -0.026)


def test_interval_is_not_empty_where_no_answer_differs() -> None:
    # With nothing discordant the bound is z² / (n + z²) in closed form.
    low, high = non_inferiority_bounds(PairedTable(100, 0, 0), 0.95)
    z_squared = 1.6448536269514722**2
    assert high == pytest.approx(z_squared / (100 + z_squared), abs=1e-9)
    assert low == pytest.approx(-high, abs=1e-9)


def test_swapping_the_two_mirrors_the_interval() -> None:
    low, high = score_interval(PairedTable(50, 3, 9), 0.9)
    mirrored = score_interval(PairedTable(50, 9, 3), 0.9)
    assert mirrored == (pytest.approx(-high, abs=1e-9), pytest.approx(-low, abs=1e-9))


@pytest.mark.parametrize("table", [PairedTable(10, 10, 0), PairedTable(10, 0, 10), PairedTable(1, 1, 0)])
def test_extreme_tables_give_bounds_inside_minus_one_to_one(table: PairedTable) -> None:
    low, high = score_interval(table, 0.95)
    assert -1 <= low <= table.difference <= high <= 1


def test_table_counts_gains_and_losses() -> None:
    table = PairedTable.from_scores([1, 1, 0, 0, 1], [1, 0, 1, 0, 0])
    assert (table.n, table.gained, table.lost) == (5, 2, 1)
    assert table.difference == pytest.approx(0.2)
    assert table.stderr == pytest.approx(math.sqrt((3 / 5 - 0.04) / 5))


def test_scores_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="not the same questions"):
        PairedTable.from_scores([1.0], [1.0, 0.0])


def test_lower_bound_covers_a_true_loss_at_its_level() -> None:
    """A true loss equal to the margin passes in about 5% of trials, and never in 8%."""
    draw = random.Random(0)
    n, margin, trials = 300, 0.05, 1500
    passed = 0
    for _ in range(trials):
        outcomes = draw.choices(("gained", "lost", "same"), weights=(0.05, 0.05 + margin, 0.85), k=n)
        low, _ = non_inferiority_bounds(PairedTable(n, outcomes.count("gained"), outcomes.count("lost")), 0.95)
        passed += low > -margin
    assert 0.03 < passed / trials < 0.08
