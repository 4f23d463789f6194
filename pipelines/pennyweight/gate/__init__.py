"""Evidence → verdicts → winner. Pure functions: no files, no clock, no rounding.

A condition passes when its confidence interval lies on the good side of its bound, fails when it lies on the bad side,
and is inconclusive otherwise. All conditions must pass, so the chance that a bad candidate passes is at most one
condition's (an intersection–union test: Berger, 1982). One failure fails a candidate, so failures are corrected for
their number (Holm, 1979). Where looks at growing data decide, each side spends its error probability over the looks.
"""

from __future__ import annotations

from typing import Literal

from pennyweight.evaluate import looks
from pennyweight.gate.hypothesis import Hypothesis, Look
from pennyweight.gate.saving import SavingHypothesis
from pennyweight.gate.winner import EXIT_CODES, cheapest_base, choose_winner, point_at, run_status
from pennyweight.recipe import Recipe
from pennyweight.records import ConditionResult, CostPoint, CostReport, Verdict
from pennyweight.suite import Condition, SavingCondition, source_of

__all__ = [
    "EXIT_CODES",
    "Look",
    "assess",
    "cheapest_base",
    "choose_winner",
    "judge",
    "overall",
    "point_at",
    "run_status",
    "to_extend",
]

Status = Literal["pass", "fail", "inconclusive"]


def judge(
    recipe: Recipe, seen: list[Look], totals: dict[str, int], cost: CostReport | None, imitates_base: bool = True
) -> Verdict:
    """The verdict on one variant's candidate: all conditions must pass, and the SLO must be met at `decide_at`.

    One failed condition fails it; else one undecided condition leaves it inconclusive. Every condition gives a reason.
    """
    conditions = assess(recipe, seen, totals, imitates_base, cost)
    outcomes: list[tuple[str, str]] = [(found.status, found.reason) for found in conditions]
    if cost is None:
        outcomes.append(("fail", "no cost was measured"))
    elif (point := point_at(cost, recipe.benchmark.decide_at)).slo_met is not None:
        outcomes.append(_check_slo(recipe, point))
    status = overall([status for status, _ in outcomes])
    reasons = [f"{outcome}: {reason}" for outcome, reason in outcomes]
    return Verdict(status=status, reasons=reasons, conditions=conditions)


def assess(
    recipe: Recipe,
    seen: list[Look],
    totals: dict[str, int],
    imitates_base: bool = True,
    costs: CostReport | None = None,
) -> list[ConditionResult]:
    """What is known of each condition of the gate after the looks in `seen`.

    `totals`: source of evidence → how many items there are. `imitates_base`: whether divergence from the base is
    damage. Without `costs`, conditions on a saving are left out; they count among the tests all the same.
    """
    tests = [
        Hypothesis(index, condition, names, recipe, totals)
        for index, condition in enumerate(recipe.gate)
        if isinstance(condition, Condition)
        for names in ([[name] for name in condition.names] if condition.combine == "worst" else [condition.names])
    ]
    savings = [
        SavingHypothesis(index, condition, recipe)
        for index, condition in enumerate(recipe.gate)
        if isinstance(condition, SavingCondition)
    ]
    judged = [test for test in tests if imitates_base or not test.only_informs]
    deciding = [*judged, *savings]
    for number, look in enumerate(seen):
        for test in judged:
            if test.status in (None, "inconclusive"):
                test.look(number, look)
        _fail(deciding)
    if costs is not None:
        for saving in savings:
            saving.look(costs)
        _fail(deciding)
    for test in tests:
        if test not in judged:
            test.look(len(seen) - 1, seen[-1])
            test.status = "info"
    return [
        _combined(condition, parts)
        for index, condition in enumerate(recipe.gate)
        if (parts := [test.result() for test in [*tests, *savings] if test.index == index and test.status is not None])
    ]


def to_extend(recipe: Recipe, seen: list[Look], totals: dict[str, int], imitates_base: bool = True) -> set[str]:
    """Sources of evidence that the next look should draw more of: those of undecided conditions, unless others fail."""
    found = assess(recipe, seen, totals, imitates_base)
    if overall([condition.status for condition in found]) != "inconclusive":
        return set()
    sizes = recipe.evaluate.first_sizes()
    return {
        source_of(name)
        for condition, result in zip(recipe.quality_conditions, found)
        if result.status == "inconclusive"
        for name in condition.names
        if len(seen) < len(looks.sizes(sizes[source_of(name)], totals.get(source_of(name), 0)))
    }


def _fail(deciding: list[Hypothesis | SavingHypothesis]) -> None:
    """Holm's step-down over all deciding tests: the worst statistic is held to α over their number, the next to α over
    one less, and so on (with looks: Maurer and Bretz, Statistics in Biopharmaceutical Research 5, 2013)."""
    failed = sum(test.status == "fail" for test in deciding)
    for test in sorted((test for test in deciding if test.status == "inconclusive"), key=lambda test: test.z):
        if test.z > -test.critical(test.condition.alpha / (len(deciding) - failed)):
            return
        test.status = "fail"
        failed += 1


def _combined(condition: Condition | SavingCondition, parts: list[ConditionResult]) -> ConditionResult:
    """The worst of several tasks stands for all."""
    order = ["fail", "inconclusive", "pass", "info"]
    worst = min(parts, key=lambda part: order.index(part.status))
    if len(parts) == 1:
        return worst
    reason = "; ".join(part.reason for part in parts)
    return worst.model_copy(update={"name": condition.name, "reason": f"every one of {len(parts)}: {reason}"})


def _check_slo(recipe: Recipe, point: CostPoint) -> tuple[Status, str]:
    slo = recipe.benchmark.slo
    assert slo is not None
    parts = []
    for name, limit, value in (
        ("TTFT p95", slo.ttft_p95_ms, point.ttft_ms.p95),
        ("TPOT p95", slo.tpot_p95_ms, point.tpot_ms.p95),
    ):
        if limit is not None:
            parts.append(f"{name} {value:.0f} ms {'≤' if value <= limit else '>'} {limit:g} ms")
    return _passed(bool(point.slo_met)), f"at concurrency {point.concurrency}, {', '.join(parts)}"


def _passed(passed: bool) -> Status:
    return "pass" if passed else "fail"


def overall(statuses: list[str]) -> Status:
    """One verdict of many: what only informs does not count."""
    return "fail" if "fail" in statuses else "inconclusive" if "inconclusive" in statuses else "pass"
