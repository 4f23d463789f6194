"""The report's tables. One row a candidate; numbers right-aligned, in digits of one width."""

from __future__ import annotations

import math
from itertools import groupby

from pennyweight.records import CandidateResult, CostPoint, MetricValue, Percentiles, RunRecord
from pennyweight.report import facts, text
from pennyweight.report.markup import Html, el
from pennyweight.report.svg import symbol

#: Metrics that are 0 or 1 for the base by definition: their difference from the base says nothing more.
_RELATIVE = {"kl_mean", "kl_p99", "kl_p999", "top1_agreement", "nll_delta"}


def candidates_table(record: RunRecord) -> Html:
    """Everything that was measured, one row a candidate; what it costs comes first: narrow windows cut off the rest."""
    metrics, loads, load = facts.metric_names(record), facts.concurrencies(record), facts.decide_at(record)
    front = facts.front_ids(record)
    groups = [("", 1), (f"Cost at {load}", 2), ("Weights", 1), *_metric_groups(metrics)]
    groups += [("Output tokens/s", len(loads)), (f"Latency at {load}, ms", 2)]
    columns = ["candidate", "$ per 1M tokens", "saving", "MB"]
    columns += [text.METRIC_LABELS.get(name, name.rpartition("/")[2]) for name in metrics]
    columns += [*(f"at {count}" for count in loads), "TTFT p50, p95", "TPOT p50, p95"]
    bounds = [None, None, _saving_bound(record), None, *(_bound(record, name) for name in metrics)]
    bounds += [None] * (len(columns) - len(bounds))
    head = el(
        "thead",
        el("tr", [el("th", name, colspan=span, scope="colgroup") for name, span in groups if span], class_="groups"),
        el("tr", [el("th", name, _second_line(bound), scope="col") for name, bound in zip(columns, bounds)]),
    )
    rows = [_candidate_row(record, result, metrics, loads, front) for result in record.candidates]
    table = el("table", head, el("tbody", rows), class_="candidates")
    return el("div", table, class_="scroll", tabindex=0, role="region", aria_label="All candidates")


def _metric_groups(metrics: list[str]) -> list[tuple[str, int]]:
    """(heading, columns): neighbouring metrics of one task share its name."""
    tasks = [name.rpartition("/")[0] or "Divergence from the base" for name in metrics]
    return [(task, len(list(group))) for task, group in groupby(tasks)]


def _candidate_row(
    record: RunRecord, result: CandidateResult, metrics: list[str], loads: list[int], front: set[str]
) -> Html:
    status, won = result.verdict.status, result.id == record.winner
    words = ["winner" if won else status, "Pareto front" if result.id in front else None]
    name = el(
        "th",
        el("span", symbol(status), _breakable(result.id), class_="name"),
        el("small", ", ".join(word for word in words if word)),
        scope="row",
    )
    point = facts.point_at(result, facts.decide_at(record))
    cells = [el("td", text.usd(point.usd_per_1m_tokens if point else None), class_="cost"), _saving(point)]
    cells += [_size(record, result), *(_metric(name, facts.metric_of(result, name)) for name in metrics)]
    cells += [_throughput(facts.point_at(result, count)) for count in loads]
    cells += [_latency(point.ttft_ms if point else None), _latency(point.tpot_ms if point else None)]
    classes = [status, "winner" if won else "", "front" if result.id in front else ""]
    return el("tr", name, cells, class_=" ".join(filter(None, classes)))


def _breakable(candidate: str) -> Html:
    """A candidate's id that may break after the @."""
    variant, at, runtime = candidate.partition("@")
    return el("span", variant, at, el("wbr"), runtime)


def _bound(record: RunRecord, name: str) -> str | None:
    return ", ".join(text.condition(item) for item in facts.gate(record) if item["name"] == name) or None


def _saving_bound(record: RunRecord) -> str | None:
    """What the gate asks of the saving at the load that decides."""
    bounds = facts.saving_bounds(record)
    return ", ".join(text.minus(f"≥ {100 * bound:g}%") for bound in bounds) or None


def _size(record: RunRecord, result: CandidateResult) -> Html:
    base = facts.cheapest_base(record)
    ours = result.candidate.bytes if result.candidate else None
    theirs = base.candidate.bytes if base and base.candidate else None
    ratio = f"× {ours / theirs:.2f}" if ours is not None and theirs else None
    return el("td", text.MISSING if ours is None else text.number(ours / 1e6), _second_line(ratio))


