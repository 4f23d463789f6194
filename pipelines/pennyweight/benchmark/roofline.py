"""The least time that a workload can take on a machine, and how near a candidate came to it. Pure functions.

The roofline (Williams, Waterman, Patterson, Roofline: An Insightful Visual Performance Model for Multicore
Architectures, CACM 52(4), 2009): work that reads B bytes and does F operations takes at least
max(B / read speed, F / peak) seconds. Both ceilings are measured on the machine in the session that they bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from pennyweight.benchmark.work import Work
from pennyweight.records import CostPoint, Measured, Roofline


@dataclass(frozen=True)
class Least:
    """Seconds that reading and computing take at least. Where both must be done, the longer one bounds."""

    memory: float
    compute: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.compute)


def read_speed(ceilings: Measured, size: int) -> float:
    """Bytes a second at which `size` bytes can be read over and over.

    What fits in a cache is read faster, so a model is bounded by the speed of a memory no larger than itself: the
    largest one that was measured. A larger memory cannot be faster; where it was measured so, that is the bound.
    """
    reads = ceilings.reads or {0: ceilings.read_gb_per_s}
    floor = max((measured for measured in reads if measured <= size), default=min(reads))
    return 1e9 * max(speed for measured, speed in reads.items() if measured >= floor)


def peak(ceilings: Measured, dtype: str, integers: bool) -> float:
    """Operations a second of matrix products in `dtype`, the fastest way that a runtime may take.

    Numbers of 16 bits can be multiplied in 32, and `integers` in 8 bits or as floating point.
    """
    speeds = [ceilings.gflops_fp32]
    if dtype != "float32":
        speeds.append(ceilings.gflops_bf16)
    if integers and ceilings.gops_int8 is not None:
        speeds.append(ceilings.gops_int8)
    return 1e9 * max(speeds)


def prefill(work: Work, ceilings: Measured, requests: int, length: int) -> Least:
    """Least time to read the prompts of `requests` requests: the weights once, and all products and attention."""
    operations = work.prefill_operations(requests, length)
    return Least(
        memory=work.weight_bytes / read_speed(ceilings, work.weight_bytes),
        compute=operations / peak(ceilings, work.dtype, work.integers),
    )


def decode_step(work: Work, ceilings: Measured, requests: int, cached: int) -> Least:
    """Least time of a step that gives `requests` requests a token each, with `cached` positions before it."""
    size = work.step_bytes(requests, cached)
    operations = work.step_operations(requests, cached)
    return Least(size / read_speed(ceilings, size), operations / peak(ceilings, work.dtype, work.integers))


def wave(work: Work, ceilings: Measured, requests: int, n: int, m: int) -> list[Least]:
    """Least times of `requests` requests served together, n tokens in and m out: of the prompts, then of each step."""
    steps = [decode_step(work, ceilings, requests, cached) for cached in range(n, n + m - 1)]
    return [prefill(work, ceilings, requests, n), *steps]


def roofline(work: Work, ceilings: Measured, point: CostPoint, base: CostPoint | None) -> Roofline:
    """A candidate's measured point against its bound.

    A wave of requests takes at least prefill(n) + Σ decode_step(n + t) for t = 0 … m − 2, n tokens in and m out: the
    first token comes with the prompt. `base` is the cheapest base candidate at the same load. Then

    - largest saving = 1 − least seconds / the base's measured seconds: what the candidate's format could save at most;
    - MBU = bytes that a decoding step must read / measured seconds of a step / read speed (Databricks, LLM Inference
      Performance Engineering: Best Practices, 2023, with keys and values of all requests);
    - MFU = operations that a wave needs / measured seconds of a wave / peak (Chowdhery et al., PaLM, 2022, appendix B).
    """
    requests, n, m = point.concurrency, point.input_tokens, point.output_tokens
    lengths = range(n, n + m - 1)
    reading, *steps = phases = wave(work, ceilings, requests, n, m)
    least = sum(phase.seconds for phase in phases)
    on_memory = sum(phase.seconds for phase in phases if phase.memory >= phase.compute)
    best = requests * m / least

    step_bytes = sum(work.step_bytes(requests, cached) for cached in lengths) / len(lengths)
    step_reading = sum(step.memory for step in steps) / len(steps)
    step_seconds = requests / point.decode_tokens_per_second
    operations = work.prefill_operations(requests, n)
    operations += sum(work.step_operations(requests, cached) for cached in lengths)
    fastest = peak(ceilings, work.dtype, work.integers)

    largest = None if base is None else 1 - least / wave_seconds(base)
    saving = point.saving.value if point.saving else None
    return Roofline(
        best_output_tokens_per_second=best,
        bound="memory" if on_memory >= least / 2 else "compute",
        realized=point.output_tokens_per_second / best,
        mbu=step_reading / step_seconds,
        mfu=operations / wave_seconds(point) / fastest,
        largest_saving=largest,
        saving_realized=saving / largest if saving and largest and min(saving, largest) > 0 else None,
        prefill_seconds=reading.seconds,
        decode_step_seconds=sum(step.seconds for step in steps) / len(steps),
        weight_bytes=work.weight_bytes,
        kv_bytes_per_position=work.kv_bytes * len(work.windows),
        read_gb_per_s=step_bytes / step_reading / 1e9,
        peak_gops=fastest / 1e9,
    )


def wave_seconds(point: CostPoint) -> float:
    """Measured seconds of one wave, on average."""
    return point.concurrency * point.output_tokens / point.output_tokens_per_second
