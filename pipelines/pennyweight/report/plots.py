"""The report's two plots: quality against cost, and throughput against latency."""

from __future__ import annotations

import math
from itertools import pairwise

from pennyweight.records import CandidateResult, CostPoint, RunRecord
from pennyweight.report import facts, text
from pennyweight.report.axes import AREA, LABEL_AREA, figure, fitting, grid, tick_text, x_tick, x_title, y_title
from pennyweight.report.facts import QualityAxis, TradeOff
from pennyweight.report.markup import Html, el, join
from pennyweight.report.svg import Box, Label, Layout, Scale, linear_scale, log_scale, marker, symbol

#: Height of the strip under a logarithmic axis for values that it cannot hold: zero, and noise below zero.
_ZERO_STRIP = 34

_STROKES = ("solid", "dashed", "dotted")

VERDICT_WORDS = {
    "pass": "passed the gate",
    "fail": "failed it",
    "inconclusive": "inconclusive",
    "base": "the base",
    "error": "a stage failed",
}


def quality_against_cost(record: RunRecord) -> Html:
    """Scatter of the candidates: USD per 1M tokens at `decide_at`, and the quality that the gate looks at."""
    axis = facts.quality_axis(record)
    points = facts.trade_offs(record, axis) if axis else []
    if axis is None or not points:
        return el("p", "No candidate has both a cost and a quality, so there is nothing to plot.", class_="empty")
    x, y, zero = _quality_scales(points, axis)
    layout = Layout(LABEL_AREA)
    parts: list[Html | None] = [_failing_regions(axis, y, layout), *grid(x, y), *_cost_axis(record, x)]
    parts += [_quality_title(axis), _zero_strip(zero)]
    places = [(point, x(point.cost), _height(point.quality, y, zero)) for point in points]
    parts.append(_front_line(facts.front(points, axis), axis, x, y, zero, layout))
    for point, _, py in places:
        parts.append(_error_bar(point, x, py, layout))
    for point, px, py in sorted(places, key=lambda place: place[0].result.id == record.winner):
        status, won = point.result.verdict.status, point.result.id == record.winner
        parts.append(marker(px, py, status, ring=won))
        layout.add_marker(px, py, 10 if won else 7)
    for point, px, py in sorted(places, key=lambda place: place[0].result.id != record.winner):
        parts.append(layout.set(Label(((px, py),), point.result.id, _label_class(record, point.result))))
    title = f"Quality against cost of {len(points)} candidates"
    missing = [result.id for result in record.candidates if result.id not in {p.result.id for p in points}]
    return figure(title, parts, _quality_caption(record, axis, points, missing))


def throughput_against_latency(record: RunRecord) -> Html:
    """One line a candidate, one marker a concurrency: output tokens per second against TPOT p50."""
    lines = [(result, points) for result in record.candidates if (points := _drawable(result))]
    if not lines:
        return el("p", "No candidate's speed was measured, so there is nothing to plot.", class_="empty")
    everything = [point for _, points in lines for point in points]
    x = fitting([point.tpot_ms.p50 for point in everything], AREA.x, AREA.x + AREA.width)
    y = fitting([point.output_tokens_per_second for point in everything], AREA.y + AREA.height, AREA.y)
    layout = Layout(LABEL_AREA)
    parts: list[Html | None] = [*grid(x, y)]
    parts += [x_title("time per output token, p50 (ms)", "← faster for each user")]
    parts += [y_title("output tokens per second, all users together", "↑ more throughput")]
    parts += [x_tick(x(tick), tick_text(tick)) for tick in x.ticks()]
    lines.sort(key=lambda line: line[0].id == record.winner)
    dashes = _dashes(record)
    places = {r.id: [(x(p.tpot_ms.p50), y(p.output_tokens_per_second)) for p in points] for r, points in lines}
    for result, _ in lines:
        for (x1, y1), (x2, y2) in pairwise(places[result.id]):
            layout.add_line(x1, y1, x2, y2)
        won = " winner" if result.id == record.winner else ""
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places[result.id])
        parts.append(el("path", d=path, class_=f"line {result.verdict.status} dash{dashes[result.runtime]}{won}"))
    for result, _ in lines:
        for px, py in places[result.id]:
            parts.append(marker(px, py, result.verdict.status, radius=4.5))
            layout.add_marker(px, py, 6)
    for result, _ in reversed(lines):
        anchors = tuple(reversed(places[result.id]))
        parts.append(layout.set(Label(anchors, result.id, _label_class(record, result), reach=(11, 18, 26, 38, 54))))
    loads = [
        (place, f"{point.concurrency}{'†' if point.slo_met is False else ''}")
        for result, points in reversed(lines)
        for place, point in zip(places[result.id], points)
    ]
    parts += [
        layout.set(Label((place,), words, "load", font_size=11, reach=(8, 13, 19))) for place, words in _apart(loads)
    ]
    return figure("Throughput against latency by concurrency", parts, _speed_caption(record, lines))


