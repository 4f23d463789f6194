"""The report's plot of what blocks cost that were taken out."""

from __future__ import annotations

from itertools import pairwise

from pennyweight.records import RunRecord
from pennyweight.report import making
from pennyweight.report.axes import AREA, LABEL_AREA, figure, fitting, grid, x_tick, x_title, y_title
from pennyweight.report.markup import Html, el
from pennyweight.report.svg import Label, Layout, linear_scale, marker


def curves(record: RunRecord) -> dict[str, list[tuple[int, float]]]:
    """Each variant's curve of blocks taken out against held-out KL, where blocks were chosen."""
    made = making.variants(record)
    found = {name: checkpoint.pruning.curve for name, checkpoint in made.items() if checkpoint.pruning}
    return {name: kept for name, curve in found.items() if (kept := [(n, kl) for n, kl in curve if kl > 0])}


def plot(record: RunRecord) -> Html:
    """One line a variant; variants whose curves are parts of another's are named at their own ends."""
    lines = curves(record)
    everything = [point for points in lines.values() for point in points]
    most = max(number for number, _ in everything)
    x = linear_scale([0.0, float(most)], AREA.x, AREA.x + AREA.width, zero=True)
    y = fitting([kl for _, kl in everything], AREA.y + AREA.height, AREA.y)
    ticks = [float(number) for number in range(0, most + 1, max(1, -(-most // 12)))]
    layout = Layout(LABEL_AREA)
    parts: list[Html | None] = [*grid(x, y, ticks), x_title("blocks taken out", "← larger")]
    parts += [y_title("KL divergence from the checkpoint before (nats per token)", "↓ better")]
    parts += [x_tick(x(tick), f"{tick:.0f}") for tick in ticks]
    for points in lines.values():
        places = [(x(number), y(kl)) for number, kl in points]
        for (x1, y1), (x2, y2) in pairwise(places):
            layout.add_line(x1, y1, x2, y2)
        parts.append(el("path", d="M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places), class_="line base"))
        for px, py in places:
            parts.append(marker(px, py, "base", radius=4.0))
            layout.add_marker(px, py, 6)
    for name, points in lines.items():
        number, kl = points[-1]
        parts.append(layout.set(Label(((x(number), y(kl)),), name, "label base")))
    return figure("KL divergence against blocks taken out", parts, [el("p", _CAPTION)])


_CAPTION = (
    "On text that the blocks were not chosen by, before anything was fitted or healed. The last point of a line is the "
    "choice that was made, after exchanges; those before it are the search's on its way."
)
