import math

import numpy as np
import pytest

from pennyweight import gate
from pennyweight.errors import StageError
from pennyweight.evaluate.evidence import Evidence, ScoredText
from pennyweight.gate import Look
from pennyweight.recipe import Recipe, load_recipe
from pennyweight.records import (
    CandidateResult,
    ConditionResult,
    CostPoint,
    CostReport,
    Interval,
    Percentiles,
    Verdict,
)
from pennyweight.suite import Condition, Generation


def answers(correct: list[float], task: str = "piqa", metric: str = "acc") -> list[dict[str, object]]:
    return [
        {"task": task, "doc_id": index, "doc_hash": str(index), metric: float(value)}
        for index, value in enumerate(correct)
    ]


def text(kl: float = 0.01, gap: float = 0.0, spread: float = 0.1, windows: int = 40) -> ScoredText:
    """Windows of one document each, whose KL is about `kl` and whose next tokens are `gap` nats more surprising."""
    draw = np.random.default_rng(0)
    shape = (windows, 16)
    noise = draw.normal(1, spread, shape)
    noise += 1 - noise.mean()
    base = np.full((windows, 15), 3.0)
    documents = np.repeat(np.arange(windows), 16).reshape(shape)
    return ScoredText(base + gap * noise[:, 1:], base, documents, kl * noise, np.ones(shape, bool))


def look(
    correct: list[float], base: list[float] | None = None, scored: ScoredText | None = None, **more: object
) -> Look:
    theirs = answers([1.0] * len(correct) if base is None else base, **more)
    texts = {} if scored is None else {"divergence": scored}
    return Look(Evidence(texts, answers(correct, **more)), Evidence({}, theirs))


def recipe_with(gate_: list[Condition], **changes: object) -> Recipe:
    return load_recipe("smollm2-135m-cpu").model_copy(update={"gate": gate_, **changes})


def assess(condition: Condition, *looks: Look, **changes: object) -> list[ConditionResult]:
    return gate.assess(recipe_with([condition], **changes), list(looks), {"piqa": 400, "divergence": 160})


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
    ("kl", "bound", "status"),
    [
        (0.05, {"max": 0.1}, "pass"),
        (0.2, {"max": 0.1}, "fail"),
        (0.1, {"max": 0.1}, "inconclusive"),
        (0.0999, {"max": 0.1}, "inconclusive"),  # below the bound, and yet not surely
    ],
)
def test_a_threshold_is_judged_by_the_interval(kl: float, bound: dict, status: str) -> None:
    (found,) = assess(Condition(metric="kl_mean", **bound), look([1.0], scored=text(kl)))
    assert found.status == status
    assert found.value == pytest.approx(kl)


@pytest.mark.parametrize(("bound", "status"), [(0.125, "pass"), (math.nextafter(0.125, 0), "fail")])
def test_numbers_without_spread_are_compared_unrounded(bound: float, status: str) -> None:
    (found,) = assess(Condition(metric="kl_mean", max=bound), look([1.0], scored=text(kl=0.125, spread=0.0)))
    assert found.status == status


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_finite_number_fails_with_its_reason(value: float) -> None:
    scored = text()
    scored.kl[0, 0] = value
    (found,) = assess(Condition(metric="kl_mean", max=1.0), look([1.0], scored=scored))
    assert found.status == "fail"
    assert "not a finite number" in found.reason


def test_a_metric_that_was_not_measured_fails() -> None:
    (found,) = assess(Condition(metric="kl_mean", max=1.0), look([1.0]))
    assert (found.status, found.reason) == ("fail", "kl_mean was not measured")


@pytest.mark.parametrize(
    ("candidate", "base", "margin", "status"),
    [
        ([1] * 400, [1] * 400, 0.02, "pass"),
        ([1] * 20, [1] * 20, 0.02, "inconclusive"),  # no answer differs, and yet 20 questions cannot see 2 points
        ([0] * 100 + [1] * 300, [1] * 400, 0.02, "fail"),
    ],
)
def test_non_inferiority(candidate: list[float], base: list[float], margin: float, status: str) -> None:
    (found,) = assess(Condition(task="piqa", metric="acc", non_inferior_within=margin), look(candidate, base))
    assert found.status == status
    assert (found.status == "pass") == (found.worst > -margin)


def test_less_is_better_turns_the_test_around() -> None:
    condition = Condition(task="generation", metric="surprise", non_inferior_within=0.1)
    suite = load_recipe("smollm2-135m-cpu").evaluate.model_copy(
        update={"generation": Generation(text="xsum-documents")}
    )
    draw = np.random.default_rng(1).normal(0, 0.05, 50)
    for shift, status in ((0.0, "pass"), (-1.0, "pass"), (0.3, "fail")):
        seen = look(list(2 + shift + draw), [2.0] * 50, task="generation", metric="surprise")
        (found,) = assess(condition, seen, evaluate=suite)
        assert found.status == status


@pytest.mark.parametrize(("ratio", "status"), [(1.01, "pass"), (1.10, "fail"), (1.05, "inconclusive")])
def test_perplexity_relative_to_the_base(ratio: float, status: str) -> None:
    (found,) = assess(
        Condition(metric="perplexity", relative_within=0.05), look([1.0], scored=text(gap=math.log(ratio)))
    )
    assert found.status == status
    assert found.value == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize(("right", "status"), [(199, "pass"), (150, "fail"), (191, "inconclusive")])
