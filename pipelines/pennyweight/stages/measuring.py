"""What a token costs on every candidate."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight import benchmark as bench
from pennyweight import machine, runtimes
from pennyweight.errors import StageError
from pennyweight.records import BenchmarkReport, Candidate
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
        "settings": settings.model_dump(mode="json"),
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


def _is_stale(entry: Entry) -> bool:
    measured = datetime.fromisoformat(entry.record["measured_at"])
    return bool(entry.record["failures"]) or datetime.now(UTC) - measured > timedelta(days=bench.MAX_AGE_DAYS)


def _prompts(run: Run, texts: Texts) -> np.ndarray:
    windows = texts.load("prompts")
    if windows is None:
        raise StageError(
            "there is no text to make prompts of",
            "give the suite `divergence:`, or the recipe a data set with `text:`",
        )
    return windows
