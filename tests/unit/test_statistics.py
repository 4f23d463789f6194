"""Estimates, their intervals, and looks that spend an error probability: against closed forms and published values."""

import dataclasses
import math
import random

import numpy as np
import pytest
from scipy.stats import norm, ttest_1samp

from pennyweight.statistics import (
    LogRatio,
    Mean,
    MeanOfTasks,
    PairedTable,
    Proportion,
    Quantile,
    clustered_mean,
    paired_mean,
)
from pennyweight.statistics.power import detectable, items_needed
from pennyweight.statistics.sequential import boundaries, crossing_probability, inflation, spend

Z90, Z95 = norm.ppf(0.95), norm.ppf(0.975)


def test_interval_agrees_with_the_published_example() -> None:
    # Fagerland, Lydersen and Laake (2014): 1 gained and 7 lost of 21; Tango's interval is (−0.517, −0.026).
    table = PairedTable(21, gained=1, lost=7)
    low, high = table.bound(Z95), table.bound(-Z95)
    assert (round(low, 3), round(high, 3)) == (-0.517, -0.026)


def test_interval_is_not_empty_where_no_answer_differs() -> None:
    # With nothing discordant the bound is z² / (n + z²) in closed form.
    low, high = PairedTable(100, 0, 0).bound(Z90), PairedTable(100, 0, 0).bound(-Z90)
    z_squared = 1.6448536269514722**2
    assert high == pytest.approx(z_squared / (100 + z_squared), abs=1e-9)
    assert low == pytest.approx(-high, abs=1e-9)


def test_swapping_the_two_mirrors_the_interval() -> None:
    one, other = PairedTable(50, 3, 9), PairedTable(50, 9, 3)
    assert one.bound(Z90) == pytest.approx(-other.bound(-Z90), abs=1e-9)
    assert one.statistic(-0.05) == pytest.approx(-other.statistic(0.05), abs=1e-12)


@pytest.mark.parametrize("table", [PairedTable(10, 10, 0), PairedTable(10, 0, 10), PairedTable(1, 1, 0)])
def test_extreme_tables_give_bounds_inside_minus_one_to_one(table: PairedTable) -> None:
    low, high = table.bound(Z95), table.bound(-Z95)
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
        passed += PairedTable(n, outcomes.count("gained"), outcomes.count("lost")).bound(Z90) > -margin
    assert 0.03 < passed / trials < 0.08


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(0, 0, 1.0), (1, 7, 2 * 9 / 256), (5, 5, 1.0), (0, 10, 2 / 1024)],
)
def test_mcnemar_is_exact(gained: int, lost: int, p: float) -> None:
    assert PairedTable(100, gained, lost).mcnemar() == pytest.approx(p, rel=1e-12)


ESTIMATES = [
    PairedTable(150, 8, 12),
    Mean(0.3, 0.02, 400, 9),
    Mean(0.3, 0.02, 400, 9, 0.3),
    Mean(0.3, 0.02, 400, 40, -0.2),
    LogRatio(Mean(0.05, 0.01, 4096, 12)),
    Proportion(93, 150),
    MeanOfTasks((PairedTable(150, 8, 12), PairedTable(80, 1, 4))),
]


@pytest.mark.parametrize("estimate", ESTIMATES, ids=lambda item: type(item).__name__)
@pytest.mark.parametrize("z", [-2.3, -1.0, 0.5, 1.645])
def test_statistic_is_the_inverse_of_the_bound(estimate: object, z: float) -> None:
    """A threshold at the bound is rejected at exactly that level."""
    assert estimate.statistic(estimate.bound(z)) == pytest.approx(z, abs=1e-6)


def test_mean_of_independent_differences_is_the_paired_t_test() -> None:
    values = np.random.default_rng(0).normal(0.1, 1, 25)
    mean, reference = paired_mean(values), ttest_1samp(values, 0.0)
    low, high = reference.confidence_interval(0.95)
    plain = dataclasses.replace(mean, skewness=0.0)
    assert (plain.bound(Z95), plain.bound(-Z95)) == (pytest.approx(low), pytest.approx(high))
    assert 2 * norm.sf(abs(plain.statistic(0.0))) == pytest.approx(reference.pvalue)


def test_skewed_averages_keep_their_level_on_both_sides() -> None:
    draw = np.random.default_rng(7)
    trials = [paired_mean(draw.lognormal(0, 1, 40)) for _ in range(4000)]
    truth = math.exp(0.5)
    too_low = sum(mean.bound(-Z90) < truth for mean in trials) / 4000
    plainly = sum(dataclasses.replace(mean, skewness=0.0).bound(-Z90) < truth for mean in trials) / 4000
    assert too_low < 0.75 * plainly
    assert sum(mean.bound(Z90) > truth for mean in trials) / 4000 < 0.06


def test_clusters_count_and_not_their_tokens() -> None:
    """Ten documents of a hundred equal tokens each say as much as ten tokens."""
    documents = np.random.default_rng(1).normal(size=10)
    tokens = clustered_mean(np.repeat(documents, 100), np.repeat(np.arange(10), 100))
    assert tokens.stderr == pytest.approx(documents.std(ddof=1) / math.sqrt(10))
    assert (tokens.n, tokens.degrees) == (1000, 9)


