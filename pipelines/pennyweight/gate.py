"""Reports → verdicts → winner. Pure functions: no files, no clock, no rounding."""

from __future__ import annotations

import math
from typing import Any

from pennyweight.evaluate.paired import PairedTable, non_inferiority_bounds
from pennyweight.recipe import Condition, Recipe
from pennyweight.records import CandidateResult, CostPoint, CostReport, QualityReport, RunStatus, Verdict

Samples = list[dict[str, Any]]


def judge(recipe: Recipe, quality: QualityReport, cost: CostReport | None, samples: Samples, base: Samples) -> Verdict:
    """The verdict on one variant's candidate: all conditions must pass, and the SLO must be met at `decide_at`.

    One failed condition fails it; else one undecided condition leaves it inconclusive. Every condition gives a reason.
    """
    outcomes = [check(condition, quality, samples, base) for condition in recipe.gate]
    if cost is None:
        outcomes.append(("fail", "no cost was measured"))
    elif (point := point_at(cost, recipe.benchmark.decide_at)).slo_met is not None:
        outcomes.append(_check_slo(recipe, point))
    statuses = {status for status, _ in outcomes}
    status = "fail" if "fail" in statuses else "inconclusive" if "inconclusive" in statuses else "pass"
    return Verdict(status=status, reasons=[f"{outcome}: {reason}" for outcome, reason in outcomes])


def check(condition: Condition, quality: QualityReport, samples: Samples, base: Samples) -> tuple[Any, str]:
    """(`pass`, `fail` or `inconclusive`, the reason in words and numbers) of one condition."""
    metric = quality.metrics.get(condition.name)
    if metric is None:
        return "fail", f"{condition.name} was not measured"
    if not math.isfinite(metric.value):
        return "fail", f"{condition.name} is {metric.value}, not a finite number"
    if condition.max is not None:
        passed = metric.value <= condition.max
        return _passed(passed), f"{condition.name} {metric.value:.4g} {'≤' if passed else '>'} {condition.max:g}"
    if condition.min is not None:
        passed = metric.value >= condition.min
        return _passed(passed), f"{condition.name} {metric.value:.4g} {'≥' if passed else '<'} {condition.min:g}"
    return _check_non_inferior(condition, samples, base)


def _check_non_inferior(condition: Condition, samples: Samples, base: Samples) -> tuple[Any, str]:
    """Whether the candidate is worse than the base by less than the margin, question by question.

    pass: the one-sided lower bound of the difference lies above −margin. fail: the upper bound lies below it.
    """
    margin = condition.non_inferior_within
    assert margin is not None
    ours, theirs = (
        {row["doc_id"]: row[condition.metric] for row in table if row["task"] == condition.task}
        for table in (samples, base)
    )
    if ours.keys() != theirs.keys() or not ours:
        return "fail", f"{condition.name}: the candidate and the base did not answer the same questions"
    table = PairedTable.from_scores([ours[doc] for doc in theirs], list(theirs.values()))
    low, high = non_inferiority_bounds(table, condition.confidence)
    # The comparisons are on the unrounded bounds; only the words are rounded.
    status = "pass" if low > -margin else "fail" if high < -margin else "inconclusive"
    seen = (
        f"{condition.name} {table.difference:+.3f} against the base on {table.n} questions "
        f"({table.gained} gained, {table.lost} lost)"
    )
    if status == "pass":
        return status, f"{seen}; at {condition.confidence:.0%} confidence above {low:+.3f}, margin −{margin:g}"
    if status == "fail":
        return status, f"{seen}; at {condition.confidence:.0%} confidence below {high:+.3f}, margin −{margin:g}"
    return status, f"{seen}; between {low:+.3f} and {high:+.3f}, which does not settle a margin of −{margin:g}"


def _check_slo(recipe: Recipe, point: CostPoint) -> tuple[Any, str]:
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


def _passed(passed: bool) -> str:
    return "pass" if passed else "fail"


def point_at(cost: CostReport, concurrency: int) -> CostPoint:
    return next(point for point in cost.points if point.concurrency == concurrency)


def cheapest_base(results: list[CandidateResult], decide_at: int) -> str | None:
    """The base's candidate that costs least at `decide_at`."""
    priced = [(point_at(r.cost, decide_at).usd_per_1m_tokens, r.id) for r in results if r.variant == "base" and r.cost]
    return min(priced)[1] if priced else None


def choose_winner(results: list[CandidateResult], decide_at: int) -> str | None:
    """The cheapest passing candidate whose saving's lower bound is above 0, at `decide_at`."""
    eligible = []
    for result in results:
        if result.verdict.status != "pass" or result.cost is None:
            continue
        point = point_at(result.cost, decide_at)
        if point.saving is not None and point.saving.low > 0:
            eligible.append((point.usd_per_1m_tokens, result.id))
    return min(eligible)[1] if eligible else None


def run_status(results: list[CandidateResult], winner: str | None) -> RunStatus:
    """How the run ended; `EXIT_CODES` says what the command exits with."""
    statuses = {result.verdict.status for result in results}
    if winner:
        return "partial" if "error" in statuses else "passed"
    if "error" in statuses:
        return "failed"
    if "inconclusive" in statuses:
        return "inconclusive"
    return "nothing-cheaper" if "pass" in statuses else "nothing-passed"


EXIT_CODES: dict[RunStatus, int] = {
    "passed": 0,
    "partial": 0,
    "failed": 4,
    "inconclusive": 3,
    "nothing-passed": 1,
    "nothing-cheaper": 1,
}
