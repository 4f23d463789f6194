"""What a load took: the field's metrics, with the uncertainty of what was measured."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from pydantic import Field

from pennyweight.benchmark.cost import usd_per_million
from pennyweight.load.driver import Course
from pennyweight.load.requests import Served
from pennyweight.load.steady import BLOCKS, TOLERATED_DRIFT, drift, warm_up
from pennyweight.recipe import Slo
from pennyweight.records import Interval, Price, Record

CONFIDENCE = 0.95


class Spread(Record):
    """Milliseconds."""

    mean: float
    p50: float
    p95: float
    p99: float


class Steady(Record):
    """Whether the measured part is level, by the Mann–Kendall test on tokens a second in blocks of time."""

    warm_up_requests: int = Field(description="left out at the start, by MSER-5 on end-to-end latencies")
    change: float = Field(description="change of the throughput over the measured part, as a fraction")
    p_value: float
    steady: bool


class LoadReport(Record):
    """One load on one target."""

    load: str = Field(description="such as «8 users» or «2 requests/s, Poisson»")
    concurrency: int | None = None
    rate: float | None = Field(None, description="requests a second asked for")
    seconds: float = Field(description="measured: from the end of the warm-up until no more was sent")
    requests: int = Field(description="served in the measured part")
    failed: dict[str, int] = Field({}, description="kind of fault → requests, warm-up included")
    messages: list[str] = Field([], description="an example of each fault")
    input_tokens: int
    output_tokens: int
    output_tokens_per_second: Interval
    total_tokens_per_second: Interval
    requests_per_second: float
    tokens_per_second_per_user: float | None = Field(description="1 / mean TPOT")
    ttft_ms: Spread
    tpot_ms: Spread | None = Field(description="None where every answer is one token")
    itl_ms: Spread | None
    latency_ms: Spread
    slo_share: Interval | None = Field(None, description="of requests that meet the SLO; failed ones do not")
    goodput: float | None = Field(None, description="requests a second that meet the SLO")
    usd_per_1m_tokens: Interval | None = None
    usd_per_1m_output_tokens: Interval | None = None
    steady: Steady
    saturated: bool = Field(False, description="stopped: requests came faster than they were served")
    interrupted: bool = False


def summarize(
    course: Course, load: str, slo: Slo | None = None, price: Price | None = None,
    concurrency: int | None = None, rate: float | None = None,
) -> LoadReport | None:  # fmt: skip
    """Metrics of the measured part of a course; None where it has no request that was served."""
    failed = [item for item in course.served if not item.good]
    good = sorted((item for item in course.served if item.good), key=lambda item: item.due)
    if not good:
        return None
    skipped = warm_up(np.array([item.latency for item in good]))
    begin = course.begun if not skipped else good[skipped].due
    end = course.stopped_sending or max(item.ended for item in good)
    if end <= begin:  # a single wave: nothing was sent after it
        end = max(item.ended for item in good)
    measured = [item for item in good if item.due >= begin]
    seconds = end - begin
    blocks = _tokens_by_block(good, begin, end)
    output = _interval(blocks[0] / (seconds / BLOCKS))
    total = _interval(blocks.sum(0) / (seconds / BLOCKS))
    trend = drift(blocks[0])
    late = [item for item in failed if item.due >= begin]
    met = sum(_meets(item, slo) for item in measured) if slo else None
    gaps = [gap for item in measured for gap in np.diff(item.arrivals)]
    tpots = [item.tpot for item in measured if item.tpot is not None]
    return LoadReport(
        load=load,
        concurrency=concurrency,
        rate=rate,
        seconds=seconds,
        requests=len(measured),
        failed=dict(Counter(str(item.fault) for item in failed)),
        messages=list({item.fault: item.message for item in failed}.values()),
        input_tokens=sum(item.input_tokens for item in measured),
        output_tokens=sum(item.output_tokens for item in measured),
        output_tokens_per_second=output,
        total_tokens_per_second=total,
        requests_per_second=sum(begin <= item.ended <= end for item in good) / seconds,
        tokens_per_second_per_user=1 / float(np.mean(tpots)) if sum(tpots) > 0 else None,
        ttft_ms=_spread([item.ttft for item in measured]),
        tpot_ms=_spread(tpots) if tpots else None,
        itl_ms=_spread(gaps) if gaps else None,
        latency_ms=_spread([item.latency for item in measured]),
        slo_share=None if met is None else wilson(met, len(measured) + len(late)),
        goodput=None if met is None else met / seconds,
        usd_per_1m_tokens=None if price is None else _usd_per_million(price, total, output),
        usd_per_1m_output_tokens=None if price is None else _usd_per_million(price, output, output),
        steady=Steady(warm_up_requests=skipped, change=trend.change, p_value=trend.p_value, steady=trend.steady),
        saturated=course.saturated,
        interrupted=course.interrupted,
    )


def priced(report: LoadReport, price: Price) -> LoadReport:
    """The same load at another price."""
    total, output = report.total_tokens_per_second, report.output_tokens_per_second
    return report.model_copy(
        update={
            "usd_per_1m_tokens": _usd_per_million(price, total, output),
            "usd_per_1m_output_tokens": _usd_per_million(price, output, output),
        }
    )


def wilson(successes: int, trials: int, z: float = 1.959964) -> Interval:
    """A share's interval (Wilson, 1927)."""
    share = successes / trials
    scale = 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return Interval(value=share, low=max(0.0, centre - half), high=min(1.0, centre + half))