def _metric(name: str, metric: MetricValue | None) -> Html:
    """The value; under it its difference from the base where that says something, and the standard error of either."""
    if metric is None:
        return el("td", text.MISSING)
    lines = [text.standard_error(metric.stderr)] if metric.stderr else []
    if name not in _RELATIVE and metric.delta is not None and (metric.delta or metric.delta_stderr):
        lines = [text.change(metric.delta)]
        lines += [text.standard_error(metric.delta_stderr)] if metric.delta_stderr else []
    return el("td", text.score(metric.value), [_second_line(line) for line in lines], title=_metric_title(metric))


def _metric_title(metric: MetricValue) -> str:
    parts = [f"{metric.n} samples"]
    if metric.low is not None and metric.high is not None:
        parts.append(f"95% interval {text.number(metric.low)} to {text.number(metric.high)}")
    elif metric.stderr is not None:
        parts.append(f"standard error {text.number(metric.stderr)}")
    if metric.base is not None:
        parts.append(f"base {text.score(metric.base)}")
    return ", ".join(parts)


def _throughput(point: CostPoint | None) -> Html:
    if point is None:
        return el("td", text.MISSING)
    return el("td", text.number(point.output_tokens_per_second), _slo_mark(point))


def _latency(found: Percentiles | None) -> Html:
    if found is None:
        return el("td", text.MISSING)
    return el("td", text.number(found.p50), _second_line(text.number(found.p95)))


def _saving(point: CostPoint | None) -> Html:
    if point is None or point.saving is None:
        return el("td", text.MISSING)
    low, high = text.percent(point.saving.low), text.percent(point.saving.high)
    return el("td", text.percent(point.saving.value), _second_line(f"{low} to {high}"))


def _slo_mark(point: CostPoint) -> Html | None:
    return el("sup", "†", title="SLO missed") if point.slo_met is False else None


def _second_line(words: str | None) -> Html | None:
    return el("small", words) if words else None


def denominator(record: RunRecord) -> str:
    """What a million tokens are, in words."""
    workload = facts.section(record, "benchmark").get("workload")
    mix = ""
    if isinstance(workload, dict) and "input_tokens" in workload:
        name = f" of the workload {workload['name']}" if workload.get("name") else ""
        mix = f"{name}, {workload['input_tokens']} tokens in and {workload.get('output_tokens')} out of each request"
    return f"A million tokens are input and output tokens together, at the mix{mix or ' of the workload'}."


def slo_missed(record: RunRecord) -> bool:
    points = (point for result in record.candidates if result.cost for point in result.cost.points)
    return any(point.slo_met is False for point in points)


# --- reasons, cost by load --------------------------------------------------------------------------------------------


def reasons(record: RunRecord) -> Html:
    """Every reason of every verdict, and how exactly each export matches its checkpoint."""
    return el("div", [_reasons_of(record, result) for result in record.candidates], class_="reasons")


def _reasons_of(record: RunRecord, result: CandidateResult) -> Html:
    status = result.verdict.status
    title = el("h3", symbol(status, ring=result.id == record.winner), result.id, el("small", status))
    items = [_reason(words) for words in result.verdict.reasons]
    parity = result.candidate.parity if result.candidate else None
    if parity is not None:
        count = parity.quantized_tensors
        words = (
            f"export parity: KL {text.number(parity.kl_mean)} nats per token from its checkpoint, tolerance "
            f"{parity.tolerance:g}; top-1 agreement {text.score(parity.top1_agreement)} "
            f"on {parity.tokens:,} tokens; {count} quantized tensor{'' if count == 1 else 's'}"
        )
        items.append(el("li", words, class_="parity"))
    return el("section", title, el("ul", items) if items else None, class_=status)


def _reason(words: str) -> Html:
    """A reason, its leading outcome (`pass:`, `fail:`, `inconclusive:`) set apart."""
    outcome, separator, rest = words.partition(": ")
    if separator and outcome in ("pass", "fail", "inconclusive"):
        return el("li", symbol(outcome), el("span", el("b", outcome), " ", rest), class_="outcome")
    return el("li", words)


def cost_by_load(record: RunRecord) -> Html:
    """USD per 1M tokens at every concurrency; bold marks the cheapest that may be served."""
    loads, load = facts.concurrencies(record), facts.decide_at(record)
    if not loads:
        return el("p", "No candidate's cost was measured.", class_="empty")
    cheapest = {count: facts.cheapest(record, count) for count in loads}
    head = [el("th", "candidate", scope="col")]
    head += [
        el("th", f"concurrency {count}", _second_line("decides" if count == load else None), scope="col")
        for count in loads
    ]
    rows = []
    for result in record.candidates:
        cells = [_load_cell(facts.point_at(result, count), result.id in cheapest[count]) for count in loads]
        name = el("th", el("span", symbol(result.verdict.status), result.id, class_="name"), scope="row")
        won = " winner" if result.id == record.winner else ""
        rows.append(el("tr", name, cells, class_=f"{result.verdict.status}{won}"))
    table = el("table", el("thead", el("tr", head)), el("tbody", rows), class_="loads")
    return el("div", table, class_="scroll")


