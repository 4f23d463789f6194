"""One run as one HTML file that needs nothing else: to look at, to print, and to show in MLflow's preview."""

from __future__ import annotations

from pathlib import Path

from pennyweight.compare import flips_of_run
from pennyweight.files import write_whole
from pennyweight.load.serving import read as read_serving
from pennyweight.records import RunRecord
from pennyweight.report.page import render

__all__ = ["write_report"]


def write_report(record: RunRecord, path: Path) -> None:
    """Write `record` as a self-contained HTML file, with what lies in its folder: the answers that flipped, and what
    `cost` measured.

    The same files give the same bytes. Raises StoreError.
    """
    write_whole(path, render(record, flips_of_run(record), read_serving(record)))
