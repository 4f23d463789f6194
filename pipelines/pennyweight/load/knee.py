"""The concurrency at which a token costs least while the service level holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field

from pennyweight.load.report import LoadReport
from pennyweight.records import Record

#: Share of requests that must meet the service level.
SHARE = 0.95
#: Times that a load is measured again, with twice as many requests, where the share's interval decides nothing.
REPEATS = 3

#: (concurrency, how many times as many requests as usual) → what was measured; None where nothing was served.
Measure = Callable[[int, int], LoadReport | None]


class Knee(Record):
    concurrency: int | None = Field(description="None where no load meets the SLO")
    usd_per_1m_tokens: float | None = None
    reports: list[LoadReport] = Field(description="every load that was measured, by rising concurrency")
    at_the_limit: bool = Field(False, description="the largest load that was allowed still met the SLO")
    unclear: list[int] = Field([], description="loads whose share of good requests stayed undecided; taken as not met")


def find_knee(measure: Measure, most: int) -> Knee:
    """Double the concurrency from 1 until the SLO breaks, then halve the gap.

    A load holds where the lower bound of its share of good requests is at least `SHARE`, and breaks where the upper
    bound lies below. Throughput rises with concurrency until it is flat, so of the loads that hold the cheapest is
    taken, which need not be the largest.
    """
    reports: dict[int, LoadReport] = {}
    unclear: list[int] = []

    def holds(concurrency: int) -> bool:
        outcome, report = _decide(measure, concurrency)
        if report is not None:
            reports[concurrency] = report
        if outcome == "unclear":
            unclear.append(concurrency)
        return outcome == "holds"

    good, bad, at = 0, most + 1, 1
    while at <= most:
        if not holds(at):
            bad = at
            break
        good, at = at, at * 2 if at * 2 <= most or at == most else most
    while bad - good > max(1, good // 8):  # an eighth is closer than two measurements agree
        middle = (good + bad) // 2
        if holds(middle):
            good = middle
        else:
            bad = middle
    kept = [report for at, report in reports.items() if at <= good and at not in unclear]
    best = max(kept, key=lambda report: report.total_tokens_per_second.value, default=None)
    return Knee(
        concurrency=best.concurrency if best else None,
        usd_per_1m_tokens=best.usd_per_1m_tokens.value if best and best.usd_per_1m_tokens else None,
        reports=[reports[at] for at in sorted(reports)],
        at_the_limit=good == most,
        unclear=unclear,
    )


def _decide(measure: Measure, concurrency: int) -> tuple[Literal["holds", "breaks", "unclear"], LoadReport | None]:
    report = None
    for repeat in range(REPEATS):
        report = measure(concurrency, 2**repeat)
        if report is None or report.slo_share is None:
            return "breaks", report
        if report.slo_share.low >= SHARE:
            return "holds", report
        if report.slo_share.high < SHARE or report.interrupted:
            return "breaks", report
    return "unclear", report