# --- quality against cost ---------------------------------------------------------------------------------------------


def _quality_scales(points: list[TradeOff], axis: QualityAxis) -> tuple[Scale, Scale, float | None]:
    """The scales of cost and quality, and the height at which values that a logarithm cannot hold are drawn."""
    costs = [value for point in points for value in (point.cost, point.low, point.high) if value is not None]
    x = linear_scale(costs, AREA.x, AREA.x + AREA.width, zero=True)
    values = [point.quality for point in points] + [threshold.value for threshold in axis.thresholds]
    bottom = AREA.y + AREA.height
    if not axis.log:
        return x, linear_scale(values, bottom, AREA.y), None
    positive = [value for value in values if value > 0] or [1e-3, 1.0]
    if min(values) > 0:
        return x, log_scale(positive, bottom, AREA.y), None
    return x, log_scale(positive, bottom - _ZERO_STRIP, AREA.y), bottom - _ZERO_STRIP / 2


def _height(value: float, y: Scale, zero: float | None) -> float:
    return zero if zero is not None and value <= 0 else y(value)


def _failing_regions(axis: QualityAxis, y: Scale, layout: Layout) -> Html:
    parts = []
    for threshold in axis.thresholds:
        if axis.log and threshold.value <= 0:
            continue
        height = y(threshold.value)
        end = AREA.y if threshold.fails_above else AREA.y + AREA.height
        parts.append(
            el("rect", x=AREA.x, y=min(height, end), width=AREA.width, height=abs(end - height), class_="failing")
        )
        parts.append(el("line", x1=AREA.x, x2=AREA.x + AREA.width, y1=height, y2=height, class_="threshold"))
        baseline = height - 7 if threshold.fails_above else height + 16
        width = len(threshold.label) * 6.4
        layout.placed.append(Box(AREA.x + AREA.width - width - 8, baseline - 11, width + 8, 15))
        parts.append(
            el(
                "text",
                threshold.label,
                x=AREA.x + AREA.width - 8,
                y=baseline,
                text_anchor="end",
                class_="threshold-label",
            )
        )
    return join(parts)


def _cost_axis(record: RunRecord, x: Scale) -> list[Html]:
    ticks = x.ticks()
    decimals = max(2, *(len(f"{tick:.6f}".rstrip("0").partition(".")[2]) for tick in ticks))
    labels = [x_tick(x(tick), f"${tick:.{decimals}f}" if tick else "$0") for tick in ticks]
    title = f"US dollars per 1M tokens at concurrency {facts.decide_at(record)}"
    return [*labels, x_title(title, "← cheaper")]


def _quality_title(axis: QualityAxis) -> Html:
    if axis.metric == "kl_mean":
        return y_title("mean KL divergence from the base (nats per token)", "↓ better")
    return y_title(text.metric_label(axis.metric), "↑ better" if axis.higher_is_better else "↓ better")


def _zero_strip(zero: float | None) -> Html | None:
    if zero is None:
        return None
    top = AREA.y + AREA.height - _ZERO_STRIP
    return join(
        el("line", x1=AREA.x, x2=AREA.x + AREA.width, y1=top, y2=top, class_="break"),
        el("text", "0", x=AREA.x - 8, y=zero + 4.5, text_anchor="end", class_="tick"),
    )


def _front_line(
    points: list[TradeOff], axis: QualityAxis, x: Scale, y: Scale, zero: float | None, layout: Layout
) -> Html | None:
    """A staircase: between two points of the front, the best that a budget buys is the cheaper one."""
    if len(points) < 2:
        return None
    places = [(x(point.cost), _height(point.quality, y, zero)) for point in points]
    path = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
    for (x1, y1), (x2, y2) in pairwise(places):
        path += f"H{x2:.1f}V{y2:.1f}"
        layout.add_line(x1, y1, x2, y1)
        layout.add_line(x2, y1, x2, y2)
    return el("path", d=path, class_="front")


