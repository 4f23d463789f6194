"""What a token costs on every candidate."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight import benchmark as bench
from pennyweight import machine, runtimes
from pennyweight.benchmark import levers as lever_trials
from pennyweight.errors import StageError
from pennyweight.records import BenchmarkReport, Candidate, LeverReport
from pennyweight.stages.run import Run
from pennyweight.stages.texts import Texts
from pennyweight.store import Entry

if TYPE_CHECKING:
    import numpy as np


def benchmark(run: Run, candidates: list[Candidate], texts: Texts) -> BenchmarkReport:
    """What a token costs on every candidate. One stage over the whole set: another candidate measures all again."""
    settings = run.recipe.benchmark
    inputs = {
        "version": bench.VERSION,
        "candidates": {candidate.id: candidate.digest for candidate in candidates},
        "settings": settings.model_dump(mode="json", exclude={"levers", "draft"}),
        "prompts": texts.digests.get("prompts"),
        "runtimes": [runtimes.key(name, run.device) for name in sorted({c.runtime for c in candidates})],
        "machine": machine.fingerprint(),
    }

    def build(_: Path) -> dict[str, Any]:
        windows = _prompts(run, texts)
        expected = run.plan.expected_seconds("benchmark", "all candidates") or 0.0
        with stage.library():
            report = bench.run_benchmark(
                candidates,
                settings,
                lambda requests, tokens: windows[:requests, :tokens],
                run.device,
                lambda detail, done: run.progress.fraction("benchmark", detail, done, expected),
            )
        return report.model_dump(mode="json")

    with run.stage("benchmark", "all candidates") as stage:
        found = run.store.find("benchmark", inputs)
        if found and _is_stale(found):
            run.store.discard(found)
        entry = run.store.get_or_build("benchmark", inputs, build)
        stage.reused = entry.reused
    return BenchmarkReport.model_validate(entry.record)


def levers(run: Run, winner: Candidate, draft: Candidate | None, texts: Texts) -> list[LeverReport]:
    """What settings of its engine save on the winner. `draft` proposes tokens under the lever of that name."""
    settings = run.recipe.benchmark
    inputs = {
        "version": bench.VERSION,
        "candidate": winner.digest,
        "draft": draft and draft.digest,
        "settings": settings.model_dump(mode="json"),
        "prompts": texts.digests.get("prompts"),
        "runtimes": [runtimes.key(winner.runtime, run.device)],
        "machine": machine.fingerprint(),
    }

    def build(_: Path) -> dict[str, Any]:
        prompts, expected = _prompts(run, texts), run.plan.expected_seconds("levers", "the winner") or 0.0
        with stage.library():
            tried = lever_trials.measure(
                winner, settings, prompts, run.device,
                lambda detail, done: run.progress.fraction("levers", detail, done, expected), draft,
            )  # fmt: skip
        return {
            "levers": [report.model_dump(mode="json") for report in tried],
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    with run.stage("levers", "the winner") as stage:
        found = run.store.find("levers", inputs)
        known = runtimes.get(winner.runtime).levers
        if found and (
            _is_old(found) or any(i["saving"] is None and i["lever"] in known for i in found.record["levers"])
        ):
            run.store.discard(found)
        entry = run.store.get_or_build("levers", inputs, build)
        stage.reused = entry.reused
    # The store knows files by their digests; the name that they have is this run's.
    return [LeverReport.model_validate(item | {"candidate": winner.id}) for item in entry.record["levers"]]


def _is_stale(entry: Entry) -> bool:
    return bool(entry.record["failures"]) or _is_old(entry)


def _is_old(entry: Entry) -> bool:
    measured = datetime.fromisoformat(entry.record["measured_at"])
    return datetime.now(UTC) - measured > timedelta(days=bench.MAX_AGE_DAYS)


def _prompts(run: Run, texts: Texts) -> np.ndarray:
    windows = texts.load("prompts")
    if windows is None:
        raise StageError(
            "there is no text to make prompts of",
            "give the suite `divergence:`, or the recipe a data set with `text:`",
        )
    shared = run.recipe.benchmark.workload.shared_prefix
    windows[:, :shared] = windows[0, :shared]
    return windows
