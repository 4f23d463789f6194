"""Conditions on a saving: arithmetic at the bounds, what they refuse, and where they are shown."""

import math
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from scipy.stats import nct, t
from test_gate import cost, look, text
from test_report import change_candidate, change_gate, make_record, read

from pennyweight import gate, junit, show
from pennyweight.compare import savings
from pennyweight.errors import RecipeError
from pennyweight.evaluate.evidence import Evidence
from pennyweight.gate import Look
from pennyweight.recipe import Recipe, load_recipe
from pennyweight.records import ConditionResult, CostReport, RunRecord
from pennyweight.report import facts
from pennyweight.tracking.naming import describe_condition

#: Mean −0.2, standard error 0.1/√3; t(0.975, 2) = 4.302653 makes an interval of −5.0% to 36.1% around 18.1%.
LOGS = [-0.1, -0.2, -0.3]
HALF = 4.302652729911275 * 0.1 / math.sqrt(3)
VALUE, LOW, HIGH = 1 - math.exp(-0.2), 1 - math.exp(-0.2 + HALF), 1 - math.exp(-0.2 - HALF)

QUALITY = {"task": "piqa", "metric": "acc"}


def recipe(*conditions: dict[str, Any], **changes: Any) -> Recipe:
    loaded = load_recipe("smollm2-135m-cpu")
    return Recipe.model_validate(loaded.dump() | {"gate": list(conditions), **changes})


def costs(*by_load: tuple[int, list[float]]) -> CostReport:
    one = cost(1.0, None).points[0]
    points = [
        one.model_copy(update={"concurrency": load, "log_ratios": logs, "saving_against": "base@r"})
        for load, logs in by_load
    ]
    return CostReport(candidate="a@b", usd_per_hour=1, points=points)


def judged(condition: dict[str, Any], logs: list[float] = LOGS, load: int = 1) -> ConditionResult:
    (found,) = gate.assess(recipe(condition), [Look(Evidence(), Evidence())], {}, costs=costs((load, logs)))
    return found


@pytest.mark.parametrize(
    ("bound", "status"),
    [
        (LOW - 1e-9, "pass"),
        (LOW + 1e-9, "inconclusive"),
        (VALUE, "inconclusive"),
        (HIGH - 1e-9, "inconclusive"),
        (HIGH + 1e-9, "fail"),
    ],
)
def test_the_interval_decides(bound: float, status: str) -> None:
    found = judged({"saving_at_least": bound})
    assert found.status == status
    assert (found.value, found.worst, found.best) == pytest.approx((VALUE, LOW, HIGH))
    assert (found.n, found.threshold, found.higher_is_better) == (3, bound, True)


def test_a_lower_end_that_is_the_bound_passes() -> None:
    low = judged({"saving_at_least": 0.0}).worst
    assert judged({"saving_at_least": low}).status == "pass"
    assert judged({"saving_at_least": math.nextafter(low, 1)}).status == "inconclusive"


@pytest.mark.parametrize(("bound", "status"), [(0.5, "pass"), (0.51, "fail")])
def test_rounds_that_agree_leave_nothing_open(bound: float, status: str) -> None:
    found = judged({"saving_at_least": bound}, [math.log(0.5)] * 3)
    assert (found.status, found.worst) == (status, found.best)


def test_confidence_moves_both_ends() -> None:
    found = judged({"saving_at_least": 0.0, "confidence": 0.8})
    half = 1.885618083 * 0.1 / math.sqrt(3)  # t(0.9, 2)
    assert (found.worst, found.best) == pytest.approx((1 - math.exp(-0.2 + half), 1 - math.exp(-0.2 - half)))
    assert "at 80% confidence" in found.reason


def test_it_is_judged_at_the_load_that_it_names() -> None:
    both = costs((1, [-1.0, -1.1, -1.2]), (8, [0.0, 0.1, 0.2]))
    first, second = gate.assess(
        recipe({"saving_at_least": 0.3}, {"saving_at_least": 0.3, "concurrency": 8}),
        [Look(Evidence(), Evidence())],
        {},
        costs=both,
    )
    assert (first.name, first.status) == ("saving at 1", "pass")
    assert (second.name, second.value) == ("saving at 8", pytest.approx(1 - math.exp(0.1)))


def test_without_a_base_to_compare_with_it_fails() -> None:
    found = judged({"saving_at_least": 0.3}, [])
    assert (found.status, found.value) == ("fail", None)
    assert "was not measured" in found.reason