def _error_bar(point: TradeOff, x: Scale, height: float, layout: Layout) -> Html | None:
    if point.low is None or point.high is None:
        return None
    low, high = x(point.low), x(point.high)
    layout.add_line(low, height, high, height)
    path = f"M{low:.1f} {height:.1f}H{high:.1f}M{low:.1f} {height - 4:.1f}v8M{high:.1f} {height - 4:.1f}v8"
    return el("path", d=path, class_=f"bar {point.result.verdict.status}")


def _quality_caption(record: RunRecord, axis: QualityAxis, points: list[TradeOff], missing: list[str]) -> list[Html]:
    name = text.metric_label(axis.metric)
    lines = [el("p", "Lower left is better." if not axis.higher_is_better else "Upper left is better.")]
    if axis.thresholds and all(threshold.exact for threshold in axis.thresholds):
        lines.append(el("p", f"Shaded: where the gate fails a candidate by its {name}."))
    elif axis.thresholds:
        lines.append(
            el("p", "Shaded: beyond the gate's margin. A paired test over the questions decides, not the point.")
        )
    else:
        lines.append(el("p", f"The gate has no condition on {name} that can be drawn."))
    lines.append(el("p", el("span", class_="key-front"), "Pareto front: no candidate is both cheaper and better."))
    if any(point.low is not None for point in points):
        lines.append(el("p", "Bars: 95% interval of the cost, from that of the saving."))
    if axis.log and any(point.quality <= 0 for point in points):
        lines.append(el("p", "The lowest strip holds zero, where a logarithmic axis ends."))
    if missing:
        lines.append(el("p", f"Not drawn, for want of a cost or a quality: {', '.join(missing)}."))
    return [_legend([point.result for point in points], record.winner), *lines]


# --- throughput against latency ---------------------------------------------------------------------------------------


def _drawable(result: CandidateResult) -> list[CostPoint]:
    """Points with a positive, finite speed, by concurrency."""
    points = result.cost.points if result.cost else []
    return sorted(
        (
            point
            for point in points
            if 0 < point.tpot_ms.p50 < math.inf and 0 < point.output_tokens_per_second < math.inf
        ),
        key=lambda point: point.concurrency,
    )


def _apart(loads: list[tuple[tuple[float, float], str]]) -> list[tuple[tuple[float, float], str]]:
    """The same number stands once for points that nearly coincide: twice, 1 and 1 would read as 11."""
    kept: list[tuple[tuple[float, float], str]] = []
    for place, words in loads:
        if not any(words == other and math.dist(place, near) < 18 for near, other in kept):
            kept.append((place, words))
    return kept


def _dashes(record: RunRecord) -> dict[str, int]:
    """Runtime → stroke: 0 solid for the one with most candidates, 1 dashed, 2 dotted."""
    names = [result.runtime for result in record.candidates]
    ordered = sorted(dict.fromkeys(names), key=lambda name: -names.count(name))
    return {name: min(index, 2) for index, name in enumerate(ordered)}


def _speed_caption(record: RunRecord, lines: list[tuple[CandidateResult, list[CostPoint]]]) -> list[Html]:
    workload = facts.section(record, "benchmark").get("workload") or {}
    shape = ""
    if isinstance(workload, dict) and "input_tokens" in workload:
        shape = f", each {workload['input_tokens']} tokens in and {workload.get('output_tokens')} out"
    notes = [
        el("p", "Upper left is better." + (" The thick line is the winner's." if record.winner else "")),
        el("p", f"Numbers at the markers: concurrency, the requests in flight at once{shape}."),
    ]
    drawn = {result.runtime for result, _ in lines}
    if len(drawn) > 1:
        strokes = [f"{_STROKES[dash]} {name}" for name, dash in _dashes(record).items() if name in drawn]
        notes.append(el("p", f"Lines: {', '.join(strokes)}."))
    if any(point.slo_met is False for _, points in lines for point in points):
        notes.append(el("p", f"† The SLO was missed: {facts.slo_words(record)}."))
    return [_legend([result for result, _ in lines]), *notes]


# --- both -------------------------------------------------------------------------------------------------------------


def _label_class(record: RunRecord, result: CandidateResult) -> str:
    return f"label {result.verdict.status}{' winner' if result.id == record.winner else ''}"


def _legend(results: list[CandidateResult], ringed: str | None = None) -> Html:
    """One entry for each verdict that is drawn, and one for the ringed winner."""
    statuses = {result.verdict.status for result in results}
    items = [el("li", symbol(status), word) for status, word in VERDICT_WORDS.items() if status in statuses]
    if any(result.id == ringed for result in results):
        items.insert(0, el("li", symbol("pass", ring=True), "the winner"))
    return el("ul", items, class_="legend")
