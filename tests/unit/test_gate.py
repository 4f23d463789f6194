import math

import pytest

from pennyweight import gate
from pennyweight.recipe import Condition, Recipe
from pennyweight.records import (
    CandidateResult,
    CostPoint,
    CostReport,
    Interval,
    MetricValue,
    Percentiles,
    QualityReport,
    Verdict,
)


def quality(**values: float) -> QualityReport:
    metrics = {name: MetricValue(value=value, n=10, higher_is_better=False) for name, value in values.items()}
    return QualityReport(
        candidate="a@b", metrics=metrics, samples_path="", samples_digest="", tokens_scored=0, seconds=0
    )


def answers(correct: list[int]) -> list[dict[str, object]]:
    return [{"task": "piqa", "doc_id": index, "acc": float(value)} for index, value in enumerate(correct)]


def point(usd: float, saving: tuple[float, float, float] | None, slo_met: bool | None = None) -> CostPoint:
    both = Percentiles(p50=10, p95=20)
    return CostPoint(
        concurrency=1, input_tokens=64, output_tokens=32, rounds=3, output_tokens_per_second=10,
        total_tokens_per_second=30, prefill_tokens_per_second=100, decode_tokens_per_second=12, ttft_ms=both,
        tpot_ms=both, slo_met=slo_met, usd_per_1m_tokens=usd, usd_per_1m_output_tokens=usd * 3,
        saving=Interval(value=saving[0], low=saving[1], high=saving[2]) if saving else None,
    )  # fmt: skip


def cost(
    usd: float, saving: tuple[float, float, float] | None = (0.5, 0.4, 0.6), slo: bool | None = None
) -> CostReport:
    return CostReport(candidate="a@b", usd_per_hour=1, points=[point(usd, saving, slo)])


def result(name: str, status: str, report: CostReport | None, variant: str = "v") -> CandidateResult:
    return CandidateResult(
        id=name, variant=variant, runtime="r", checkpoint=None, candidate=None, quality=None, cost=report,
        verdict=Verdict(status=status, reasons=[]),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "bound", "status"),
    [
        (0.1, {"max": 0.1}, "pass"),
        (math.nextafter(0.1, 1), {"max": 0.1}, "fail"),
        (0.1, {"min": 0.1}, "pass"),
        (math.nextafter(0.1, 0), {"min": 0.1}, "fail"),
        (math.nan, {"max": 1.0}, "fail"),
        (math.inf, {"min": 1.0}, "fail"),
        (-math.inf, {"max": 1.0}, "fail"),
    ],
)
def test_thresholds_compare_unrounded_numbers_and_fail_what_is_not_one(value: float, bound: dict, status: str) -> None:
    assert gate.check(Condition(metric="kl_mean", **bound), quality(kl_mean=value), [], [])[0] == status


def test_a_metric_that_was_not_measured_fails() -> None:
    assert gate.check(Condition(metric="kl_mean", max=1.0), quality(), [], []) == ("fail", "kl_mean was not measured")


@pytest.mark.parametrize(
    ("candidate", "base", "margin", "status"),
    [
        ([1] * 400, [1] * 400, 0.02, "pass"),
        ([1] * 20, [1] * 20, 0.02, "inconclusive"),  # no answer differs, and yet 20 questions cannot see 2 points
        ([0] * 100 + [1] * 300, [1] * 400, 0.02, "fail"),
    ],
)
def test_non_inferiority(candidate: list[int], base: list[int], margin: float, status: str) -> None:
    condition = Condition(task="piqa", metric="acc", non_inferior_within=margin)
    report = quality(**{"piqa/acc": 0.5})
    assert gate.check(condition, report, answers(candidate), answers(base))[0] == status


def test_answers_to_other_questions_are_not_compared() -> None:
    condition = Condition(task="piqa", metric="acc", non_inferior_within=0.1)
    status, reason = gate.check(condition, quality(**{"piqa/acc": 0.5}), answers([1, 1]), answers([1, 1, 1]))
    assert status == "fail"
    assert "same questions" in reason


def test_one_failed_condition_fails_and_one_undecided_leaves_open(two_conditions: Recipe) -> None:
    few, many = answers([1] * 10), answers([1] * 400)
    ok, bad = (quality(**{"kl_mean": value, "piqa/acc": 1.0}) for value in (0.01, 0.5))
    assert gate.judge(two_conditions, ok, cost(1.0, slo=True), many, many).status == "pass"
    assert gate.judge(two_conditions, ok, cost(1.0, slo=True), few, few).status == "inconclusive"
    assert gate.judge(two_conditions, bad, cost(1.0, slo=True), few, few).status == "fail"
    assert gate.judge(two_conditions, ok, cost(1.0, slo=False), many, many).status == "fail"
    assert gate.judge(two_conditions, ok, None, many, many).status == "fail"


def test_winner_is_the_cheapest_that_passed_and_is_surely_cheaper() -> None:
    results = [
        result("base@r", "base", cost(9.0, None), "base"),
        result("failed@r", "fail", cost(1.0)),
        result("unsure@r", "pass", cost(2.0, (0.1, -0.1, 0.3))),
        result("dear@r", "pass", cost(4.0)),
        result("good@r", "pass", cost(3.0)),
    ]
    assert gate.choose_winner(results, 1) == "good@r"
    assert gate.cheapest_base(results, 1) == "base@r"


@pytest.mark.parametrize(
    ("statuses", "winner", "status", "code"),
    [
        (["base", "pass"], "w", "passed", 0),
        (["base", "pass", "error"], "w", "partial", 0),
        (["base", "error", "inconclusive"], None, "failed", 4),
        (["base", "fail", "inconclusive"], None, "inconclusive", 3),
        (["base", "fail", "pass"], None, "nothing-cheaper", 1),
        (["base", "fail"], None, "nothing-passed", 1),
    ],
)
def test_run_status_and_exit_code(statuses: list[str], winner: str | None, status: str, code: int) -> None:
    found = gate.run_status([result(str(i), each, None) for i, each in enumerate(statuses)], winner)
    assert (found, gate.EXIT_CODES[found]) == (status, code)


@pytest.fixture
def two_conditions() -> Recipe:
    from pennyweight.recipe import load_recipe

    recipe = load_recipe("smollm2-135m-cpu")
    conditions = [
        Condition(metric="kl_mean", max=0.1),
        Condition(task="piqa", metric="acc", non_inferior_within=0.05),
    ]
    return recipe.model_copy(update={"gate": conditions})