def test_an_undecided_saving_says_how_many_rounds_it_takes() -> None:
    """As many as Student's test needs for 80% power: against the noncentral t, from the spread of the rounds."""
    found = judged({"saving_at_least": 0.1})
    distance = 0.2 + math.log(0.9)

    def power(rounds: int) -> float:
        return nct.sf(t.ppf(0.975, rounds - 1), rounds - 1, distance / 0.1 * math.sqrt(rounds))

    assert found.needed_as_seen == 13  # ((1.960 + 1.036) 0.1 / 0.0946)² is 10.02, and 1.96²/2 more
    assert 0.8 < power(found.needed_as_seen) < 0.92
    assert "; about 13 rounds would settle it, if it is what it seems" in found.reason
    assert "no number of rounds" in judged({"saving_at_least": VALUE}).reason


def test_what_these_rounds_could_have_seen() -> None:
    """A true saving at the detectable distance above the bound passes in more than 80% of cases."""
    logs = [-0.3 + 0.1 * step for step in (-1.5, -0.5, 0.5, 1.5, -1.5, -0.5, 0.5, 1.5)]
    found = judged({"saving_at_least": 0.2}, logs)
    spread = math.sqrt(sum((value + 0.3) ** 2 for value in logs) / 7)
    shift = -math.log(1 - (0.2 + found.detectable)) + math.log(0.8)
    assert 0.8 < nct.sf(t.ppf(0.975, 7), 7, shift / spread * math.sqrt(8)) < 0.9


# --- among other conditions -------------------------------------------------------------------------------------------


def test_a_verdict_joins_quality_and_saving() -> None:
    both = recipe({"metric": "kl_mean", "max": 0.1}, {"saving_at_least": 0.3}, benchmark=without_slo())
    seen = [look([1.0], scored=text())]
    sure, open_, none = [-1.0, -1.1, -1.2], LOGS, [0.1, 0.11, 0.12]
    for logs, status in ((sure, "pass"), (open_, "inconclusive"), (none, "fail")):
        verdict = gate.judge(both, seen, {}, costs((1, logs)))
        assert (verdict.status, [found.name for found in verdict.conditions]) == (status, ["kl_mean", "saving at 1"])
    unpriced = gate.judge(both, seen, {}, None)
    assert (unpriced.status, unpriced.reasons[-1]) == ("fail", "fail: no cost was measured")


def without_slo() -> dict[str, Any]:
    return load_recipe("smollm2-135m-cpu").dump()["benchmark"] | {"slo": None}


def test_failures_are_corrected_for_the_number_of_all_conditions() -> None:
    """What one test of two sides at 95% fails is not enough among four: Holm holds the worst to 2.5%/4."""
    barely = {"saving_at_least": HIGH + 0.01}
    others = [{**QUALITY, "non_inferior_within": 0.5 + step / 10} for step in range(3)]
    alone = judged(barely)
    four = gate.assess(recipe(barely, *others), [look([1.0] * 400)], {}, costs=costs((1, LOGS)))
    assert (alone.status, [found.status for found in four]) == ("fail", ["inconclusive", "pass", "pass", "pass"])
    lost = look([0.0] * 27 + [1.0] * 373)
    task = {**QUALITY, "non_inferior_within": 0.045}  # fails alone, and not among four
    assert gate.assess(recipe(task), [lost], {})[0].status == "fail"
    assert gate.assess(recipe(task, *[{"saving_at_least": 0.1}] * 3), [lost], {})[0].status == "inconclusive"


def test_an_undecided_saving_draws_no_questions() -> None:
    extending = recipe({"saving_at_least": 0.1}, {**QUALITY, "non_inferior_within": 0.05}, on_inconclusive="extend")
    totals = {"piqa": 4000}
    assert gate.to_extend(extending, [look([1.0] * 400)], totals) == set()
    assert gate.to_extend(extending, [look([1.0] * 20)], totals) == {"piqa"}
    found = gate.assess(extending, [look([1.0] * 400)], totals, costs=costs((1, LOGS)))
    assert [(one.status, one.looks) for one in found] == [("inconclusive", 1), ("pass", 6)]


