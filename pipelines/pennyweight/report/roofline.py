"""The report's table of bounds: what a candidate reached of what the machine allows, and the memory that it took."""

from __future__ import annotations

from pennyweight.records import CandidateResult, CostPoint, RunRecord
from pennyweight.report import text
from pennyweight.report.markup import Html, el
from pennyweight.report.svg import symbol

_HEAD = (
    "candidate", "concurrency", "output tokens/s", "best possible", "realized", "bound by", "MBU", "MFU",
    "largest saving", "saving",
)  # fmt: skip


def is_measured(record: RunRecord) -> bool:
    return any(point.roofline for result in record.candidates for point in _points(result))


def table(record: RunRecord) -> Html:
    """One row for each candidate and load; joules only where a counter was there."""
    energy = any(point.joules_per_output_token is not None for r in record.candidates for point in _points(r))
    head = [*_HEAD, *(["J per output token"] if energy else [])]
    bodies = [_rows(record, result, energy) for result in record.candidates if _points(result)]
    table = el(
        "table", el("thead", el("tr", [el("th", name, scope="col") for name in head])), bodies, class_="roofline"
    )
    return el("div", table, class_="scroll", tabindex=0, role="region", aria_label="Roofline")


def note(record: RunRecord) -> Html:
    words = [
        "Best possible: what the candidate's bytes and operations allow at the speeds that this machine reached in the "
        "same session. Largest saving: what its format would save against the cheapest base candidate at that speed; "
        "beside the saving, the share of it. MBU, MFU: the share of the read speed while decoding, and of the peak of "
        "products in the whole workload."
    ]
    if found := record.ceilings:
        int8 = f", {found.gops_int8:,.0f} GOP/s int8" if found.gops_int8 is not None else ""
        words.append(
            f"Measured with {found.threads} thread{'' if found.threads == 1 else 's'}: {found.read_gb_per_s:.1f} GB/s "
            f"read from memory, {found.gflops_fp32:,.0f} GFLOP/s float32, {found.gflops_bf16:,.0f} bfloat16{int8}."
        )
    if any(result.cost and result.cost.peak_memory_bytes is not None for result in record.candidates):
        words.append("Under each name: the most memory that the loaded candidate added.")
    if record.energy_counters:
        words.append(f"Energy was counted by {', '.join(record.energy_counters)}, whoever used it.")
    return el("p", " ".join(words))


def _points(result: CandidateResult) -> list[CostPoint]:
    return result.cost.points if result.cost else []


def _rows(record: RunRecord, result: CandidateResult, energy: bool) -> Html:
    points = _points(result)
    memory = result.cost.peak_memory_bytes if result.cost else None
    name = el(
        "th",
        el("span", symbol(result.verdict.status), result.id, class_="name"),
        el("small", text.size(memory)) if memory is not None else None,
        scope="rowgroup",
        rowspan=len(points),
    )
    won = " winner" if result.id == record.winner else ""
    rows = []
    for index, point in enumerate(points):
        cells = [name] if index == 0 else []
        rows.append(el("tr", cells, _cells(point, energy), class_=f"{result.verdict.status}{won}"))
    return el("tbody", rows)


def _cells(point: CostPoint, energy: bool) -> list[Html]:
    found = point.roofline
    values = [str(point.concurrency), text.number(point.output_tokens_per_second)]
    if found is None:
        values += [text.MISSING] * 6
    else:
        values += [text.number(found.best_output_tokens_per_second), text.percent(found.realized), found.bound]
        values += [text.percent(found.mbu), text.percent(found.mfu)]
        values.append(text.MISSING if found.largest_saving is None else text.percent(found.largest_saving))
    cells = [el("td", value) for value in values]
    share = found.saving_realized if found else None
    saving = text.MISSING if point.saving is None else text.percent(point.saving.value)
    cells.append(el("td", saving, None if share is None else el("small", f"{text.percent(share)} of it")))
    if energy:
        cells.append(el("td", text.number(point.joules_per_output_token)))
    return cells