def test_one_document_says_nothing_of_others() -> None:
    mean = clustered_mean(np.arange(5.0), np.zeros(5, int))
    assert (mean.bound(1.6), mean.bound(-1.6)) == (-math.inf, math.inf)
    assert mean.statistic(0.0) == 0


def test_clustered_interval_covers_at_its_level() -> None:
    draw = np.random.default_rng(2)
    covered = 0
    for _ in range(1000):
        sizes = draw.integers(20, 80, 12)
        clusters = np.repeat(np.arange(12), sizes)
        mean = clustered_mean(draw.normal(size=12)[clusters] + draw.normal(size=sizes.sum()), clusters)
        covered += mean.bound(Z95) < 0 < mean.bound(-Z95)
    assert 0.93 < covered / 1000 < 0.98


def test_quantile_of_what_was_hardly_seen_has_no_upper_bound() -> None:
    values = np.random.default_rng(3).exponential(size=1000)
    tail = Quantile(values, np.arange(1000), 0.999)
    assert tail.bound(-Z95) == math.inf
    assert tail.statistic(values.max() + 1) > -Z95  # nothing above it was seen, and yet it may be exceeded


def test_quantile_interval_covers_at_its_level() -> None:
    draw, truth = np.random.default_rng(4), -math.log(0.01)
    trials = [Quantile(draw.exponential(size=2000), np.arange(2000), 0.99) for _ in range(400)]
    covered = sum(trial.bound(Z95) <= truth <= trial.bound(-Z95) for trial in trials)
    assert 0.92 < covered / 400 < 0.99
    above = sum(trial.statistic(truth) > Z90 for trial in trials)
    assert above / 400 < 0.09


def test_wilson_interval_in_closed_form() -> None:
    # Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662.
    estimate = Proportion(81, 263)
    assert (round(estimate.bound(Z95), 4), round(estimate.bound(-Z95), 4)) == (0.2553, 0.3662)


def test_mean_of_tasks_narrows_like_independent_samples() -> None:
    one = PairedTable(400, 20, 20)
    both = MeanOfTasks((one, one))
    assert both.bound(Z90) == pytest.approx(one.bound(Z90) / math.sqrt(2))


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_items_needed_are_enough_in_simulation() -> None:
    """5% discordant answers and a margin of two points: as many questions as it says pass no loss in 80% of trials."""
    needed = items_needed(PairedTable(2000, 50, 50), -0.02, 0.0, 0.05, power=0.8)
    assert 760 < needed < 900  # the plain normal formula gives 772
    draw = np.random.default_rng(6)
    gained, lost, _ = draw.multinomial(needed, [0.025, 0.025, 0.95], 2000).T
    passed = sum(PairedTable(needed, int(g), int(x)).statistic(-0.02) > Z90 for g, x in zip(gained, lost))
    assert 0.77 < passed / 2000 < 0.86


def test_what_is_detectable_is_what_the_items_are_needed_for() -> None:
    table = PairedTable(500, 12, 15)
    assert items_needed(table, -0.02, -0.02 + detectable(table, -0.02, 0.05), 0.05) == pytest.approx(500, rel=0.1)


def test_no_number_of_items_settles_what_lies_on_its_bound() -> None:
    assert items_needed(Mean(0.0, 0.1, 50, None), 0.1, 0.1, 0.05) is None


# --- looks ------------------------------------------------------------------------------------------------------------


def test_boundaries_agree_with_published_ones() -> None:
    # Lan and DeMets's Pocock-type spending, five equal looks, two-sided 5%, as the ldbounds package prints it.
    found = boundaries(0.025, (0.2, 0.4, 0.6, 0.8, 1.0))
    assert [round(z, 3) for z in found] == [2.438, 2.427, 2.410, 2.397, 2.386]


def test_one_look_is_an_ordinary_test() -> None:
    assert boundaries(0.05, (1.0,)) == (pytest.approx(Z90),)


@pytest.mark.parametrize("fractions", [(0.1, 0.2, 0.4, 0.8, 1.0), (0.5, 1.0), (0.9, 1.0)])
def test_looks_spend_alpha_between_them_and_no_more(fractions: tuple[float, ...]) -> None:
    assert crossing_probability(0.0, boundaries(0.05, fractions), fractions) == pytest.approx(0.05, abs=1e-5)
    assert spend(0.05, 1.0) == pytest.approx(0.05)


def test_boundaries_hold_in_simulation() -> None:
    fractions = (0.125, 0.25, 0.5, 1.0)
    limits = np.array(boundaries(0.05, fractions))
    steps = np.diff((0.0, *fractions))
    paths = np.cumsum(np.random.default_rng(5).normal(size=(200_000, 4)) * np.sqrt(steps), axis=1)
    crossed = (paths / np.sqrt(fractions) > limits).any(axis=1).mean()
    assert crossed == pytest.approx(0.05, abs=0.002)


def test_looking_early_costs_some_items() -> None:
    fractions = (0.25, 0.5, 1.0)
    factor = inflation(0.05, 0.8, fractions)
    assert 1.0 < factor < 1.3
    drift = (norm.ppf(0.95) + norm.ppf(0.8)) * math.sqrt(factor)
    assert crossing_probability(drift, boundaries(0.05, fractions), fractions) == pytest.approx(0.8, abs=1e-4)
