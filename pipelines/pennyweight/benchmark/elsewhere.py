"""What a run's candidates would cost on a machine that nobody measured: through the roofline, marked as projected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from pennyweight.benchmark import cost
from pennyweight.benchmark.prices import price_of
from pennyweight.benchmark.roofline import Least, wave, wave_seconds
from pennyweight.benchmark.work import Work, work_of
from pennyweight.errors import PennyweightError, UsageError, did_you_mean
from pennyweight.recipe import Ceilings, Prices
from pennyweight.records import Candidate, CostPoint, Measured, Price, Record, RunRecord


class Projection(Record):
    """One candidate at one load on another machine."""

    kind: Literal["projected"] = "projected"
    candidate: str
    concurrency: int
    machine: str
    ceilings: str = Field(description="where the machine's ceilings are from")
    usd_per_1m_tokens_here: float = Field(description="measured")
    usd_per_1m_tokens: float = Field(
        description="if the share of the roofline that was realized here is realized there"
    )
    usd_per_1m_tokens_at_best: float = Field(description="if all of it is")
    output_tokens_per_second: float = Field(description="as `usd_per_1m_tokens`")


def project(record: RunRecord, machines: Sequence[str], prices: Prices) -> list[Projection]:
    """Every candidate's measured points on `machines`, names of the price sheet.

    A wave that took t seconds here, where it takes r at least, takes t · R / r there, where it takes R at least: r and
    R are the roofline's, R from a data sheet. Other kernels run there, so this says what to try, not what to pay.
    Raises UsageError for a machine without a data sheet, and for a run without rooflines.
    """
    for name in machines:
        if name not in prices.ceilings:
            hint = f"{did_you_mean(name, list(prices.ceilings))}; a file of prices may add `ceilings` to its machines"
            raise UsageError(f"the price sheet has no ceilings of {name!r}", hint)
    here = record.ceilings
    if here is None:
        raise UsageError("the run measured no ceilings of its machine", "run the recipe again")
    found = []
    for result in record.candidates:
        work = _work_of(result.candidate) if result.candidate and result.cost else None
        for point in result.cost.points if work and result.cost else []:
            least = sum(phase.seconds for phase in _wave(work, here, point))
            for name in machines:
                there = _measured(prices.ceilings[name])
                best = sum(phase.seconds for phase in _wave(work, there, point))
                share = least / wave_seconds(point)
                price = price_of(prices.machines[name])
                found.append(
                    Projection(
                        candidate=result.id,
                        concurrency=point.concurrency,
                        machine=name,
                        ceilings=prices.ceilings[name].source,
                        usd_per_1m_tokens_here=point.usd_per_1m_tokens,
                        usd_per_1m_tokens=_usd(price, point, best / share),
                        usd_per_1m_tokens_at_best=_usd(price, point, best),
                        output_tokens_per_second=point.concurrency * point.output_tokens * share / best,
                    )
                )
    if not found:
        raise UsageError("no candidate of the run has a roofline")
    return found


def _work_of(candidate: Candidate) -> Work | None:
    try:
        return work_of(candidate)
    except (OSError, PennyweightError) as error:
        raise UsageError(f"the files of {candidate.id} cannot be read: {error}", "run the recipe again") from None


def _wave(work: Work, ceilings: Measured, point: CostPoint) -> list[Least]:
    return wave(work, ceilings, point.concurrency, point.input_tokens, point.output_tokens)


def _usd(price: Price, point: CostPoint, seconds: float) -> float:
    tokens_out = point.concurrency * point.output_tokens
    tokens = tokens_out + point.concurrency * point.input_tokens
    return cost.usd(price, tokens_out, seconds) / tokens * 1e6


def _measured(sheet: Ceilings) -> Measured:
    return Measured(
        threads=1,
        read_gb_per_s=sheet.read_gb_per_s,
        gflops_fp32=1e3 * sheet.tflops_fp32,
        gflops_bf16=1e3 * sheet.tflops_bf16,
        gops_int8=None if sheet.tops_int8 is None else 1e3 * sheet.tops_int8,
    )
