"""Evidence → verdicts → winner. Pure functions: no files, no clock, no rounding.

A condition passes when its confidence interval lies on the good side of its bound, fails when it lies on the bad side,
and is inconclusive otherwise. All conditions must pass, so the chance that a bad candidate passes is at most one
condition's (an intersection–union test: Berger, 1982). One failure fails a candidate, so failures are corrected for
their number (Holm, 1979). Where looks at growing data decide, each side spends its error probability over the looks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pennyweight.evaluate import estimates, looks
from pennyweight.evaluate.evidence import Evidence
from pennyweight.recipe import Recipe
from pennyweight.records import CandidateResult, ConditionResult, CostPoint, CostReport, RunStatus, Verdict
from pennyweight.statistics import Estimate, Mean, MeanOfTasks, PairedTable
from pennyweight.statistics.power import POWER, detectable, items_needed
from pennyweight.statistics.sequential import boundaries, inflation
from pennyweight.suite import DIVERGENCE_METRICS, Condition, source_of

Status = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True)
class Look:
    """All that was seen of a candidate, and of the base on the same items, up to one look."""

    ours: Evidence
    base: Evidence


def judge(
    recipe: Recipe, seen: list[Look], totals: dict[str, int], cost: CostReport | None, imitates_base: bool = True
) -> Verdict:
    """The verdict on one variant's candidate: all conditions must pass, and the SLO must be met at `decide_at`.

    One failed condition fails it; else one undecided condition leaves it inconclusive. Every condition gives a reason.
    """
    conditions = assess(recipe, seen, totals, imitates_base)
    outcomes: list[tuple[str, str]] = [(found.status, found.reason) for found in conditions]
    if cost is None:
        outcomes.append(("fail", "no cost was measured"))
    elif (point := point_at(cost, recipe.benchmark.decide_at)).slo_met is not None:
        outcomes.append(_check_slo(recipe, point))
    status = overall([status for status, _ in outcomes])
    reasons = [f"{outcome}: {reason}" for outcome, reason in outcomes]
    return Verdict(status=status, reasons=reasons, conditions=conditions)


def assess(
    recipe: Recipe, seen: list[Look], totals: dict[str, int], imitates_base: bool = True
) -> list[ConditionResult]:
    """What is known of each condition of the gate after the looks in `seen`.

    `totals`: source of evidence → how many items there are. `imitates_base`: whether divergence from the base is
    damage.
    """
    tests = [
        _Test(index, condition, names, recipe, totals)
        for index, condition in enumerate(recipe.gate)
        for names in ([[name] for name in condition.names] if condition.combine == "worst" else [condition.names])
    ]
    deciding = [test for test in tests if imitates_base or not test.only_informs]
    for number, look in enumerate(seen):
        open_tests = [test for test in deciding if test.status is None or test.status == "inconclusive"]
        for test in open_tests:
            test.look(number, look)
        _fail(open_tests, deciding)
    for test in tests:
        if test not in deciding:
            test.look(len(seen) - 1, seen[-1])
            test.status = "info"
    return [
        _combined(condition, [test.result() for test in tests if test.index == index])
        for index, condition in enumerate(recipe.gate)
    ]


def to_extend(recipe: Recipe, seen: list[Look], totals: dict[str, int], imitates_base: bool = True) -> set[str]:
    """Sources of evidence that the next look should draw more of: those of undecided conditions, unless others fail."""
    found = assess(recipe, seen, totals, imitates_base)
    if overall([condition.status for condition in found]) != "inconclusive":
        return set()
    sizes = recipe.evaluate.first_sizes()
    return {
        source_of(name)
        for condition, result in zip(recipe.gate, found)
        if result.status == "inconclusive"
        for name in condition.names
        if len(seen) < len(looks.sizes(sizes[source_of(name)], totals.get(source_of(name), 0)))
    }


def _fail(tests: list[_Test], deciding: list[_Test]) -> None:
    """Holm's step-down over all deciding tests: the worst statistic is held to α over their number, the next to α over
    one less, and so on (with looks: Maurer and Bretz, Statistics in Biopharmaceutical Research 5, 2013)."""
    failed = sum(test.status == "fail" for test in deciding)
    for test in sorted((test for test in tests if test.status == "inconclusive"), key=lambda test: test.z):
        if test.z > -test.critical(test.condition.alpha / (len(deciding) - failed)):
            return
        test.status = "fail"
        failed += 1


class _Test:
    """One hypothesis: a metric, or the mean of several, is on the good side of its bound."""

    def __init__(
        self, index: int, condition: Condition, names: list[str], recipe: Recipe, totals: dict[str, int]
    ) -> None:
        self.index, self.condition, self.names = index, condition, names
        self.status: str | None = None
        self.z = 0.0
        self._number_of_tests = sum(len(item.names) if item.combine == "worst" else 1 for item in recipe.gate)
        self.only_informs = condition.metric in DIVERGENCE_METRICS and not condition.for_every_variant
        self._higher = recipe.evaluate.metrics()[names[0]]
        self._fractions = (1.0,)
        if recipe.on_inconclusive == "extend":
            self._fractions = planned_fractions(recipe, [source_of(name) for name in names], totals)
        self._number = 0
        self._estimate: Estimate | None = None
        self._threshold, self._no_loss = 0.0, math.nan
        self._problem = ""

    def look(self, number: int, look: Look) -> None:
        self._number = min(number, len(self._fractions) - 1)
        self._estimate, self._threshold, self._no_loss = self._measure(look)
        if self._estimate is None:
            self.status, self._problem = "fail", f"{self._label} was not measured"
        elif not math.isfinite(self._estimate.value):
            self.status, self._problem = "fail", f"{self._label} is {self._estimate.value}, not a finite number"
        else:
            self.z = self._oriented(self._estimate, self._threshold)
            self.status = "pass" if self.z >= self.critical(self.condition.alpha) else "inconclusive"

    def critical(self, alpha: float) -> float:
        """Standard errors that a decision takes at this look."""
        return boundaries(alpha, self._fractions)[self._number]

    def _measure(self, look: Look) -> tuple[Estimate | None, float, float]:
        """(what is compared, what it is compared with, what it would be for a candidate as good as the base)"""
        condition, name = self.condition, self.names[0]
        sign = 1 if self._higher else -1
        bound = condition.max if condition.max is not None else condition.min
        if bound is not None:
            base = estimates.base_value(name, look.ours, look.base)
            return estimates.value_of(name, look.ours), bound, math.nan if base is None else base
        if condition.relative_within is not None:
            if condition.metric == "perplexity":
                return estimates.relative_perplexity(name, look.ours), 1 + condition.relative_within, 1.0
            base = estimates.base_value(name, look.ours, look.base) or math.nan
            share = 1 - sign * condition.relative_within
            return self._difference(name, look, share), 0.0, base * (1 - share)
        assert condition.non_inferior_within is not None
        parts = [self._difference(name, look) for name in self.names]
        whole = [part for part in parts if part is not None]
        estimate: Estimate | None = None
        if len(whole) == len(parts):
            estimate = whole[0] if len(whole) == 1 else MeanOfTasks(tuple(whole))
        return estimate, -sign * condition.non_inferior_within, 0.0

    @staticmethod
    def _difference(name: str, look: Look, share: float = 1.0) -> PairedTable | Mean | None:
        source = source_of(name)
        return estimates.difference(name, look.ours.of_task(source), look.base.of_task(source), share)

    def _oriented(self, estimate: Estimate, threshold: float) -> float:
        """The statistic, positive on the good side; infinite where the estimate is exact."""
        sign = 1 if self._higher else -1
        if estimate.bound(1.0) == estimate.bound(-1.0):
            return math.inf if sign * (estimate.value - threshold) >= 0 else -math.inf
        return sign * estimate.statistic(threshold)

    @property
    def _label(self) -> str:
        return self.names[0] if len(self.names) == 1 else f"mean({', '.join(self.names)})"

    def result(self) -> ConditionResult:
        assert self.status is not None
        if self._estimate is None or self._problem:
            return ConditionResult(
                name=self._label, status=self.status, reason=self._problem, higher_is_better=self._higher
            )
        alpha = self.condition.alpha
        critical = self.critical(alpha)
        good, bad = (critical, -critical) if self._higher else (-critical, critical)
        worst, best = self._estimate.bound(good), self._estimate.bound(bad)
        looked = len(self._fractions)
        extra = inflation(alpha, POWER, self._fractions) if looked > 1 else 1.0
        found = ConditionResult(
            name=self._label,
            status=self.status,
            reason="",
            higher_is_better=self._higher,
            value=self._estimate.value,
            threshold=self._threshold,
            worst=worst if math.isfinite(worst) else None,
            best=best if math.isfinite(best) else None,
            n=self._estimate.n,
            look=self._number + 1,
            looks=looked,
            detectable=estimates.finite(detectable(self._estimate, self._threshold, alpha) * math.sqrt(extra)),
            needed=self._needed(self._estimate, extra),
            needed_as_seen=items_needed(self._estimate, self._threshold, self._estimate.value, alpha, extra),
        )
        return found.model_copy(update={"reason": describe(self.condition, found, self._estimate)})

    def _needed(self, estimate: Estimate, extra: float) -> int | None:
        """Enough to pass the whole gate if as good as the base, and to fail it if twice as bad as allowed."""
        alpha, number = self.condition.alpha, self._number_of_tests
        passing = items_needed(estimate, self._threshold, self._no_loss, alpha, extra, POWER ** (1 / number))
        twice = 2 * self._threshold - self._no_loss
        failing = items_needed(estimate, self._threshold, twice, alpha / number, extra)
        return None if passing is None or failing is None else max(passing, failing)


def planned_fractions(recipe: Recipe, sources: list[str], totals: dict[str, int]) -> tuple[float, ...]:
    """Share of the final information after each look, for a mean over the sources (its variance is Σ 1/n)."""
    first = recipe.evaluate.first_sizes()
    seen = [looks.sizes(first[source], totals.get(source, 0) or first[source] or 1) for source in sources]
    count = max(map(len, seen))
    variance = [sum(1 / sizes[min(index, len(sizes) - 1)] for sizes in seen) for index in range(count)]
    return tuple(variance[-1] / one for one in variance)


def _combined(condition: Condition, parts: list[ConditionResult]) -> ConditionResult:
    """The worst of several tasks stands for all."""
    order = ["fail", "inconclusive", "pass", "info"]
    worst = min(parts, key=lambda part: order.index(part.status))
    if len(parts) == 1:
        return worst
    reason = "; ".join(part.reason for part in parts)
    return worst.model_copy(update={"name": condition.name, "reason": f"every one of {len(parts)}: {reason}"})


def describe(condition: Condition, found: ConditionResult, estimate: Estimate) -> str:
    """A condition's outcome in one sentence. Only the words are rounded."""
    assert found.value is not None and found.threshold is not None
    level = f"{condition.confidence:.0%}"
    if condition.max is not None or condition.min is not None:
        sign = ("≤" if found.value <= found.threshold else ">") if condition.max is not None else (
            "≥" if found.value >= found.threshold else "<"
        )  # fmt: skip
        seen = f"{found.name} {number(found.value)} {sign} {found.threshold:g}"
        margin = ""
    elif isinstance(estimate, PairedTable):
        seen = (
            f"{found.name} {number(found.value, True)} against the base on {found.n:,} questions "
            f"({estimate.gained} gained, {estimate.lost} lost)"
        )
        margin = f", margin {number(found.threshold, True)}"
    else:
        seen = f"{found.name} {number(found.value, True)} against the base on {found.n:,} items"
        margin = f", bound {number(found.threshold, True)}"
        if condition.metric == "perplexity":
            seen = f"{found.name} {number(found.value, digits=4)} times the base's"
            margin = f", bound {found.threshold:g}"
    seen += _bounds(found, level) + margin
    if found.detectable is not None and found.worst != found.best:
        seen += f"; minimum detectable {number(found.detectable, digits=2)}"
    if found.looks > 1:
        seen += f"; look {found.look} of {found.looks}"
    if found.status == "inconclusive":
        seen += f"; {_what_it_takes(found)}"
    return seen


