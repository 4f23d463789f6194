"""Verdicts and costs → the winner, and how the run ended."""

from __future__ import annotations

from pennyweight.records import CandidateResult, CostPoint, CostReport, RunStatus


def point_at(cost: CostReport, concurrency: int) -> CostPoint:
    return next(point for point in cost.points if point.concurrency == concurrency)


def cheapest_base(results: list[CandidateResult], decide_at: int) -> str | None:
    """The base's candidate that costs least at `decide_at`."""
    priced = [(point_at(r.cost, decide_at).usd_per_1m_tokens, r.id) for r in results if r.variant == "base" and r.cost]
    return min(priced)[1] if priced else None


def choose_winner(results: list[CandidateResult], decide_at: int) -> str | None:
    """The cheapest passing candidate whose saving's lower bound is above 0, at `decide_at`."""
    eligible = []
    for result in results:
        if result.verdict.status != "pass" or result.cost is None:
            continue
        point = point_at(result.cost, decide_at)
        if point.saving is not None and point.saving.low > 0:
            eligible.append((point.usd_per_1m_tokens, result.id))
    return min(eligible)[1] if eligible else None


def run_status(results: list[CandidateResult], winner: str | None) -> RunStatus:
    """How the run ended; `EXIT_CODES` says what the command exits with."""
    statuses = {result.verdict.status for result in results}
    if winner:
        return "partial" if "error" in statuses else "passed"
    if "error" in statuses:
        return "failed"
    if "inconclusive" in statuses:
        return "inconclusive"
    return "nothing-cheaper" if "pass" in statuses else "nothing-passed"


EXIT_CODES: dict[RunStatus, int] = {
    "passed": 0,
    "partial": 0,
    "failed": 4,
    "inconclusive": 3,
    "nothing-passed": 1,
    "nothing-cheaper": 1,
}
