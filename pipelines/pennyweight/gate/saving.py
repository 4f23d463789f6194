"""One hypothesis of the gate on cost: so much is saved against the cheapest base candidate, at one load."""

from __future__ import annotations

import math
from statistics import NormalDist

from pennyweight.benchmark import cost
from pennyweight.gate.winner import point_at
from pennyweight.gate.words import describe_saving
from pennyweight.recipe import Recipe
from pennyweight.records import ConditionResult, CostPoint, CostReport
from pennyweight.statistics import Mean
from pennyweight.statistics.power import POWER, items_needed
from pennyweight.suite import SavingCondition

_NORMAL = NormalDist()


class SavingHypothesis:
    """The saving is at least its bound. Judged on the logarithms of the rounds' cost ratios, where less is better."""

    only_informs = False

    def __init__(self, index: int, condition: SavingCondition, recipe: Recipe) -> None:
        self.index, self.condition = index, condition
        self.status: str | None = None
        self.z = 0.0
        self._concurrency = condition.concurrency or recipe.benchmark.decide_at
        self._bound = math.log(1 - condition.saving_at_least)
        self._point: CostPoint | None = None
        self._log: Mean | None = None

    def look(self, costs: CostReport) -> None:
        self._point = point_at(costs, self._concurrency)
        if not self._point.log_ratios:
            self.status = "fail"
            return
        self._log = cost.mean_log_ratio(self._point.log_ratios)
        self.z = -self._log.statistic(self._bound)
        low, _ = self._ends(self._log)
        self.status = "pass" if low >= self.condition.saving_at_least else "inconclusive"

    def critical(self, alpha: float) -> float:
        """Standard errors that a decision takes."""
        return _NORMAL.inv_cdf(1 - alpha)

    def _ends(self, log: Mean) -> tuple[float, float]:
        critical = self.critical(self.condition.alpha)
        return 1 - math.exp(log.bound(-critical)), 1 - math.exp(log.bound(critical))

    def result(self) -> ConditionResult:
        assert self.status is not None
        name = f"saving at {self._concurrency}"
        if self._log is None or self._point is None:
            reason = f"{name} was not measured: no base candidate to compare with"
            return ConditionResult(name=name, status=self.status, reason=reason, higher_is_better=True)
        low, high = self._ends(self._log)
        found = ConditionResult(
            name=name,
            status=self.status,
            reason="",
            higher_is_better=True,
            value=1 - math.exp(self._log.value),
            threshold=self.condition.saving_at_least,
            worst=low,
            best=high,
            n=self._log.n,
            detectable=self._detectable(self._log),
            needed_as_seen=self._rounds_needed(self._log),
        )
        return found.model_copy(update={"reason": describe_saving(self.condition, found, self._point.saving_against)})

    def _detectable(self, log: Mean) -> float:
        """How far above its bound a saving must lie for these rounds to see it: Student's quantiles, one for the error
        and one for the power."""
        levels = (self.critical(self.condition.alpha), _NORMAL.inv_cdf(POWER))
        distance = sum(log.value - log.bound(level) for level in levels)
        return (1 - self.condition.saving_at_least) * (1 - math.exp(-distance))

    def _rounds_needed(self, log: Mean) -> int | None:
        """Rounds that decide if the saving is what it seems; z²/2 more than for a known spread (Guenther, «Sample size
        formulas for normal theory t tests», The American Statistician 35, 1981)."""
        alpha = self.condition.alpha
        needed = items_needed(log, self._bound, log.value, alpha)
        return None if needed is None else needed + math.ceil(self.critical(alpha) ** 2 / 2)
