"""What a run's record says, in the form that the report's tables and plots ask for. Nothing here raises on gaps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pennyweight.pareto import pareto_front
from pennyweight.records import CandidateResult, CostPoint, MetricValue, RunRecord
from pennyweight.suite import metrics_of_condition


@dataclass(frozen=True)
class Threshold:
    """A condition of the gate on the plotted metric. Values beyond `value` fail: above it, or below it.

    `exact` is False for a margin, where a paired test decides and a point near the line may fall on either side.
    """

    value: float
    fails_above: bool
    label: str
    exact: bool = True


@dataclass(frozen=True)
class QualityAxis:
    """The metric that quality is plotted by, and the gate's conditions on it."""

    metric: str
    higher_is_better: bool
    log: bool
    thresholds: tuple[Threshold, ...]


@dataclass(frozen=True)
class TradeOff:
    """One candidate in the plane of cost (USD per 1M tokens at `decide_at`) and quality."""

    result: CandidateResult
    cost: float
    low: float | None
    high: float | None
    quality: float


def section(record: RunRecord, name: str) -> dict[str, Any]:
    value = record.recipe.resolved.get(name)
    return value if isinstance(value, dict) else {}


def gate(record: RunRecord) -> list[dict[str, Any]]:
    """The gate's conditions, each with its metric's full `name`."""
    conditions = record.recipe.resolved.get("gate")
    if not isinstance(conditions, list):
        return []
    return [
        {**_as_ratio(item), "name": name}
        for item in conditions
        if isinstance(item, dict) and "metric" in item
        for name in metrics_of_condition(item)
    ]


def saving_bounds(record: RunRecord) -> list[float]:
    """The gate's conditions on the saving at the load that decides."""
    conditions = record.recipe.resolved.get("gate")
    loads = (None, decide_at(record))
    return [
        item["saving_at_least"]
        for item in (conditions if isinstance(conditions, list) else [])
        if isinstance(item, dict) and "saving_at_least" in item and item.get("concurrency") in loads
    ]


def _as_ratio(item: dict[str, Any]) -> dict[str, Any]:
    """A perplexity relative to the base's is shown as the ratio of the two, which has a bound of its own."""
    if item["metric"] != "perplexity" or item.get("relative_within") is None:
        return item
    return {**item, "metric": "perplexity_ratio", "max": 1 + item["relative_within"], "relative_within": None}


def concurrencies(record: RunRecord) -> list[int]:
    """All loads that any candidate was measured at, ascending."""
    return sorted({point.concurrency for result in record.candidates if result.cost for point in result.cost.points})


def decide_at(record: RunRecord) -> int | None:
    """The load that the winner is chosen at; the lightest measured where the recipe does not say."""
    declared = section(record, "benchmark").get("decide_at")
    return declared if declared is not None else next(iter(concurrencies(record)), None)


def point_at(result: CandidateResult | None, concurrency: int | None) -> CostPoint | None:
    if result is None or result.cost is None:
        return None
    return next((point for point in result.cost.points if point.concurrency == concurrency), None)


def by_id(record: RunRecord, candidate: str | None) -> CandidateResult | None:
    return next((result for result in record.candidates if result.id == candidate), None)


def cheapest_base(record: RunRecord) -> CandidateResult | None:
    """The base candidate that savings are against."""
    named = by_id(record, record.base)
    if named is not None:
        return named
    load = decide_at(record)
    bases = [(point.usd_per_1m_tokens, index) for index, point in _points(record, load, "base")]
    return record.candidates[min(bases)[1]] if bases else None


def cheapest(record: RunRecord, concurrency: int) -> set[str]:
    """Ids of the cheapest candidates at a load, among those that may be served: the base's and those that passed."""
    points = [*_points(record, concurrency, "base"), *_points(record, concurrency, "pass")]
    costs = [point.usd_per_1m_tokens for _, point in points if math.isfinite(point.usd_per_1m_tokens)]
    return {record.candidates[index].id for index, point in points if costs and point.usd_per_1m_tokens == min(costs)}


