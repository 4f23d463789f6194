"""Scales, ticks, markers and label placement for plots as inline SVG. Colours come from the page's classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pennyweight.report.markup import Html, el, join

#: Mean advance of a sans-serif glyph in ems, on the generous side.
_GLYPH = 0.56


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to pixels [start, end], linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, about: int = 6) -> list[float]:
        """Round values inside the domain, about as many as asked for."""
        return _log_ticks(self.low, self.high, about) if self.log else _linear_ticks(self.low, self.high, about)


def linear_scale(values: Sequence[float], start: float, end: float, zero: bool = False) -> Scale:
    """A scale that holds `values` with some room; from zero on where `zero`."""
    low, high = min(values), max(values)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return Scale(min(0.0, low - room) if low < 0 else 0.0 if zero else low - room, high + room, start, end)


def log_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """A logarithmic scale that holds the positive `values` with some room, and spans a decade at least."""
    low, high = min(values), max(values)
    room = max(1.15, (high / low) ** 0.1, math.sqrt(10 * low / high))
    return Scale(low / room, high * room, start, end, log=True)


def _linear_ticks(low: float, high: float, about: int) -> list[float]:
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, about: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        ticks = [mantissa * 10.0**power for power in decades for mantissa in mantissas]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= about + 2:
            break
    if len(ticks) < 2:
        return [tick for tick in _linear_ticks(low, high, about) if tick > 0]
    return ticks[:: math.ceil(len(ticks) / (about + 2))]


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """Shared area in square pixels."""
        width = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        height = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return width * height if width > 0 and height > 0 else 0.0

    def distance(self, x: float, y: float) -> float:
        """From a point to the nearest of the box's."""
        return math.hypot(max(self.x - x, 0, x - self.x - self.width), max(self.y - y, 0, y - self.y - self.height))

    def holds(self, x: float, y: float) -> bool:
        return self.x <= x <= self.x + self.width and self.y <= y <= self.y + self.height


@dataclass(frozen=True)
class Label:
    """Text that belongs to a point, or to any one of several. `class_` gives it colour and weight."""

    anchors: tuple[tuple[float, float], ...]
    text: str
    class_: str
    font_size: float = 13
    reach: tuple[float, ...] = (11, 20, 32, 46)

    @property
    def width(self) -> float:
        return len(self.text) * self.font_size * _GLYPH


@dataclass
class Layout:
    """Where things are, so that labels find free room. `placed` grows as labels are set."""

    bounds: Box
    placed: list[Box] = field(default_factory=list)
    markers: list[tuple[float, float]] = field(default_factory=list)
    lines: list[tuple[float, float]] = field(default_factory=list)

    def add_marker(self, x: float, y: float, radius: float) -> None:
        self.placed.append(Box(x - radius, y - radius, 2 * radius, 2 * radius))
        self.markers.append((x, y))

    def add_line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """Remember a segment, as points 5 px apart."""
        count = max(1, round(math.hypot(x2 - x1, y2 - y1) / 5))
        self.lines += [(x1 + (x2 - x1) * i / count, y1 + (y2 - y1) * i / count) for i in range(count + 1)]

    def set(self, label: Label) -> Html:
        """The label at the best of the places around its points, with a leader line where that is far away."""
        options = [
            (self._cost(box) + self._doubt(box, anchor) + 0.6 * reach + preference, box, reach, anchor)
            for anchor in label.anchors
            for reach in label.reach
            for preference, box in _around(anchor, label, reach)
        ]
        _, box, reach, (x, y) = min(options, key=lambda option: option[0])
        self.placed.append(box)
        leader = None
        if reach > 20:
            edge_x, edge_y = min(max(x, box.x), box.x + box.width), min(max(y, box.y), box.y + box.height)
            leader = el("line", x1=x, y1=y, x2=edge_x, y2=edge_y, class_="leader")
        baseline, middle = box.y + 0.76 * box.height, box.x + box.width / 2
        return join(leader, el("text", label.text, x=middle, y=baseline, class_=label.class_, text_anchor="middle"))

    def _cost(self, box: Box) -> float:
        outside = box.width * box.height - self.bounds.overlap(box)
        roomy = Box(box.x - 3, box.y - 1, box.width + 6, box.height + 2)
        crossed = sum(roomy.holds(x, y) for x, y in self.lines)
        return 50 * outside + 3 * sum(roomy.overlap(other) for other in self.placed) + 9 * crossed

    def _doubt(self, box: Box, anchor: tuple[float, float]) -> float:
        """Whether a reader would take the label for that of another point, which is nearer."""
        own = box.distance(*anchor)
        return 14.0 * any(box.distance(*other) < own - 0.5 for other in self.markers if other != anchor)


def _around(anchor: tuple[float, float], label: Label, reach: float) -> list[tuple[float, Box]]:
    """(preference, box) of places around a point: to the right first, then left, above and below, then the corners."""
    x, y = anchor
    width, height = label.width, label.font_size * 1.15
    slant = 0.7 * reach
    corners = [
        (0, x + reach, y - height / 2),
        (2, x - reach - width, y - height / 2),
        (3, x - width / 2, y - reach - height + 3),
        (3, x - width / 2, y + reach - 3),
        (4, x + slant, y - slant - height + 3),
        (4, x + slant, y + slant - 3),
        (5, x - slant - width, y - slant - height + 3),
        (5, x - slant - width, y + slant - 3),
    ]
    return [(preference, Box(left, top, width, height)) for preference, left, top in corners]


def marker(x: float, y: float, status: str, radius: float = 5.5, ring: bool = False) -> Html:
    """A point whose shape says its verdict: pass ●, fail ✕, inconclusive ◆, base ■, error ▲."""
    r = radius
    classes = f"mark {status}"
    match status:
        case "pass":
            shape = el("circle", cx=x, cy=y, r=r, class_=classes)
        case "fail":
            a = 0.8 * r
            path = f"M{x - a:.1f} {y - a:.1f}L{x + a:.1f} {y + a:.1f}M{x - a:.1f} {y + a:.1f}L{x + a:.1f} {y - a:.1f}"
            shape = join(
                el("circle", cx=x, cy=y, r=r + 0.5, class_="halo"),
                el("path", d=path, class_=f"cross {status}"),
            )
        case "inconclusive":
            a = 1.25 * r
            shape = _polygon([(x, y - a), (x + a, y), (x, y + a), (x - a, y)], classes)
        case "base":
            a = 0.9 * r
            shape = el("rect", x=x - a, y=y - a, width=2 * a, height=2 * a, class_=classes)
        case _:
            a = 1.1 * r
            shape = _polygon([(x, y - a), (x + a, y + 0.8 * a), (x - a, y + 0.8 * a)], classes)
    return join(el("circle", cx=x, cy=y, r=r + 4.5, class_="ring") if ring else None, shape)


def symbol(status: str, ring: bool = False) -> Html:
    """The marker as a small picture that stands in text."""
    return el(
        "svg",
        marker(10.0, 10.0, status, ring=ring),
        class_="symbol",
        viewBox="0 0 20 20",
        width=16,
        height=16,
        aria_hidden="true",
    )


def _polygon(points: list[tuple[float, float]], classes: str) -> Html:
    return el("polygon", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=classes)
