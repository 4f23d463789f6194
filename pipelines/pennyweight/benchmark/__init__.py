"""All candidates → what a token costs on each: one stage over the whole set, in turns, on one machine."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from pennyweight import machine, memory, runtimes, speed
from pennyweight.benchmark import cost, energy
from pennyweight.benchmark.prices import price_of
from pennyweight.benchmark.roofline import roofline
from pennyweight.benchmark.work import Work, work_of
from pennyweight.recipe import Benchmark
from pennyweight.records import BenchmarkReport, Candidate, CostPoint, CostReport, Measured, Percentiles, Price
from pennyweight.runtimes import Session

VERSION = 3
#: A result older than this is measured again: machines change, and so do their neighbours.
MAX_AGE_DAYS = 7
#: Of the memory that is free, how much all candidates together may take to stay loaded between their turns.
RESIDENT_SHARE = 0.5
#: Loaded size over size on disk: both engines of a runtime, activations and caches.
LOADED_OVER_DISK = 3.0
ORDER = "every candidate once a round, forwards, backwards, backwards, forwards, and so on"


@dataclass
class Wave:
    """One candidate's turn at one concurrency."""

    round: int
    ttft: float
    steps: list[float]
    joules: float | None = None

    @property
    def seconds(self) -> float:
        return self.ttft + sum(self.steps)


