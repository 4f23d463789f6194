"""The model card of a winner: what it is, what it was made of, what was measured, and what was not. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from pennyweight.records import CandidateResult, CostPoint, MetricValue, RunRecord
from pennyweight.tracking import naming
from pennyweight.tracking.connection import redact
from pennyweight.tracking.evidence import BOM, CARD, EVIDENCE

#: MLflow keeps so many characters of a version's description.
MAX_DESCRIPTION = 5000

UNKNOWN_LICENSE = "not stated by the recipe; ask its source"
#: What holds of every winner, whatever was measured.
GENERAL_LIMITS = (
    "What the base cannot do, or should not be used for, holds here too. Quality was compared with the base's, on the "
    "data named here; nothing says that answers are true, safe or fair.",
    "Languages, domains and lengths that the suite does not have were not judged.",
)


def make_card(record: RunRecord, winner: CandidateResult) -> str:
    """The card in Markdown, as it lies beside the model's files."""
    return "\n".join(line for section in _sections(record, winner) for line in section) + "\n"


def make_description(record: RunRecord, winner: CandidateResult) -> str:
    """The card as the registry shows it: sections are left out from the end until it fits."""
    sections = list(_sections(record, winner))
    while True:
        left_out = f"The whole card is in `{CARD}`, the evidence in `{EVIDENCE}`, beside the model's files."
        text = "\n".join([*(line for section in sections for line in section), left_out])
        if len(text) <= MAX_DESCRIPTION or len(sections) == 1:
            return text[:MAX_DESCRIPTION]
        sections.pop()


def _sections(record: RunRecord, winner: CandidateResult) -> Iterator[list[str]]:
    """The most important first."""
    yield [f"# {record.recipe.resolved.get('register') or record.name}: {winner.id}", "", naming.outcome(record), ""]
    yield ["| | |", "|---|---|", *(_line(row) for row in _origins(record, winner)), ""]
    yield ["## Limits", "", *(f"- {limit}" for limit in limits(record, winner)), ""]
    yield ["## Gate", "", *_gate(winner), ""]
    yield ["## Quality", "", *_quality(winner), ""]
    yield ["## Cost", "", *_cost(record, winner), ""]
    yield ["## Data", "", *_data(record), ""]
    files = f"`{EVIDENCE}` has every number unrounded, `{BOM}` is the bill of materials (CycloneDX)."
    yield ["## Beside this card", "", files, ""]


def base_of(record: RunRecord, winner: CandidateResult) -> dict[str, Any]:
    """The base that the winner was made from, its `uri`, `license` and more."""
    resolved, start = record.recipe.resolved, record.start_of(winner.variant)
    base = resolved.get("base") if start == "base" else (resolved.get("bases") or {}).get(start)
    return base if isinstance(base, dict) else {"uri": base}


def license_of(record: RunRecord, winner: CandidateResult) -> str:
    """Licence of the base that the winner was made from, as the recipe or our own list of bases says; empty where
    neither does."""
    from pennyweight.sources import known_bases

    base = base_of(record, winner)
    return base.get("license") or known_bases().get(base.get("uri") or "", {}).get("license", "")


def data_of(record: RunRecord) -> list[tuple[str, dict[str, Any], list[str]]]:
    """Name, source and uses of each data set that the winner was made with or judged on."""
    sources = record.recipe.resolved.get("data") or {}
    return [(name, sources.get(name) or {}, uses) for name, uses in _uses(record).items()]


def limits(record: RunRecord, winner: CandidateResult) -> list[str]:
    """What a reader must not take the numbers for."""
    found = []
    undecided = [item.name for item in winner.verdict.conditions if item.status not in ("pass", "fail")]
    if undecided:
        found.append(f"Reported and not decided on: {', '.join(undecided)}.")
    quality = winner.quality.metrics if winner.quality else {}
    if kl := quality.get("kl_mean"):
        apart = f"they are {_number(kl.value)} nats per token apart"
        if record.start_of(winner.variant) == "base":
            found.append(f"It does not predict what the base predicts: {apart}.")
        else:
            found.append(f"It was made from another model than the one that it was compared with: {apart}.")
    if cpu := record.environment.get("cpu"):
        threads = record.environment.get("threads")
        machine = f"{cpu}, {threads} threads" if threads else cpu
        found.append(f"Speed was measured on {machine}, and holds there.")
    return [*GENERAL_LIMITS, *found, *record.notes]


def steps_of(winner: CandidateResult) -> str:
    """What its checkpoint's origin says was done to the base."""
    assert winner.candidate
    _, *steps = winner.candidate.checkpoint.origin.split(" → ")
    return "; ".join(steps) or "none"


