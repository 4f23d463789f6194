"""One statistical hypothesis of the gate, judged at each look at the evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pennyweight.evaluate import estimates, looks
from pennyweight.evaluate.evidence import Evidence
from pennyweight.gate.words import describe
from pennyweight.recipe import Recipe
from pennyweight.records import ConditionResult
from pennyweight.statistics import Estimate, Mean, MeanOfTasks, PairedTable
from pennyweight.statistics.power import POWER, detectable, items_needed
from pennyweight.statistics.sequential import boundaries, inflation
from pennyweight.suite import Condition, source_of


@dataclass(frozen=True)
class Look:
    """All that was seen of a candidate, and of the base on the same items, up to one look."""

    ours: Evidence
    base: Evidence


class Hypothesis:
    """One hypothesis: a metric, or the mean of several, is on the good side of its bound."""

    def __init__(
        self, index: int, condition: Condition, names: list[str], recipe: Recipe, totals: dict[str, int]
    ) -> None:
        self.index, self.condition, self.names = index, condition, names
        self.status: str | None = None
        self.z = 0.0
        tests = (len(item.names) if item.combine == "worst" else 1 for item in recipe.quality_conditions)
        self._number_of_tests = sum(tests) + len(recipe.saving_conditions)
        self.only_informs = condition.needs_imitation
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
