"""The report's table of settings that were tried on the winner's engine."""

from __future__ import annotations

from pennyweight.records import LeverReport, RunRecord
from pennyweight.report import text
from pennyweight.report.markup import Html, el

_HEAD = ("lever", "saving", "95% interval", "", "because")


def note(record: RunRecord) -> Html:
    first = record.levers[0]
    return el(
        "p",
        f"Each was off and on in turn on {first.candidate} at concurrency {first.concurrency}; what stands above rests "
        "on all of them off. Kept: its saving is surely above 0 at this load.",
    )


def table(record: RunRecord) -> Html:
    head = el("thead", el("tr", [el("th", name, scope="col") for name in _HEAD]))
    return el("table", head, el("tbody", [_row(lever) for lever in record.levers]), class_="levers")


def _row(lever: LeverReport) -> Html:
    saving = lever.saving
    cells = [text.MISSING, text.MISSING]
    if saving:
        cells = [text.percent(saving.value), f"{text.percent(saving.low)} to {text.percent(saving.high)}"]
    cells += ["kept" if lever.kept else "left off", lever.reason]
    return el("tr", el("th", lever.lever, scope="row"), [el("td", cell) for cell in cells])
