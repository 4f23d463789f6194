"""One run as one HTML file that needs nothing else: to look at, to print, and to show in MLflow's preview."""

from __future__ import annotations

from pathlib import Path

from pennyweight.compare import flips_of_run
from pennyweight.records import RunRecord
from pennyweight.report.page import render

__all__ = ["write_report"]


def write_report(record: RunRecord, path: Path) -> None:
    """Write `record` as a self-contained HTML file, with the answers that flipped where the run's samples are at hand.

    The same record and samples give the same bytes. Raises OSError.
    """
    path.write_text(render(record, flips_of_run(record)), encoding="utf-8")
