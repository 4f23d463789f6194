"""What a plan says: an estimate for each stage, and what stands in the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, computed_field

from pennyweight.errors import Problem
from pennyweight.records import Measured, Record


@dataclass(frozen=True)
class PlanProblem(Problem):
    """A problem found before work. `recipe` and `machine` need another recipe or set-up, `resource` more room."""

    kind: Literal["recipe", "machine", "resource"] = "recipe"


class StageEstimate(Record):
    """What one stage will take. None where the base's shapes are not known yet."""

    stage: str = Field(description="source, data, quantize, export, reference, evaluate, benchmark, track")
    subject: str
    seconds: float | None
    peak_memory_bytes: int | None = Field(description="of the process and its children, libraries included")
    disk_bytes: int | None = Field(description="what the stage leaves on disk")
    download_bytes: int | None = Field(0, description="None where the source does not say before the download")
    weight_bytes: int | None = Field(None, description="bytes of the tensors that the stage writes; exact")
    reused: bool = Field(False, description="the store has the result already, or an earlier variant makes it")
    notes: list[str] = Field(default_factory=list)


class Plan(Record):
    """What a run of a recipe will take on this machine, and what stands in its way."""

    name: str
    device: Literal["cpu", "cuda"]
    stages: list[StageEstimate]
    problems: list[PlanProblem]
    missing_extras: list[str] = Field(description="extras of this package to install")
    measured: Measured | None = Field(description="None for a GPU that is not there")
    free_disk_bytes: int
    available_memory_bytes: int
    notes: list[str] = Field(default_factory=list)

    @computed_field
    @property
    def seconds(self) -> float:
        """Sum over the stages; a lower bound where a stage's time is unknown."""
        return sum(stage.seconds or 0.0 for stage in self.stages)

    @computed_field
    @property
    def peak_memory_bytes(self) -> int | None:
        return max((stage.peak_memory_bytes for stage in self.stages if stage.peak_memory_bytes), default=None)

    @computed_field
    @property
    def disk_bytes(self) -> int:
        return sum(stage.disk_bytes or 0 for stage in self.stages if not stage.reused)

    @computed_field
    @property
    def download_bytes(self) -> int:
        return sum(stage.download_bytes or 0 for stage in self.stages)

    def weight_bytes(self, stage: str, subject: str) -> int | None:
        """Exact tensor bytes that `stage` writes for `subject`; None where there is no such stage."""
        return next((s.weight_bytes for s in self.stages if (s.stage, s.subject) == (stage, subject)), None)

    @property
    def resource_problems(self) -> list[PlanProblem]:
        """Too little disk or memory, or a store that cannot be written."""
        return [problem for problem in self.problems if problem.kind == "resource"]

    def expected_seconds(self, stage: str, subject: str) -> float | None:
        """Estimate for one stage; None where it is unknown or there is no such stage."""
        return next((s.seconds for s in self.stages if (s.stage, s.subject) == (stage, subject)), None)