def test_accuracy_relative_to_the_base(right: int, status: str) -> None:
    """The base has 200 of 400 right; at least 0.95 of that is asked for."""
    base = [1.0] * 200 + [0.0] * 200
    ours = [1.0] * right + [0.0] * (400 - right)
    (found,) = assess(Condition(task="piqa", metric="acc", relative_within=0.05), look(ours, base))
    assert found.status == status


def test_mean_and_worst_of_several_tasks() -> None:
    good, bad = answers([1.0] * 400), answers([0.0] * 30 + [1.0] * 370, task="openbookqa")
    base = answers([1.0] * 400) + answers([1.0] * 400, task="openbookqa")
    seen = Look(Evidence({}, good + bad), Evidence({}, base))
    tasks = {"tasks": ["piqa", "openbookqa"], "metric": "acc", "non_inferior_within": 0.06}
    (mean,) = assess(Condition(**tasks), seen)
    (worst,) = assess(Condition(**tasks, combine="worst"), seen)
    assert (mean.status, mean.value) == ("pass", pytest.approx(-0.0375))
    assert worst.status == "inconclusive"
    assert "piqa/acc" in worst.reason
    assert "openbookqa/acc" in worst.reason


def test_answers_to_other_questions_are_not_compared() -> None:
    with pytest.raises(StageError, match="same items"):
        assess(Condition(task="piqa", metric="acc", non_inferior_within=0.1), look([1.0, 1.0], [1.0] * 3))


def test_divergence_only_informs_on_what_is_not_meant_to_imitate_the_base() -> None:
    recipe = recipe_with([Condition(metric="kl_mean", max=0.1)])
    seen = [look([1.0], scored=text(kl=0.5))]
    assert gate.judge(recipe, seen, {}, cost(1.0, slo=True), imitates_base=True).status == "fail"
    assert gate.judge(recipe, seen, {}, cost(1.0, slo=True), imitates_base=False).status == "pass"
    strict = recipe_with([Condition(metric="kl_mean", max=0.1, for_every_variant=True)])
    assert gate.judge(strict, seen, {}, cost(1.0, slo=True), imitates_base=False).status == "fail"


def test_one_failed_condition_fails_and_one_undecided_leaves_open() -> None:
    recipe = recipe_with(
        [Condition(metric="kl_mean", max=0.1), Condition(task="piqa", metric="acc", non_inferior_within=0.05)]
    )
    few, many = look([1.0] * 10, scored=text()), look([1.0] * 400, scored=text())
    bad = look([1.0] * 10, scored=text(kl=0.5))
    assert gate.judge(recipe, [many], {}, cost(1.0, slo=True)).status == "pass"
    assert gate.judge(recipe, [few], {}, cost(1.0, slo=True)).status == "inconclusive"
    assert gate.judge(recipe, [bad], {}, cost(1.0, slo=True)).status == "fail"
    assert gate.judge(recipe, [many], {}, cost(1.0, slo=False)).status == "fail"
    assert gate.judge(recipe, [many], {}, None).status == "fail"


def test_failures_are_corrected_for_their_number() -> None:
    """A loss that one test at 5% would fail is not enough among four: Holm holds the worst to 5%/4."""
    seen = look([0.0] * 27 + [1.0] * 373)
    one = Condition(task="piqa", metric="acc", non_inferior_within=0.045)
    assert gate.assess(recipe_with([one]), [seen], {})[0].status == "fail"
    four = [one, *(Condition(task="piqa", metric="acc", non_inferior_within=0.5 + i / 10) for i in range(3))]
    assert [found.status for found in gate.assess(recipe_with(four), [seen], {})] == [
        "inconclusive", "pass", "pass", "pass",
    ]  # fmt: skip


def test_an_undecided_condition_says_what_it_takes() -> None:
    (found,) = assess(Condition(task="piqa", metric="acc", non_inferior_within=0.02), look([1.0] * 20))
    assert found.needed > 20
    assert found.detectable > 0.02
    assert "items would settle it" in found.reason


# --- looks ------------------------------------------------------------------------------------------------------------


def test_looks_widen_the_interval_and_decide_once() -> None:
    condition = Condition(task="piqa", metric="acc", non_inferior_within=0.05)
    first, second = look([1.0] * 50), look([1.0] * 100)
    (single,) = assess(condition, first)
    (early,) = assess(condition, first, on_inconclusive="extend")
    (later,) = assess(condition, first, second, on_inconclusive="extend")
    assert early.worst < single.worst
    assert (early.status, early.looks) == ("inconclusive", 3)  # of 400: 150, 300, 400
    assert (later.status, later.look) == ("pass", 2)


def test_what_passed_at_one_look_is_not_judged_again() -> None:
    condition = Condition(task="piqa", metric="acc", non_inferior_within=0.05)
    good, bad = look([1.0] * 200), look([0.0] * 100 + [1.0] * 300)
    (found,) = assess(condition, good, bad, on_inconclusive="extend")
    assert (found.status, found.n) == ("pass", 200)


def test_only_what_is_undecided_is_extended() -> None:
    conditions = [
        Condition(metric="kl_mean", max=0.1),
        Condition(task="piqa", metric="acc", non_inferior_within=0.02),
    ]
    recipe = recipe_with(conditions, on_inconclusive="extend")
    totals = {"piqa": 400, "divergence": 160, "openbookqa": 100}
    assert gate.to_extend(recipe, [look([1.0] * 100, scored=text())], totals) == {"piqa"}
    assert gate.to_extend(recipe, [look([1.0] * 100, scored=text(kl=0.5))], totals) == set()  # failed already
    three = [look([1.0] * n, scored=text()) for n in (100, 110, 120)]
    assert gate.to_extend(recipe, three, totals) == set()  # nothing is left to draw


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
