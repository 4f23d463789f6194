"""A plan as text for a terminal."""

from __future__ import annotations

from pennyweight.columns import columns
from pennyweight.errors import Problem
from pennyweight.plan.records import Plan, StageEstimate


def format_plan(plan: Plan) -> str:
    """The plan for a terminal: what stands in the way first, then a line a stage, then the totals."""
    lines: list[str] = []
    room = [problem for problem in plan.problems if problem.kind == "resource"]
    wrong = [problem for problem in plan.problems if problem.kind != "resource"]
    if room:
        lines += ["Will not fit:", *(_indented(problem) for problem in room), ""]
    if wrong:
        lines += ["Cannot run:", *(_indented(problem) for problem in wrong), ""]
    if plan.stages:
        rows = [("stage", "subject", "time", "memory", "disk", "download", "weights"), *map(_row, plan.stages)]
        rows.append(_totals(plan))
        table = columns(rows, left=2)
        rule = "-" * max(map(len, table))
        lines += [table[0], rule, *table[1:-1], rule, table[-1]]
    lines += [f"note: {note}" for note in [*plan.notes, *_stage_notes(plan)]]
    return "\n".join(lines)


def _stage_notes(plan: Plan) -> list[str]:
    return list(dict.fromkeys(note for stage in plan.stages if stage.stage != "quantize" for note in stage.notes))


def _row(stage: StageEstimate) -> tuple[str, ...]:
    subject = stage.subject if len(stage.subject) <= 44 else f"{stage.subject[:43]}…"
    took = "reused" if stage.reused else format_seconds(stage.seconds)
    sizes = (stage.peak_memory_bytes, stage.disk_bytes, stage.download_bytes)
    weights = "" if stage.weight_bytes is None else f"{stage.weight_bytes:,}"
    return (stage.stage, subject, took, *map(format_bytes, sizes), weights)


def _totals(plan: Plan) -> tuple[str, ...]:
    sizes = (plan.peak_memory_bytes, plan.disk_bytes, plan.download_bytes)
    at_least = "> " if any(stage.seconds is None for stage in plan.stages) else ""
    took = at_least + format_seconds(plan.seconds)
    return ("total", f"on {plan.device}", took, *map(format_bytes, sizes), "")


def _indented(problem: Problem) -> str:
    return "  " + str(problem)


def format_seconds(seconds: float | None) -> str:
    """`42 s`, `3 min 10 s`, `2 h 05 min`, or `?`."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_bytes(size: int | None) -> str:
    """Decimal units with three digits (`269 MB`, `1.62 GB`), `-` for nothing, `?` for unknown."""
    if size is None:
        return "?"
    if size == 0:
        return "-"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}" if size < 999.5 * scale else f"{size / scale:.0f} {unit}"
    return f"{size} B"
