"""The report's part on candidates as they serve: at how many users tokens are cheapest, and what each kind costs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from pennyweight import compare
from pennyweight.load.card import Mix, PriceCard
from pennyweight.load.knee import SHARE
from pennyweight.load.report import LoadReport
from pennyweight.load.serving import CandidateCost
from pennyweight.records import Interval, RunRecord
from pennyweight.report import facts, text
from pennyweight.report.axes import AREA, LABEL_AREA, figure, fitting, grid, x_tick, x_title, y_title
from pennyweight.report.markup import Html, el
from pennyweight.report.svg import Label, Layout, Scale, log_scale, marker, symbol

#: Pixels between two numbers at the axis, at least.
_TICK_WIDTH = 22

_HEAD = (
    "candidate", "users", "output tokens/s", "TTFT p95, ms", "TPOT p95, ms", "meet the SLO",
    "$ per 1M input", "$ per 1M output", "$ per idle hour", "off by, unseen mixes",
)  # fmt: skip


def note(record: RunRecord) -> Html:
    limits = facts.slo_words(record)
    among = f", of those at which {text.percent(SHARE)} of requests meet the SLO ({limits})" if limits else ""
    return el(
        "p",
        "Measured after the run: so many users, each with one request in flight. At the number with the cheapest "
        f"tokens{among}, the candidate met four mixes of input and output; the prices of both are fitted to them, so "
        "that they add up to the bill. Under each: its 95% interval.",
    )


def plot(record: RunRecord, served: list[CandidateCost]) -> Html:
    """One line a candidate: users, and USD per 1M tokens at the run's own mix."""
    lines = {item.candidate: points for item in served if (points := _drawable(item))}
    if not lines:
        return el("p", "No load was served, so there is nothing to plot.", class_="empty")
    everything = [point for points in lines.values() for point in points]
    knees = {item.candidate: item.users for item in served}
    x = log_scale([float(at) for at, _, _ in everything], AREA.x, AREA.x + AREA.width)
    ticks = _apart(x, [users for users in knees.values() if users] + [at for at, _, _ in everything])
    ends = [end for _, usd, _ in everything for end in (usd.value, usd.low, usd.high) if end > 0]
    y = fitting(ends, AREA.y + AREA.height, AREA.y)
    layout = Layout(LABEL_AREA)
    parts: list[Html | None] = [*grid(x, y, ticks), x_title("users, each with one request in flight", "")]
    parts += [y_title("US dollars per 1M tokens", "↓ cheaper"), *(x_tick(x(at), f"{at}") for at in ticks)]
    results = {name: compare.find(record, name) for name in lines}
    for name, points in lines.items():
        status = results[name].verdict.status
        places = [(x(at), y(usd.value)) for at, usd, _ in points]
        for (x1, y1), (x2, y2) in pairwise(places):
            layout.add_line(x1, y1, x2, y2)
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
        parts.append(el("path", d=path, class_=f"line {status}{' winner' if name == record.winner else ''}"))
        for (at, usd, met), (px, py) in zip(points, places):
            layout.add_line(px, y(max(usd.low, y.low)), px, y(usd.high))
            bar = f"M{px:.1f} {y(max(usd.low, y.low)):.1f}V{y(usd.high):.1f}"
            parts.append(el("path", d=bar, class_=f"bar {status}"))
            parts.append(marker(px, py, status if met else "fail", radius=4.5, ring=at == knees[name]))
            layout.add_marker(px, py, 10 if at == knees[name] else 6)
    for name, points in lines.items():
        anchors = tuple((x(at), y(usd.value)) for at, usd, _ in reversed(points))
        won = " winner" if name == record.winner else ""
        parts.append(layout.set(Label(anchors, name, f"label {results[name].verdict.status}{won}")))
    return figure("Price of a token by users", parts, _caption(everything, knees))


def _drawable(item: CandidateCost) -> list[tuple[int, Interval, bool]]:
    """(users, price, whether the SLO was met) of every priced load, by rising users."""
    found = {
        load.concurrency: (load.concurrency, load.usd_per_1m_tokens, _meets(load))
        for load in item.loads
        if load.concurrency and load.usd_per_1m_tokens
    }
    return [found[at] for at in sorted(found)]


def _apart(x: Scale, users: list[int]) -> list[int]:
    """Those whose numbers find room beside each other, the first ones first."""
    kept: list[int] = []
    for at in users:
        if all(abs(x(at) - x(other)) >= _TICK_WIDTH for other in kept):
            kept.append(at)
    return kept


def _meets(load: LoadReport) -> bool:
    return load.slo_share is None or load.slo_share.low >= SHARE


def _caption(everything: list[tuple[int, Interval, bool]], knees: dict[str, int | None]) -> list[Html]:
    items = []
    if any(users for users in knees.values()):
        items.append(el("li", symbol("pass", ring=True), "the cheapest load, where the card was made"))
    if not all(met for _, _, met in everything):
        items.append(el("li", symbol("fail"), "too few requests met the SLO"))
    notes = [el("p", "Lower is cheaper. Bars: 95% intervals, by batch means.")]
    return [el("ul", items, class_="legend"), *notes]


def table(served: list[CandidateCost]) -> Html:
    """Each candidate at its cheapest load, and its price card."""
    head = el("thead", el("tr", [el("th", name, scope="col") for name in _HEAD]))
    return el("div", el("table", head, el("tbody", [_row(item) for item in served]), class_="served"), class_="scroll")


def _row(item: CandidateCost) -> Html:
    load = next((load for load in item.loads if load.concurrency == item.users), None)
    name = el("th", item.candidate, scope="row")
    if load is None:
        return el("tr", name, el("td", "no load meets the SLO", colspan=len(_HEAD) - 1, class_="text"))
    cells = [
        el("td", f"{item.users}"),
        _bounded(load.output_tokens_per_second, text.number),
        el("td", text.number(load.ttft_ms.p95)),
        el("td", text.number(load.tpot_ms.p95 if load.tpot_ms else None)),
        el("td", text.percent(load.slo_share.value) if load.slo_share else text.MISSING),
    ]
    return el("tr", name, cells, _card(item.card) if item.card else [el("td", text.MISSING)] * 4)


def _card(card: PriceCard) -> list[Html]:
    return [
        _bounded(card.usd_per_1m_input, text.usd),
        _bounded(card.usd_per_1m_output, text.usd),
        el("td", text.usd(card.usd_per_idle_hour)),
        el("td", ", ".join(text.percent(abs(_off(mix))) for mix in card.mixes)),
    ]


def _off(mix: Mix) -> float:
    """How far a card that has not seen the mix is off; the card itself where it needs the mix."""
    return mix.error if mix.held_out_error is None else mix.held_out_error


def _bounded(value: Interval, words: Callable[[float], str]) -> Html:
    return el("td", words(value.value), el("small", f"{words(value.low)} to {words(value.high)}"))