def metric_names(record: RunRecord) -> list[str]:
    """All measured metrics, in the order in which they were first recorded."""
    names: dict[str, None] = {}
    for result in record.candidates:
        names.update(dict.fromkeys(result.quality.metrics if result.quality else ()))
    return list(names)


def metric_of(result: CandidateResult | None, name: str) -> MetricValue | None:
    return result.quality.metrics.get(name) if result is not None and result.quality else None


def quality_axis(record: RunRecord) -> QualityAxis | None:
    """Mean KL divergence where it was measured, else the first metric of the gate, else the first measured."""
    measured = metric_names(record)
    wanted = ["kl_mean", *(item["name"] for item in gate(record)), *measured]
    name = next((name for name in wanted if name in measured), None)
    if name is None:
        return None
    higher = next(metric.higher_is_better for result in record.candidates if (metric := metric_of(result, name)))
    thresholds = [_threshold(record, item, higher) for item in gate(record) if item["name"] == name]
    return QualityAxis(name, higher, name == "kl_mean", tuple(item for item in thresholds if item is not None))


def trade_offs(record: RunRecord, axis: QualityAxis) -> list[TradeOff]:
    """Candidates that have both a finite cost at `decide_at` and a finite quality."""
    load = decide_at(record)
    found = []
    for result in record.candidates:
        point, metric = point_at(result, load), metric_of(result, axis.metric)
        if point is None or metric is None:
            continue
        if math.isfinite(point.usd_per_1m_tokens) and math.isfinite(metric.value):
            found.append(TradeOff(result, point.usd_per_1m_tokens, *_cost_interval(record, point), metric.value))
    return found


def front(points: list[TradeOff], axis: QualityAxis) -> list[TradeOff]:
    """The candidates that none beats in both cost and quality, cheapest first."""
    sign = -1.0 if axis.higher_is_better else 1.0
    return [points[index] for index in pareto_front([(point.cost, sign * point.quality) for point in points])]


def front_ids(record: RunRecord) -> set[str]:
    axis = quality_axis(record)
    return {point.result.id for point in front(trade_offs(record, axis), axis)} if axis else set()


def _points(record: RunRecord, concurrency: int | None, status: str) -> list[tuple[int, CostPoint]]:
    found = ((index, point_at(result, concurrency)) for index, result in enumerate(record.candidates))
    return [(index, point) for index, point in found if point and record.candidates[index].verdict.status == status]


def _cost_interval(record: RunRecord, point: CostPoint) -> tuple[float | None, float | None]:
    """The saving's interval as costs: the base's cost × (1 − saving)."""
    against = point_at(by_id(record, point.saving_against), point.concurrency)
    if point.saving is None or against is None:
        return None, None
    low, high = (against.usd_per_1m_tokens * (1 - saving) for saving in (point.saving.high, point.saving.low))
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (None, None)


def _threshold(record: RunRecord, item: dict[str, Any], higher_is_better: bool) -> Threshold | None:
    name = item["name"]
    if item.get("max") is not None:
        return Threshold(item["max"], True, f"the gate fails {name} above {item['max']:g}")
    if item.get("min") is not None:
        return Threshold(item["min"], False, f"the gate fails {name} below {item['min']:g}")
    margin = item.get("non_inferior_within")
    base = next((m.base for r in record.candidates if (m := metric_of(r, name)) and m.base is not None), None)
    if margin is None or base is None or not math.isfinite(base):
        return None
    value = base - margin if higher_is_better else base + margin
    return Threshold(value, not higher_is_better, f"the gate's margin: {margin:g} from the base", False)


def slo_words(record: RunRecord) -> str:
    """`TTFT p95 at most 2,000 ms, TPOT p95 at most 150 ms`, or nothing without an SLO."""
    slo = section(record, "benchmark").get("slo") or {}
    names = {"ttft_p95_ms": "TTFT p95", "tpot_p95_ms": "TPOT p95"}
    return ", ".join(f"{word} at most {slo[key]:,g} ms" for key, word in names.items() if slo.get(key))
