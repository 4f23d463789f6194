"""The report's plot of what blocks cost that were taken out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from pennyweight.records import RunRecord
from pennyweight.report import making
from pennyweight.report.axes import AREA, LABEL_AREA, figure, fitting, grid, x_tick, x_title, y_title
from pennyweight.report.markup import Html, el
from pennyweight.report.svg import Label, Layout, linear_scale, marker


@dataclass(frozen=True)
class Curve:
    """Held-out KL against blocks that one `prune` step took out."""

    name: str
    points: list[tuple[int, float]]
    """(blocks, KL before any fit)"""
    fitted: float | None
    """KL of what was made of the last point."""


def curves(record: RunRecord) -> list[Curve]:
    """One for each step that chose blocks, and has something to show."""
    found = []
    for variant, checkpoint in making.variants(record).items():
        steps = checkpoint.pruning.all if checkpoint.pruning else []
        for number, step in enumerate(steps, 1):
            name = variant if len(steps) == 1 else f"{variant}, prune {number} of {len(steps)}"
            if points := [(blocks, kl) for blocks, kl in step.curve if kl > 0]:
                found.append(Curve(name, points, step.kl if step.kl and step.kl > 0 else None))
    return found


def plot(record: RunRecord) -> Html:
    """One line a step; steps whose curves are parts of another's are named at their own ends."""
    lines = curves(record)
    most = max(blocks for line in lines for blocks, _ in line.points)
    levels = [kl for line in lines for kl in [*(kl for _, kl in line.points), line.fitted] if kl is not None]
    x = linear_scale([0.0, float(most)], AREA.x, AREA.x + AREA.width, zero=True)
    y = fitting(levels, AREA.y + AREA.height, AREA.y)
    ticks = [float(number) for number in range(0, most + 1, max(1, -(-most // 12)))]
    layout = Layout(LABEL_AREA)
    parts: list[Html | None] = [*grid(x, y, ticks), x_title("blocks taken out", "← larger")]
    parts += [y_title("KL divergence from the checkpoint before (nats per token)", "↓ better")]
    parts += [x_tick(x(tick), f"{tick:.0f}") for tick in ticks]
    for line in lines:
        places = [(x(blocks), y(kl)) for blocks, kl in line.points]
        for (x1, y1), (x2, y2) in pairwise(places):
            layout.add_line(x1, y1, x2, y2)
        parts.append(el("path", d="M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places), class_="line base"))
        if line.fitted is not None:
            end, low = places[-1], y(line.fitted)
            layout.add_line(*end, end[0], low)
            layout.add_marker(end[0], low, 6)
            parts.append(el("path", d=f"M{end[0]:.1f} {end[1]:.1f}V{low:.1f}", class_="line dash2"))
            parts.append(el("circle", cx=end[0], cy=low, r=4.5, class_="mark base"))
        for px, py in places:
            parts.append(marker(px, py, "base", radius=4.0))
            layout.add_marker(px, py, 6)
    for line in lines:
        blocks, kl = line.points[-1]
        parts.append(layout.set(Label(((x(blocks), y(kl)),), line.name, "label base")))
    return figure("KL divergence against blocks taken out", parts, [el("p", _CAPTION)])


_CAPTION = (
    "On text that the blocks were not chosen by. ■ before anything was fitted or healed: the last one of a line is the "
    "choice that was made, after exchanges, and those before it are the search's on its way. ● the checkpoint that was "
    "written, with all else that the step took out and fitted."
)
