"""What all plots of the report share: the area, its grid, ticks and titles, and the caption beside it."""

from __future__ import annotations

from collections.abc import Sequence

from pennyweight.report import text
from pennyweight.report.markup import Html, el, join
from pennyweight.report.svg import Box, Scale, linear_scale, log_scale

WIDTH, HEIGHT = 780.0, 450.0
AREA = Box(52, 34, 718, 360)

#: Labels may stand a little outside the axes.
LABEL_AREA = Box(AREA.x + 2, AREA.y - 10, AREA.width + 6, AREA.height + 6)

#: Ranges wider than this factor are drawn on a logarithmic axis.
_LOG_FROM = 6


def fitting(values: list[float], start: float, end: float) -> Scale:
    if max(values) / min(values) > _LOG_FROM:
        return log_scale(values, start, end)
    return linear_scale(values, start, end, zero=True)


def grid(x: Scale, y: Scale, at: Sequence[float] | None = None) -> list[Html]:
    """Lines at both scales' ticks, or `at` these values of x, and the labels of y."""
    right, bottom = AREA.x + AREA.width, AREA.y + AREA.height
    vertical = [
        el("line", x1=x(t), x2=x(t), y1=AREA.y, y2=bottom, class_="grid") for t in (x.ticks() if at is None else at)
    ]
    horizontal = [el("line", x1=AREA.x, x2=right, y1=y(t), y2=y(t), class_="grid") for t in y.ticks()]
    labels = [el("text", tick_text(t), x=AREA.x - 8, y=y(t) + 4.5, text_anchor="end", class_="tick") for t in y.ticks()]
    axis = el("path", d=f"M{AREA.x} {AREA.y}V{bottom}H{right}", class_="axis")
    return [*vertical, *horizontal, axis, *labels]


def tick_text(value: float) -> str:
    return text.minus(f"{value:,.10f}".rstrip("0").rstrip(".")) if abs(value) >= 1e-6 or value == 0 else f"{value:.0e}"


def x_tick(x: float, label: str) -> Html:
    return el("text", label, x=x, y=AREA.y + AREA.height + 18, text_anchor="middle", class_="tick")


def x_title(title: str, better: str) -> Html:
    baseline = AREA.y + AREA.height + 44
    return join(
        el("text", better, x=AREA.x, y=baseline, class_="direction"),
        el("text", title, x=AREA.x + AREA.width, y=baseline, text_anchor="end", class_="axis-title"),
    )


def y_title(title: str, better: str) -> Html:
    words = [title, el("tspan", better, dx=12, class_="direction")]
    return el("text", words, x=2.0, y=AREA.y - 16, class_="axis-title")


def figure(title: str, parts: list[Html | None], caption: list[Html]) -> Html:
    picture = el(
        "svg",
        el("title", title),
        parts,
        viewBox=f"0 0 {WIDTH:.0f} {HEIGHT:.0f}",
        role="img",
        class_="plot",
    )
    return el("figure", picture, el("figcaption", caption))
