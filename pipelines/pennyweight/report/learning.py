"""The report's plot of how students learnt."""

from __future__ import annotations

import math
from itertools import pairwise

from pennyweight.records import Distillation, RunRecord
from pennyweight.report import making
from pennyweight.report.axes import AREA, LABEL_AREA, figure, fitting, grid, tick_text, x_tick, x_title, y_title
from pennyweight.report.markup import Html, el
from pennyweight.report.svg import Label, Layout, linear_scale, marker

Curve = list[tuple[int, float]]


def students(record: RunRecord) -> dict[str, Distillation]:
    """What each `distill` step did, by the name of its line, where there is a curve to draw."""
    found = {}
    for variant, checkpoint in making.variants(record).items():
        steps = checkpoint.distillation.all if checkpoint.distillation else []
        for number, made in enumerate(steps, 1):
            name = variant if len(steps) == 1 else f"{variant}, distill {number} of {len(steps)}"
            if len(_drawable(made.curve)) > 1:
                found[name] = made
    return found


def plot(record: RunRecord) -> Html:
    """A line a step of the held-out divergence, a dashed one of the training loss, and a mark at the state kept."""
    lines = {name: (_drawable(made.curve), _drawable(made.losses)) for name, made in students(record).items()}
    everything = [point for curves in lines.values() for curve in curves for point in curve]
    x = linear_scale([0.0, float(max(step for step, _ in everything))], AREA.x, AREA.x + AREA.width, zero=True)
    y = fitting([value for _, value in everything], AREA.y + AREA.height, AREA.y)
    layout = Layout(LABEL_AREA)
    parts: list[Html | None] = [*grid(x, y), x_title("steps of the optimizer", "")]
    parts += [y_title("KL divergence from the base on held-out text (nats per token)", "↓ better")]
    parts += [x_tick(x(tick), tick_text(tick)) for tick in x.ticks()]
    for curves in lines.values():
        for curve, style in zip(curves, ("line base", "line dash2")):
            places = [(x(step), y(value)) for step, value in curve]
            for (x1, y1), (x2, y2) in pairwise(places):
                layout.add_line(x1, y1, x2, y2)
            if len(places) > 1:
                path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
                parts.append(el("path", d=path, class_=style))
    for name, made in students(record).items():
        kept = _drawable([(made.kept_step, made.kl_after)])
        step, kl = kept[0] if kept else lines[name][0][-1]
        place = x(step), y(kl)
        if kept:
            parts.append(marker(*place, "base", radius=4.0))
            layout.add_marker(*place, 6)
        parts.append(layout.set(Label((place,), name, "label base")))
    return figure("Held-out divergence against steps", parts, [el("p", _CAPTION)])


def _drawable(curve: Curve) -> Curve:
    return [(step, value) for step, value in curve if value > 0 and math.isfinite(value)]


_CAPTION = (
    "■ the state that was kept. Dashed: the mean training loss since the point before, which is the divergence on the "
    "text learnt on where the loss is that alone."
)