def _bounds(found: ConditionResult, level: str) -> str:
    low, high = (found.worst, found.best) if found.higher_is_better else (found.best, found.worst)
    good, bad = ("above", "below") if found.higher_is_better else ("below", "above")
    if found.worst == found.best:
        return ""
    digits = 4 if found.value is not None and 0.5 < found.value < 2 else 3  # ratios near 1
    if found.status == "pass":
        return f"; at {level} confidence {good} {number(found.worst, digits=digits)}"
    if found.status == "fail":
        return f"; at {level} confidence {bad} {number(found.best, digits=digits)}"
    return f"; at {level} confidence between {number(low, digits=digits)} and {number(high, digits=digits)}"


def _what_it_takes(found: ConditionResult) -> str:
    """How many items would settle an undecided condition."""
    needed = found.needed_as_seen
    if needed is None or needed > 1000 * found.n:
        return "it lies on its bound, and no number of items would settle that"
    if found.worst == found.best or needed <= found.n:
        return "a few more items should settle it"
    return f"about {number(needed)} items would settle it, if it is what it seems"


def number(value: float | None, signed: bool = False, digits: int = 3) -> str:
    """A few digits, with a true minus sign; ∞ for a bound that the data do not give."""
    if value is None:
        return "∞"
    shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    return (f"+{shown}" if signed and value >= 0 else shown).replace("-", "−")


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