def _tokens_by_block(good: list[Served], begin: float, end: float) -> np.ndarray:
    """Tokens out and in, (2, BLOCKS). Output tokens count when they come, a prompt's when its first answer does."""
    edges = np.linspace(begin, end, BLOCKS + 1)
    out_at = np.concatenate([item.arrivals for item in good])
    weights = np.concatenate([np.full(len(i.arrivals), i.output_tokens / len(i.arrivals)) for i in good])
    out, _ = np.histogram(out_at, edges, weights=weights)
    into, _ = np.histogram(
        [item.arrivals[0] for item in good], edges, weights=np.array([item.input_tokens for item in good], float)
    )
    return np.stack([out, into])


def _interval(rates: np.ndarray) -> Interval:
    """Mean of blocks' rates, with Student's interval: the method of batch means (Law and Kelton)."""
    from scipy.stats import t

    mean = float(rates.mean())
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(rates) - 1) * rates.std(ddof=1) / math.sqrt(len(rates)))
    return Interval(value=mean, low=max(0.0, mean - half), high=mean + half)


def _usd_per_million(price: Price, speed: Interval, output: Interval) -> Interval:
    """Dollars for a million tokens: the faster, the less. Egress is paid for the share of them that are `output`."""
    egress = price.egress_usd_per_1m_output * output.value / speed.value if speed.value > 0 else 0.0

    def usd(tokens_per_second: float) -> float:
        if not tokens_per_second > 0:
            return math.inf
        return usd_per_million(price.usd_per_busy_hour, 1, 1 / tokens_per_second) + egress

    return Interval(value=usd(speed.value), low=usd(speed.high), high=usd(speed.low))


def _meets(item: Served, slo: Slo) -> bool:
    limits = ((slo.ttft_p95_ms, item.ttft), (slo.tpot_p95_ms, item.tpot))
    return all(limit is None or value is None or value * 1000 <= limit for limit, value in limits)


def _spread(seconds: list[float]) -> Spread:
    values = np.array(seconds) * 1000
    p50, p95, p99 = (float(value) for value in np.percentile(values, [50, 95, 99]))
    return Spread(mean=float(values.mean()), p50=p50, p95=p95, p99=p99)


def is_drifting(report: LoadReport) -> str | None:
    """A warning where the measured part is not level."""
    if report.steady.steady:
        return None
    return (
        f"throughput changed by {report.steady.change:+.0%} while it was measured (more than {TOLERATED_DRIFT:.0%}, "
        f"p = {report.steady.p_value:.2g}): measure longer, or find out what else the machine does"
    )