def _origins(record: RunRecord, winner: CandidateResult) -> Iterator[tuple[str, str]]:
    candidate, checkpoint = winner.candidate, winner.checkpoint
    yield "base", redact(str(base_of(record, winner).get("uri") or "unknown"))
    yield "licence of the base", license_of(record, winner) or UNKNOWN_LICENSE
    if record.start_of(winner.variant) != "base":
        yield "compared with", redact(str(naming.base_uri(record) or "unknown"))
    yield "recipe", f"{record.name}, digest {record.recipe.digest[:12]}"
    yield "steps", steps_of(winner)
    if candidate:
        yield "runs in", f"{candidate.runtime}, activations in {candidate.dtype}"
        yield "size", f"{candidate.bytes / 1e6:,.1f} MB"
        yield "digest of its files", candidate.digest
        if candidate.parity:
            parity = candidate.parity
            apart = f"{_number(parity.kl_mean)} of {parity.tolerance:g} nats per token"
            yield "exported file against its checkpoint", f"{apart} on {parity.tokens:,} tokens"
    if checkpoint:
        yield "parameters", f"{checkpoint.parameters:,}"
    versions = record.environment.get("versions") or {}
    made_by = f", with Pennyweight {versions['pennyweight']}" if "pennyweight" in versions else ""
    yield "made", f"{record.started_at}{made_by}"


def _gate(winner: CandidateResult) -> list[str]:
    if not winner.verdict.conditions:
        return [f"- {winner.verdict.status}: {reason}" for reason in winner.verdict.reasons]
    rows = [(item.name, item.status, item.reason) for item in winner.verdict.conditions]
    return _table(("condition", "verdict", "what was seen"), rows)


def _quality(winner: CandidateResult) -> list[str]:
    if not winner.quality:
        return ["Not measured."]
    rows = [_metric(name, metric) for name, metric in winner.quality.metrics.items()]
    return _table(("metric", "value", "95% interval", "base", "difference from the base", "n"), rows)


def _metric(name: str, metric: MetricValue) -> tuple[str, ...]:
    base = "" if metric.base is None else _number(metric.base)
    apart = _interval(metric.delta_low, metric.delta_high)
    difference = "" if metric.delta is None else f"{_number(metric.delta)}{apart}"
    return name, _number(metric.value), _interval(metric.low, metric.high).strip(), base, difference, f"{metric.n:,}"


def _cost(record: RunRecord, winner: CandidateResult) -> list[str]:
    if not winner.cost:
        return ["Not measured."]
    head = ("requests at once", "output tokens/s", "TTFT p95, ms", "TPOT p95, ms", "$ per 1M tokens", "saving")
    rows = [_point(point) for point in winner.cost.points]
    price = [f"Priced as {record.price.words()}.", ""] if record.price else []
    against = f"Savings are against {record.base}, with their 95% intervals." if record.base else ""
    return [*price, *_table(head, rows), "", against]


def _point(point: CostPoint) -> tuple[str, ...]:
    return (
        str(point.concurrency),
        f"{point.output_tokens_per_second:.1f}",
        f"{point.ttft_ms.p95:.0f}",
        f"{point.tpot_ms.p95:.1f}",
        f"{point.usd_per_1m_tokens:.4f}",
        naming.describe_saving(point) if point.saving and math.isfinite(point.saving.value) else "",
    )


def _data(record: RunRecord) -> list[str]:
    rows = []
    for name, source, uses in data_of(record):
        uri = redact(str(source.get("uri") or "lm-eval's own"))
        rows.append((name, ", ".join(uses), source.get("license") or "not stated", uri))
    return _table(("data", "used to", "licence", "source"), rows) if rows else ["None is named by the recipe."]


def _uses(record: RunRecord) -> dict[str, list[str]]:
    """Data set → what it was used for."""
    from pennyweight import shipped

    resolved = record.recipe.resolved
    found: dict[str, list[str]] = {}

    def note(name: Any, use: str) -> None:
        if isinstance(name, str) and use not in found.setdefault(name, []):
            found[name].append(use)

    winner = naming.result_of(record, record.winner)
    steps = (resolved.get("variants") or {}).get(winner.variant if winner else None) or []
    for body in (body for step in steps for body in step.values() if isinstance(body, dict)):
        calibrate = body.get("calibrate")
        note(calibrate.get("source") if isinstance(calibrate, dict) else calibrate, "calibrate")
        note(body.get("text"), "learn from")
    suite = resolved.get("evaluate")
    suite = suite if isinstance(suite, dict) else {}
    for part in [suite.get("divergence"), *(suite.get("perplexity") or []), suite.get("generation")]:
        note((part or {}).get("text"), "judge")
    for ref in suite.get("tasks") or []:
        task = shipped.tasks().get(ref["task"], {})
        note((task.get("metadata") or {}).get("data") or ref["task"], "judge")
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_line(head), _line(["---"] * len(head)), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({_number(low)} to {_number(high)})"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)