# --- in a recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "path", "words"),
    [
        ({"saving_at_least": 30}, "gate.1.saving_at_least", "write 0.3 for 30%"),
        ({"saving_at_least": 1.0}, "gate.1.saving_at_least", "less than 1"),
        ({"saving_at_least": "30%"}, "gate.1.saving_at_least", "a valid number"),
        ({"saving_at_least": math.nan}, "gate.1.saving_at_least", "finite number"),
        ({"saving_at_least": 0.3, "task": "piqa"}, "gate.1.task", "unknown key 'task'"),
        ({"saving_at_least": 0.3, "max": 0.5}, "gate.1.max", "concurrency, confidence, saving_at_least"),
        ({"saving_at_least": 0.3, "concurency": 8}, "gate.1.concurency", "did you mean 'concurrency'?"),
        ({"saving_atleast": 0.3}, "gate.1.saving_atleast", "did you mean 'saving_at_least'?"),
        ({"saving_at_least": 0.3, "concurrency": 4}, "gate.1.concurrency", "4 is not measured"),
        ({"saving_at_least": 0.3, "confidence": 95}, "gate.1.confidence", "less than 1"),
        ({"metrik": "kl_mean", "max": 0.1}, "gate.1.metrik", "did you mean 'metric'?"),
    ],
)
def test_conditions_that_make_no_sense(condition: dict[str, Any], path: str, words: str) -> None:
    both = yaml.safe_dump([{"metric": "kl_mean", "max": 0.1}, condition], default_flow_style=True, width=1000)
    with pytest.raises(RecipeError) as caught:
        load_recipe("smollm2-135m-cpu", [f"gate={both}"])
    assert path in [problem.path for problem in caught.value.problems]
    assert words in str(caught.value)


def test_a_load_that_is_not_measured_is_found_with_the_other_problems() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("smollm2-135m-cpu", ["gate=[{saving_at_least: 0.3, concurrency: 4}]", "evaluate=nothing"])
    assert {"evaluate", "gate.0.concurrency"} <= {problem.path for problem in caught.value.problems}


def test_it_is_part_of_the_resolved_recipe() -> None:
    loaded = recipe({"saving_at_least": 0.3, "concurrency": 8}, {"metric": "kl_mean", "max": 0.1})
    assert Recipe.model_validate(loaded.dump()) == loaded
    assert loaded.dump()["gate"][0] == {"saving_at_least": 0.3, "concurrency": 8, "confidence": 0.95}
    assert describe_condition(loaded.dump()["gate"][0]) == "saving_at_least 0.3 at 8"


# --- where it is shown ------------------------------------------------------------------------------------------------


@pytest.fixture
def record() -> RunRecord:
    """A run whose winner's saving left a condition open."""
    open_ = recipe({"saving_at_least": 0.1}, {"metric": "kl_mean", "max": 0.1}, benchmark=without_slo())
    verdict = gate.judge(open_, [look([1.0], scored=text())], {}, costs((1, LOGS)))
    made = change_gate(make_record(status="inconclusive", winner=None, registered=None), open_.dump()["gate"])
    return change_candidate(made, "int8@onnxruntime", verdict=verdict)


def test_terminal_report_and_junit_show_it(record: RunRecord) -> None:
    words = "saving at 1 0.181 ≥ 0.1 against base@r on 3 rounds; at 95% confidence between −0.0496 and 0.361"
    assert f"inconclusive: {words}" in show.format_run(record)
    page = read(record)
    assert words in page.text
    assert "saving≥ 10%" in page.text
    suite = ElementTree.fromstring(junit.of_run(record).partition("\n")[2]).find("testsuite[@name='int8@onnxruntime']")
    cases = {case.get("name"): case.find("failure") for case in suite}
    assert cases["kl_mean"] is None
    assert cases["saving at 1"].get("type") == "inconclusive"
    assert words in cases["saving at 1"].get("message")


def test_two_candidates_of_a_run_are_compared_round_by_round() -> None:
    made = make_record()
    names = ("int8@onnxruntime", "int4-rtn@onnxruntime")
    for name, logs in zip(names, ([-0.1, -0.2, -0.3], [-0.4, -0.5, -0.6])):
        result = facts.by_id(made, name)
        point = result.cost.points[0].model_copy(update={"log_ratios": logs, "saving_against": "base@onnxruntime"})
        report = result.cost.model_copy(update={"points": [point]})
        made = change_candidate(made, name, cost=report)
    int8, int4, base = (facts.by_id(made, name) for name in (*names, "base@onnxruntime"))
    assert savings((made, int4), (made, int8)) == [
        ("saving against theirs at 1, 95% interval", "25.9% (25.9% to 25.9%)", "–")  # 1 − exp(−0.3), in every round
    ]
    assert savings((made, int8), (made, int8)) == []
    other = made.model_copy(update={"run_dir": "/runs/another"})
    assert savings((made, int4), (other, int8)) == []
    base = base.model_copy(
        update={"cost": base.cost.model_copy(update={"points": [base.cost.points[0].model_copy(update={"rounds": 3})]})}
    )
    assert savings((made, int8), (made, base))[0][1] == "18.1% (-5.0% to 36.1%)"
