"""The benchmark's stage around the sessions: memory, energy and ceilings of candidates that only pretend to run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pennyweight import benchmark, checkpoints, machine, runtimes, speed
from pennyweight.benchmark import energy
from pennyweight.recipe import Benchmark
from pennyweight.records import BenchmarkReport, Candidate, CostPoint, CostReport, Measured
from pennyweight.runtimes import Generation, Limits, RuntimeKind

SETTINGS = Benchmark.model_validate(
    {
        "workload": {"input_tokens": 16, "output_tokens": 4},
        "concurrency": [1, 2],
        "decide_at": 1,
        "rounds": 2,
        "decide_rounds": 3,
        "price": {"name": "mine", "usd_per_hour": 1.0},
    }
)
MIB = 1 << 20
HELD = {"base": 40 * MIB, "a": 90 * MIB}
STEP = {"base": 0.02, "a": 0.01}


class Session:
    """Holds memory from its first wave on, and 30 MiB more while a wave lasts."""

    def __init__(self, candidate: Candidate, device: str) -> None:
        self._variant = candidate.variant
        self._block: bytes | None = None

    def generate(self, ids: np.ndarray, new_tokens: int, stop: bool = False) -> Generation:
        self._block = self._block or b"x" * HELD[self._variant]
        passing = b"x" * (30 * MIB)
        time.sleep(0.06)
        del passing
        return Generation(0.1, [STEP[self._variant]] * (new_tokens - 1), np.zeros((len(ids), new_tokens), np.int64))

    def close(self) -> None:
        self._block = None


@pytest.fixture
def candidates(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> list[Candidate]:
    kind = RuntimeKind(
        1, (), None, Session, lambda checkpoint, device: "float32", lambda candidate: Limits(None, 1, 1), "waves"
    )
    monkeypatch.setattr(runtimes, "get", lambda name: kind)
    checkpoint = checkpoints.describe(tiny_model, "here")
    return [
        Candidate(
            id=f"{variant}@transformers", variant=variant, runtime="transformers", checkpoint=checkpoint,
            path=str(tiny_model), digest=variant, bytes=1000, weight_bytes=checkpoint.weight_bytes, dtype="float32",
        )
        for variant in ("base", "a")
    ]  # fmt: skip


def speeds(*found: float) -> Measured:
    return Measured(threads=1, read_gb_per_s=found[0], gflops_fp32=found[1], gflops_bf16=found[2], gops_int8=found[3])


def run(candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch) -> BenchmarkReport:
    measured = iter([speeds(10, 90, 200, 300), speeds(12, 80, 210, 290)])
    monkeypatch.setattr(speed, "ceilings", lambda device: next(measured))
    prompts = np.zeros((8, 64), np.int64)
    return benchmark.run_benchmark(candidates, SETTINGS, lambda n, length: prompts[:n, :length], "cpu", lambda *_: None)


@pytest.mark.parametrize("free", [10**12, 1])
def test_each_candidate_is_charged_with_its_own_memory(
    candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """Whether all stay loaded, or one at a time is."""
    monkeypatch.setattr(machine, "free_memory", lambda device: free)
    found = run(candidates, monkeypatch)
    for variant, held in HELD.items():
        peak = found.reports[f"{variant}@transformers"].peak_memory_bytes
        assert held + 25 * MIB < peak < held + 45 * MIB


def test_every_point_stands_beside_its_bound(candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(candidates, monkeypatch)
    assert found.ceilings == speeds(12, 90, 210, 300)
    assert BenchmarkReport.model_validate_json(found.model_dump_json()) == found
    base, ours = (found.reports[f"{name}@transformers"].points for name in ("base", "a"))
    for point, rival in zip(ours, base):
        assert point.roofline.best_output_tokens_per_second > point.output_tokens_per_second
        least = point.concurrency * 4 / point.roofline.best_output_tokens_per_second
        assert rival.output_tokens_per_second == pytest.approx(point.concurrency * 4 / 0.16)
        assert point.roofline.largest_saving == pytest.approx(1 - least / 0.16)
        assert point.roofline.saving_realized == pytest.approx(point.saving.value / point.roofline.largest_saving)


def test_energy_is_that_of_the_waves(candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter(range(0, 10**6, 10))
    counter = energy.Counter("package-0", lambda: float(next(readings)))
    monkeypatch.setattr(energy, "counters", lambda device: [counter])
    found = run(candidates, monkeypatch)
    assert found.energy_counters == ["package-0"]
    joules = [point.joules_per_output_token for point in found.reports["a@transformers"].points]
    assert joules == pytest.approx([10 / 4, 10 / 8])  # 10 J between two readings; 4 tokens a request


def test_without_counters_there_is_no_energy(candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "counters", lambda device: [])
    found = run(candidates, monkeypatch)
    points = [point for report in found.reports.values() for point in report.points]
    assert found.energy_counters == []
    assert {point.joules_per_output_token for point in points} == {None}


def test_older_records_are_read() -> None:
    new: dict[str, Any] = {"roofline": None, "joules_per_output_token": None}
    body = dict.fromkeys(
        CostPoint.model_fields.keys() - new.keys() - {"ttft_ms", "tpot_ms", "saving_against", "log_ratios"}, 1
    )
    body |= {"ttft_ms": {"p50": 1, "p95": 1}, "tpot_ms": {"p50": 1, "p95": 1}, "saving": None, "slo_met": None}
    assert CostPoint.model_validate(body).model_dump().items() >= new.items()
    report = {"candidate": "a", "usd_per_hour": 1, "points": [body]}
    assert CostReport.model_validate(report).peak_memory_bytes is None