def _load_cell(point: CostPoint | None, cheapest: bool) -> Html:
    if point is None:
        return el("td", text.MISSING)
    cost = text.usd(point.usd_per_1m_tokens)
    saving = _second_line(text.saving(point.saving.value) if point.saving else None)
    return el("td", el("b", cost) if cheapest else cost, _slo_mark(point), saving)


# --- where the time went, environment, digests ------------------------------------------------------------------------


def stages(record: RunRecord) -> Html:
    """Seconds and peak memory of each stage, the longest marked by the longest bar."""
    if not record.stages:
        return el("p", "No stage was recorded.", class_="empty")
    longest = max((stage.seconds for stage in record.stages if math.isfinite(stage.seconds)), default=0)
    head = [("stage", None), ("subject", "text"), ("time", None), ("", None)]
    head += [("in libraries", None), ("peak memory", None), ("", "text")]
    rows = []
    for stage in record.stages:
        share = stage.seconds / longest if longest and math.isfinite(stage.seconds) else 0.0
        bar = el("span", class_="bar", style=f"width:{100 * share:.1f}%")
        computed = stage.seconds and not stage.reused
        library = text.percent(stage.library_seconds / stage.seconds) if computed else text.MISSING
        outcome = stage.error or ("reused" if stage.reused else "")
        rows.append(
            el(
                "tr",
                el("th", stage.stage, scope="row"),
                el("td", stage.subject, class_="text"),
                el("td", text.duration(stage.seconds)),
                el("td", bar, class_="bars"),
                el("td", library),
                el("td", text.size(stage.peak_memory_bytes)),
                el("td", outcome, class_="text error" if stage.error else "text"),
            )
        )
    table = el(
        "table",
        el("thead", el("tr", [el("th", name, scope="col", class_=align) for name, align in head])),
        el("tbody", rows),
        class_="stages",
    )
    return el("div", table, class_="scroll")


def time_summary(record: RunRecord) -> str:
    """The whole, and the share of it that was not spent in libraries."""
    words = f"The run took {text.duration(record.seconds)}"
    library = sum(stage.library_seconds for stage in record.stages)
    if not record.stages or not record.seconds or not math.isfinite(library):
        return f"{words}."
    reused = sum(stage.reused for stage in record.stages)
    again = f"; {reused} of {len(record.stages)} stages were taken from earlier runs" if reused else ""
    own = max(record.seconds - library, 0.0)
    return f"{words}, {text.percent(own / record.seconds)} of it in Pennyweight's own code{again}."


def digests(record: RunRecord) -> Html:
    """The first digits of what identifies each candidate's files."""
    head = ["candidate", "checkpoint", "candidate's files", "quality samples"]
    rows = []
    for result in record.candidates:
        found = [
            result.checkpoint.digest if result.checkpoint else None,
            result.candidate.digest if result.candidate else None,
            result.quality.samples_digest if result.quality else None,
        ]
        cells = [el("td", el("code", _short(digest)) if digest else text.MISSING, title=digest) for digest in found]
        rows.append(el("tr", el("th", result.id, scope="row"), cells))
    table = el(
        "table",
        el("thead", el("tr", [el("th", name, scope="col") for name in head])),
        el("tbody", rows),
        class_="digests",
    )
    return el("div", table, class_="scroll")


def environment(record: RunRecord) -> Html:
    """The machine and the libraries' versions, nested facts with dotted names."""
    rows = [("recipe", f"{record.recipe.path}, digest {_short(record.recipe.digest)}")]
    rows += _flat(record.environment)
    return el("dl", [el("div", el("dt", name), el("dd", value)) for name, value in rows], class_="environment")


def _flat(value: dict, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, item in value.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(item, dict) and all(not isinstance(inner, dict | list) for inner in item.values()):
            rows.append((name, ", ".join(f"{inner} {_plain(found)}" for inner, found in item.items()) or "none"))
        elif isinstance(item, dict):
            rows += _flat(item, f"{name}.")
        else:
            rows.append((name, ", ".join(map(_plain, item)) or "none" if isinstance(item, list) else _plain(item)))
    return rows


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else str(value)


def _short(digest: str) -> str:
    return digest[:16]