@dataclass
class Measurements:
    """Waves by (candidate id, concurrency), and the memory that each candidate added, in bytes."""

    waves: dict[tuple[str, int], list[Wave]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def run_benchmark(
    candidates: list[Candidate], settings: Benchmark, prompts: Callable[[int, int], np.ndarray], device: str,
    progress: Callable[[str, float], None],
) -> BenchmarkReport:  # fmt: skip
    """Measure all candidates in turn.

    `prompts(requests, tokens)` gives real text as token ids, int64 (requests, tokens). `progress` is told what runs and
    which fraction is done. A candidate that fails is reported in `failures`; the others go on.
    """
    begin = time.perf_counter()
    progress("the machine", 0.0)
    meter = energy.EnergyMeter(energy.counters(device))
    works = {candidate.id: work_of(candidate) for candidate in candidates}
    price = price_of(settings.price)
    before = speed.ceilings(device=device)
    measured = _measure(candidates, settings, prompts, device, meter, progress)
    ceilings = speed.fastest(before, speed.ceilings(device=device))
    return BenchmarkReport(
        reports=_with_rooflines(_reports(candidates, settings, price, measured), works, ceilings),
        failures=measured.failures,
        price=price,
        order=ORDER,
        seconds=time.perf_counter() - begin,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine.fingerprint(),
        ceilings=ceilings,
        energy_counters=[counter.name for counter in meter.counters],
    )


def rounds_at(settings: Benchmark, concurrency: int) -> int:
    return settings.decide_rounds if concurrency == settings.decide_at else settings.rounds


def turns(settings: Benchmark, ids: list[str]) -> Iterator[tuple[int, int, str]]:
    """(concurrency, round, candidate id), in the order that they run in; round −1 warms up.

    Each candidate is as often early in a round as late, so a machine that slows down is no candidate's fault. Were the
    order reversed in every round, the last of one would be the first of the next: what slows the machine for a moment
    would hit it twice, and the rounds would not be independent, as the interval takes them for.
    """
    for concurrency in settings.concurrency:
        for number in range(-1, rounds_at(settings, concurrency)):
            for name in in_turn(ids, number):
                yield concurrency, number, name


def in_turn(names: list[str], number: int) -> list[str]:
    """The order of round `number`: forwards, backwards, backwards, forwards."""
    return names[::-1] if number % 4 in (1, 2) else names


def _measure(
    candidates: list[Candidate], settings: Benchmark, prompts: Callable[[int, int], np.ndarray], device: str,
    meter: energy.EnergyMeter, progress: Callable[[str, float], None],
) -> Measurements:  # fmt: skip
    measured = Measurements()
    shape = settings.workload
    plan = list(turns(settings, [candidate.id for candidate in candidates]))
    total = sum(concurrency for concurrency, _, _ in plan)
    done = 0
    with ExitStack() as stack:
        sessions = _Sessions(candidates, device, stack)
        for concurrency, number, name in plan:
            progress(f"{name} at {concurrency}", done / total)
            done += concurrency
            if name in measured.failures:
                continue
            try:
                # Memory is watched before a candidate is timed, and in its first wave: the later ones are alike.
                with sessions.of(name, watched=number <= 0) as session:
                    if number < 0:
                        session.generate(prompts(concurrency, min(16, shape.input_tokens)), 2)
                        continue
                    ids = prompts(concurrency, shape.input_tokens)
                    with meter:
                        generation = session.generate(ids, shape.output_tokens)
            except Exception as error:
                measured.failures[name] = f"{type(error).__name__}: {error}"
                continue
            waves = measured.waves.setdefault((name, concurrency), [])
            waves.append(Wave(number, generation.ttft, generation.steps, meter.joules))
        measured.memory = sessions.most
    return measured


class _Sessions:
    """Candidates stay loaded between turns where memory allows it; else one at a time is.

    What a candidate holds is what the memory in use grew by in its turns; the most that it held is that before a turn,
    and the turn's peak above its beginning.
    """

    def __init__(self, candidates: list[Candidate], device: str, stack: ExitStack):
        self._candidates = {candidate.id: candidate for candidate in candidates}
        self._device = device
        self._open: dict[str, Session] = {}
        self._held: dict[str, int] = {}
        self.most: dict[str, int] = {}
        needed = sum(candidate.bytes for candidate in candidates) * LOADED_OVER_DISK
        self._resident = needed < machine.free_memory(device) * RESIDENT_SHARE
        _import_libraries({candidate.runtime for candidate in candidates})
        stack.callback(self._close_all)

    @contextmanager
    def of(self, name: str, watched: bool) -> Iterator[Session]:
        """One candidate's turn, its memory watched on request."""
        if name not in self._open and not self._resident:
            self._close_all()
        if not watched:
            yield self._get(name)
            return
        memory.release_memory()
        used = memory.device_bytes if self._device == "cuda" else None
        with memory.PeakMemory(used=used) as watched_memory:
            yield self._get(name)
            memory.release_memory()  # what the C library keeps of passing memory is held by nobody
        held = self._held.get(name, 0)
        self.most[name] = max(self.most.get(name, 0), held + watched_memory.peak_bytes - watched_memory.start_bytes)
        self._held[name] = held + watched_memory.end_bytes - watched_memory.start_bytes

    def _get(self, name: str) -> Session:
        if name not in self._open:
            candidate = self._candidates[name]
            self._open[name] = runtimes.get(candidate.runtime).load(candidate, self._device)
        return self._open[name]

    def _close_all(self) -> None:
        for session in self._open.values():
            session.close()
        self._open.clear()
        self._held.clear()


def _import_libraries(names: set[str]) -> None:
    """Import what the runtimes need, so that the first candidate of each is not charged with its library's memory."""
    for name in names:
        for distribution in runtimes.get(name).libraries:
            with suppress(ImportError):  # one of several that provide the same module
                importlib.import_module(distribution.replace("-", "_"))


def _reports(
    candidates: list[Candidate], settings: Benchmark, price: Price, measured: Measurements
) -> dict[str, CostReport]:
    complete = [candidate for candidate in candidates if candidate.id not in measured.failures]
    bases = [candidate.id for candidate in complete if candidate.variant == "base"]
    points: dict[str, list[CostPoint]] = {candidate.id: [] for candidate in complete}
    for concurrency in settings.concurrency:
        output_tokens = concurrency * settings.workload.output_tokens
        usd = {
            c.id: [cost.usd(price, output_tokens, wave.seconds) for wave in measured.waves[c.id, concurrency]]
            for c in complete
        }
        cheapest = min(bases, key=lambda name: np.mean(usd[name])) if bases else None
        for candidate in complete:
            logs = []
            if cheapest and candidate.id != cheapest:
                logs = cost.log_ratios(usd[candidate.id], usd[cheapest])
            points[candidate.id].append(
                _point(settings, price, concurrency, measured.waves[candidate.id, concurrency], logs, cheapest)
            )
    return {
        name: CostReport(
            candidate=name,
            usd_per_hour=price.usd_per_busy_hour,
            points=found,
            peak_memory_bytes=measured.memory.get(name),
        )
        for name, found in points.items()
    }


def _with_rooflines(
    reports: dict[str, CostReport], works: dict[str, Work | None], ceilings: Measured
) -> dict[str, CostReport]:
    """The reports, each point beside its bound and beside the cheapest base candidate at its load."""
    bases = [report for name, report in reports.items() if name.startswith("base@")]

    def bounded(report: CostReport) -> CostReport:
        work = works[report.candidate]
        if work is None:
            return report
        points = []
        for index, point in enumerate(report.points):
            rivals = [base.points[index] for base in bases]
            cheapest = max(rivals, key=lambda rival: rival.output_tokens_per_second, default=None)
            points.append(point.model_copy(update={"roofline": roofline(work, ceilings, point, cheapest)}))
        return report.model_copy(update={"points": points})

    return {name: bounded(report) for name, report in reports.items()}


def _point(
    settings: Benchmark, price: Price, concurrency: int, waves: list[Wave], logs: list[float], cheapest: str | None
) -> CostPoint:
    shape = settings.workload
    seconds = sum(wave.seconds for wave in waves)
    requests = concurrency * len(waves)
    tokens_in, tokens_out = requests * shape.input_tokens, requests * shape.output_tokens
    usd = cost.usd(price, tokens_out, seconds)
    ttft = _percentiles([wave.ttft for wave in waves])
    tpot = _percentiles([sum(wave.steps) / len(wave.steps) for wave in waves])
    joules = [wave.joules for wave in waves if wave.joules is not None]
    return CostPoint(
        concurrency=concurrency,
        input_tokens=shape.input_tokens,
        output_tokens=shape.output_tokens,
        rounds=len(waves),
        output_tokens_per_second=tokens_out / seconds,
        total_tokens_per_second=(tokens_in + tokens_out) / seconds,
        prefill_tokens_per_second=tokens_in / sum(wave.ttft for wave in waves),
        decode_tokens_per_second=(tokens_out - requests) / sum(sum(wave.steps) for wave in waves),
        ttft_ms=ttft,
        tpot_ms=tpot,
        slo_met=_slo_met(settings, ttft, tpot),
        usd_per_1m_tokens=usd / (tokens_in + tokens_out) * 1e6,
        usd_per_1m_output_tokens=usd / tokens_out * 1e6,
        saving=cost.saving_of(logs) if logs else None,
        saving_against=cheapest if logs else None,
        joules_per_output_token=sum(joules) / tokens_out if len(joules) == len(waves) else None,
        log_ratios=logs,
    )


def _slo_met(settings: Benchmark, ttft: Percentiles, tpot: Percentiles) -> bool | None:
    if settings.slo is None:
        return None
    limits = ((settings.slo.ttft_p95_ms, ttft.p95), (settings.slo.tpot_p95_ms, tpot.p95))
    return all(limit is None or value <= limit for limit, value in limits)


def _percentiles(seconds: list[float]) -> Percentiles:
    p50, p95 = (float(value) * 1000 for value in np.percentile(seconds, [50, 95]))
    return Percentiles(p50=p50, p95=p95)
