import math
from itertools import pairwise

import pytest

from pennyweight.benchmark import cost, rounds_at, turns
from pennyweight.recipe import load_recipe
from pennyweight.records import Interval


def paired_saving(candidate: list[float], base: list[float], confidence: float = 0.95) -> Interval:
    return cost.saving_of(cost.log_ratios(candidate, base), confidence)


def test_dollars_per_million_tokens() -> None:
    # A machine of $3.60 an hour is $0.001 a second; 1,000 tokens in 2 seconds are 2 millionths of a dollar each.
    assert cost.usd_per_million(3.60, tokens=1000, seconds=2.0) == pytest.approx(2.0)


def test_saving_of_constant_ratios_has_no_width() -> None:
    saving = paired_saving([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert (saving.value, saving.low, saving.high) == pytest.approx((0.5, 0.5, 0.5))


def test_saving_interval_against_hand_arithmetic() -> None:
    # Logs of the ratios are −0.1, −0.2, −0.3: mean −0.2, standard error 0.1/√3, t(0.975, 2) = 4.302653.
    saving = paired_saving([math.exp(-0.1), math.exp(-0.2), math.exp(-0.3)], [1.0, 1.0, 1.0])
    half = 4.302652729911275 * 0.1 / math.sqrt(3)
    assert saving.value == pytest.approx(1 - math.exp(-0.2))
    assert saving.low == pytest.approx(1 - math.exp(-0.2 + half))
    assert saving.high == pytest.approx(1 - math.exp(-0.2 - half))
    # At 80% confidence, t(0.9, 2) = 1.885618.
    narrow = paired_saving([math.exp(-0.1), math.exp(-0.2), math.exp(-0.3)], [1.0, 1.0, 1.0], confidence=0.8)
    assert narrow.low == pytest.approx(1 - math.exp(-0.2 + 1.885618083 * 0.1 / math.sqrt(3)))


def test_a_drift_that_hits_both_alike_changes_nothing() -> None:
    drift = [1.0, 1.7, 0.8, 1.2]
    steady = paired_saving([0.5, 0.6, 0.5, 0.6], [1.0, 1.1, 1.0, 1.1])
    drifting = paired_saving(
        [a * d for a, d in zip([0.5, 0.6, 0.5, 0.6], drift)], [a * d for a, d in zip([1.0, 1.1, 1.0, 1.1], drift)]
    )
    assert drifting.model_dump() == pytest.approx(steady.model_dump())


def test_turns_are_balanced_and_each_candidate_has_equally_many() -> None:
    settings = load_recipe("smollm2-135m-cpu").benchmark
    order = list(turns(settings, ["a", "b", "c"]))
    at_one = [(number, name) for concurrency, number, name in order if concurrency == 1]
    assert "".join(name for _, name in at_one[:21]) == "abc" + "abccbacbaabc" + "abccba"  # the first three warm up
    ends = ["".join(name for number, name in at_one if number == one) for one in range(8)]
    # A round begins with the candidate that ended the one before every other time only.
    assert [one[-1] == two[0] for one, two in pairwise(ends)] == [True, False, True, False, True, False, True]
    for concurrency in settings.concurrency:
        names = [name for at, number, name in order if at == concurrency and number >= 0]
        assert {names.count(name) for name in "abc"} == {rounds_at(settings, concurrency)}
