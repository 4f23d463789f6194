"""What a run's candidates cost as they serve, where it outlives the command: the run's folder, its report, MLflow."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pydantic import Field, ValidationError

from pennyweight.errors import TrackingError
from pennyweight.files import write_whole
from pennyweight.load.bench import BenchReport
from pennyweight.load.card import PriceCard
from pennyweight.load.knee import Knee
from pennyweight.load.report import LoadReport
from pennyweight.records import Record, RunRecord

#: In a run's folder: the reports of single candidates and mixes, and what came of them.
FOLDER, FILE = "cost", "serving.json"


class CandidateCost(Record):
    """One candidate as it serves the workload of its run."""

    candidate: str
    users: int | None = Field(
        description="requests in flight at which its tokens are cheapest; None: nothing meets the SLO"
    )
    knee: Knee | None = Field(description="None where the run's recipe has no SLO")
    card: PriceCard | None = Field(description="None where no load, or fewer than three mixes, could be measured")
    reports: list[BenchReport]

    @property
    def loads(self) -> list[LoadReport]:
        """Every load of the run's own mix that was measured."""
        return [*self.reports[0].loads, *(self.knee.reports if self.knee else [])]


class Serving(Record):
    candidates: list[CandidateCost]


def read(record: RunRecord) -> list[CandidateCost]:
    """What `keep` wrote last; nothing where there is none, or none that this version reads."""
    with contextlib.suppress(OSError, ValidationError):
        return Serving.model_validate_json((Path(record.run_dir) / FOLDER / FILE).read_text()).candidates
    return []


def keep(record: RunRecord, found: list[CandidateCost]) -> str | None:
    """Write it beside the run, into its report, and into MLflow where the run was logged.

    Candidates that are not in `found` stay as they were. Returns why MLflow has not got it. Raises StoreError.
    """
    from pennyweight import tracking
    from pennyweight.flow import REPORT_FILE
    from pennyweight.report import write_report

    folder = Path(record.run_dir)
    every = {item.candidate: item for item in [*read(record), *found]}
    ordered = [every[result.id] for result in record.candidates if result.id in every]
    file = folder / FOLDER / FILE
    write_whole(file, Serving(candidates=ordered).model_dump_json(indent=1) + "\n")
    write_report(record, folder / REPORT_FILE)
    try:
        if record.tracking:
            tracking.log_serving(record.tracking, [folder / REPORT_FILE, file], _measures(found))
    except TrackingError as error:
        return error.message
    return None


def _measures(found: list[CandidateCost]) -> dict[str, dict[str, float]]:
    """Candidate → metrics of its run in MLflow."""
    measures: dict[str, dict[str, float]] = {}
    for item in found:
        values: dict[str, float] = {} if item.users is None else {"knee_users" if item.knee else "users": item.users}
        if item.card:
            values |= {
                "usd_per_1m_input_tokens": item.card.usd_per_1m_input.value,
                "usd_per_1m_output_tokens": item.card.usd_per_1m_output.value,
                "usd_per_idle_hour": item.card.usd_per_idle_hour,
            }
        measures[item.candidate] = values
    return measures
