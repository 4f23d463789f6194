"""What a run's metrics, parameters, tags and notes are called and say. Pure: no MLflow, no files."""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pennyweight.gate.words import number
from pennyweight.records import CandidateResult, CostPoint, Pruning, RunRecord, Verdict
from pennyweight.store import digest_of
from pennyweight.tracking.connection import redact

#: MLflow's limits, in characters.
MAX_KEY, MAX_PARAM, MAX_TAG = 250, 6000, 8000


class Measure(NamedTuple):
    """One number to log. `step` is the concurrency for a metric of `by_concurrency/`, how many layers were taken out
    for `pruning/kl_by_layers`, else 0."""

    name: str
    value: float
    step: int = 0


def run_key(record: RunRecord, run_dir: Path) -> str:
    """What makes one logged run: the same record logged again has the same key."""
    return digest_of([run_dir.resolve().name, record.recipe.digest, record.started_at])


def legal_name(name: str) -> str:
    """The nearest name that MLflow takes for a metric or a parameter: `acc,none` becomes `acc_none`."""
    name = re.sub(r"[^/\w.\- ]", "_", name)
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return posixpath.join(*parts)[:MAX_KEY] if parts else "_"


def legal_measures(measures: Iterable[Measure]) -> list[Measure]:
    """The measures under legal names. Two names that become one are told apart by a number."""
    owners: dict[str, str] = {}
    legal = []
    for measure in measures:
        name = wanted = legal_name(measure.name)
        number = 2
        while owners.setdefault(name, measure.name) != measure.name:
            name = f"{wanted[: MAX_KEY - 4]}_{number}"
            number += 1
        legal.append(measure._replace(name=name))
    return legal


def split_finite(measures: Iterable[Measure]) -> tuple[list[Measure], dict[str, str]]:
    """The finite measures, and tags that say which were not: MLflow reads NaN back as 0 and inf as a large number."""
    finite, tags = [], {}
    for measure in legal_measures(measures):
        if math.isfinite(measure.value):
            finite.append(measure)
        else:
            at = f" at {measure.step}" if measure.step else ""
            tags[f"nonfinite.{measure.name}{at}"[:MAX_KEY]] = str(measure.value)
    return finite, tags


def params(values: dict[str, Any]) -> dict[str, str]:
    """Values as strings within MLflow's limits; None is left out, lists are joined, URIs lose their passwords."""
    shown = {
        name: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for name, v in values.items() if v is not None
    }
    return {legal_name(name): redact(text)[:MAX_PARAM] for name, text in shown.items()}


def decide_at(record: RunRecord) -> int | None:
    """The concurrency at which the winner was chosen."""
    return (record.recipe.resolved.get("benchmark") or {}).get("decide_at")


def point_at(result: CandidateResult, concurrency: int | None) -> CostPoint | None:
    """What a candidate costs at one concurrency, where that was measured."""
    points = result.cost.points if result.cost else []
    return next((point for point in points if point.concurrency == concurrency), None)


def result_of(record: RunRecord, candidate: str | None) -> CandidateResult | None:
    return next((result for result in record.candidates if result.id == candidate), None)


def base_uri(record: RunRecord, name: str = "base") -> str | None:
    """URI of one of the recipe's bases."""
    resolved = record.recipe.resolved
    base = resolved.get("base") if name == "base" else (resolved.get("bases") or {}).get(name)
    return base.get("uri") if isinstance(base, dict) else base


# --- a candidate's run ------------------------------------------------------------------------------------------------


def candidate_params(record: RunRecord, result: CandidateResult) -> dict[str, str]:
    steps = (record.recipe.resolved.get("variants") or {}).get(result.variant, [])
    candidate, checkpoint = result.candidate, result.checkpoint
    return params(
        {
            "variant": result.variant,
            "runtime": result.runtime,
            "base": base_uri(record, record.start_of(result.variant)),
            "steps": "; ".join(describe_step(step) for step in steps) or "none",
            "dtype": candidate and candidate.dtype,
            "candidate.digest": candidate and candidate.digest,
            "candidate.bytes": candidate and candidate.bytes,
            "checkpoint.digest": checkpoint and checkpoint.digest,
            "checkpoint.bytes": checkpoint and checkpoint.bytes,
            "checkpoint.format": checkpoint and checkpoint.format,
            "checkpoint.origin": checkpoint and checkpoint.origin,
        }
    )


def describe_step(step: dict[str, Any]) -> str:
    """One step of a resolved recipe in one line: `quantize scheme=w4a16 method=gptq …`."""
    if len(step) == 1 and isinstance(body := next(iter(step.values())), dict):
        kind, settings = next(iter(step)), body
    else:
        kind, settings = step.get("kind", "step"), {name: value for name, value in step.items() if name != "kind"}
    said = (f"{name}={_plain(value)}" for name, value in settings.items() if value not in (None, [], {}))
    return " ".join([kind, *said])


def candidate_measures(record: RunRecord, result: CandidateResult) -> list[Measure]:
    """Quality under its own names, cost at the deciding load under plain names and at every load by concurrency."""
    measures = quality_measures(result)
    if point := point_at(result, decide_at(record)):
        measures += cost_measures(point)
    for point in result.cost.points if result.cost else []:
        measures += [
            Measure(f"by_concurrency/{name}", value, point.concurrency) for name, value, _ in cost_measures(point)
        ]
    if result.cost and result.cost.peak_memory_bytes is not None:
        measures.append(Measure("peak_memory_bytes", result.cost.peak_memory_bytes))
    if candidate := result.candidate:
        measures.append(Measure("candidate_bytes", candidate.bytes))
        if candidate.parity:
            measures.append(Measure("parity/kl_mean", candidate.parity.kl_mean))
            measures.append(Measure("parity/top1_agreement", candidate.parity.top1_agreement))
    if result.checkpoint and result.checkpoint.pruning:
        measures += pruning_measures(result.checkpoint.pruning)
    return measures


def pruning_measures(pruning: Pruning) -> list[Measure]:
    """What all `prune` steps took out, the divergence that the last one left, and the curve of held-out KL from the
    checkpoint before each against layers taken out."""
    steps = pruning.all
    removed, kept = [len(step.removed) for step in steps], pruning.parameters[1] / steps[0].parameters[0]
    measures = [Measure("pruning/layers_removed", sum(removed)), Measure("pruning/parameters_kept", kept)]
    kls = {"kl_before_fit": pruning.kl_cut, "kl_by_influence": pruning.kl_influence, "kl_after_fit": pruning.kl}
    measures += [Measure(f"pruning/{name}", value) for name, value in kls.items() if value is not None]
    for index, step in enumerate(steps):
        before = sum(removed[:index])
        measures += [Measure("pruning/kl_by_layers", kl, before + number) for number, kl in step.curve]
    return measures


def quality_measures(result: CandidateResult) -> list[Measure]:
    """Every metric's value, with its standard error and its difference from the base where there are any."""
    measures = []
    for name, metric in (result.quality.metrics if result.quality else {}).items():
        measures.append(Measure(name, metric.value))
        extra = {"stderr": metric.stderr, "delta": metric.delta, "delta_stderr": metric.delta_stderr}
        measures += [Measure(f"{name}.{key}", value) for key, value in extra.items() if value is not None]
    return measures


def cost_measures(point: CostPoint) -> list[Measure]:
    values = {
        "usd_per_1m_tokens": point.usd_per_1m_tokens,
        "usd_per_1m_output_tokens": point.usd_per_1m_output_tokens,
        "output_tokens_per_second": point.output_tokens_per_second,
        "total_tokens_per_second": point.total_tokens_per_second,
        "prefill_tokens_per_second": point.prefill_tokens_per_second,
        "decode_tokens_per_second": point.decode_tokens_per_second,
        "ttft_ms_p50": point.ttft_ms.p50,
        "ttft_ms_p95": point.ttft_ms.p95,
        "tpot_ms_p50": point.tpot_ms.p50,
        "tpot_ms_p95": point.tpot_ms.p95,
    }
    if point.saving:
        values |= {"saving": point.saving.value, "saving_low": point.saving.low, "saving_high": point.saving.high}
    if point.roofline:
        names = ("best_output_tokens_per_second", "realized", "mbu", "mfu", "largest_saving", "saving_realized")
        values |= {name: value for name in names if (value := getattr(point.roofline, name)) is not None}
    if point.joules_per_output_token is not None:
        values["joules_per_output_token"] = point.joules_per_output_token
    return [Measure(name, value) for name, value in values.items()]


def candidate_tags(record: RunRecord, result: CandidateResult) -> dict[str, str]:
    reasons = result.verdict.reasons
    return {
        "mlflow.note.content": "\n".join([f"**{result.verdict.status}**", "", *(f"- {reason}" for reason in reasons)]),
        "pennyweight.kind": "candidate",
        "pennyweight.candidate": result.id,
        "pennyweight.verdict": result.verdict.status,
        "pennyweight.reasons": "\n".join(reasons),
        "pennyweight.winner": str(result.id == record.winner).lower(),
    }


# --- the recipe's run -------------------------------------------------------------------------------------------------


def recipe_params(record: RunRecord) -> dict[str, str]:
    resolved, price = record.recipe.resolved, record.price
    suite, benchmark = (resolved.get(key) or {} for key in ("evaluate", "benchmark"))
    workload = benchmark.get("workload") or {}
    return params(
        {
            "recipe": record.name,
            "recipe.digest": record.recipe.digest,
            "base": base_uri(record),
            "bases": [f"{name}: {base_uri(record, name)}" for name in resolved.get("bases") or {}] or None,
            "device": resolved.get("device"),
            "seed": resolved.get("seed"),
            "variants": list(resolved.get("variants") or {}),
            "gate": "; ".join(describe_condition(condition) for condition in resolved.get("gate") or []),
            "suite": suite.get("name") if isinstance(suite, dict) else suite,
            "workload": workload and f"{workload.get('input_tokens')} tokens in, {workload.get('output_tokens')} out",
            "decide_at": benchmark.get("decide_at"),
            "price": price and price.words(),
            "winner": record.winner or "none",
            "cheapest_base": record.base,
            "machine": record.environment.get("cpu"),
            "threads": record.environment.get("threads"),
        }
    )


def describe_condition(condition: dict[str, Any]) -> str:
    """One condition of a gate in one line: `piqa/acc non_inferior_within 0.05`."""
    if "saving_at_least" in condition:
        load = condition.get("concurrency")
        return f"saving_at_least {condition['saving_at_least']:g}" + (f" at {load}" if load else "")
    name = f"{condition['task']}/{condition['metric']}" if condition.get("task") else condition.get("metric", "")
    bounds = ("max", "min", "non_inferior_within")
    return " ".join([name, *(f"{bound} {condition[bound]:g}" for bound in bounds if condition.get(bound) is not None)])


def recipe_measures(record: RunRecord) -> list[Measure]:
    """The winner's cost at the deciding load and its quality, the base's cost, and the counts of verdicts."""
    measures = []
    winner, base = result_of(record, record.winner), result_of(record, record.base)
    if winner and (point := point_at(winner, decide_at(record))):
        costs = cost_measures(point)
        measures += sorted(costs, key=lambda measure: not measure.name.startswith("saving"))  # savings come first
    if base and (point := point_at(base, decide_at(record))):
        measures.append(Measure("base_usd_per_1m_tokens", point.usd_per_1m_tokens))
    if winner:
        measures += quality_measures(winner)
    if winner and winner.candidate:
        measures.append(Measure("candidate_bytes", winner.candidate.bytes))
    verdicts = [result.verdict.status for result in record.candidates if result.variant != "base"]
    measures.append(Measure("candidates", len(verdicts)))
    measures.append(Measure("candidates_passed", verdicts.count("pass")))
    measures.append(Measure("seconds", record.seconds))
    return measures


def recipe_tags(record: RunRecord) -> dict[str, str]:
    return {
        "mlflow.note.content": recipe_note(record),
        "mlflow.source.name": f"pennyweight run {Path(record.recipe.path).name}",
        "mlflow.source.type": "LOCAL",
        "pennyweight.kind": "recipe",
        "pennyweight.status": record.status,
        "pennyweight.winner": record.winner or "none",
        "pennyweight.recipe_digest": record.recipe.digest,
    }


def recipe_note(record: RunRecord) -> str:
    """The outcome in Markdown, as the first thing that a reader of the run sees."""
    load = decide_at(record)
    rows = ["| candidate | verdict | KL | $ per 1M tokens | saving | output tokens/s |", "|---|---|---|---|---|---|"]
    for result in record.candidates:
        kl = result.quality.metrics.get("kl_mean") if result.quality else None
        point = point_at(result, load)
        cells = [
            f"**{result.id}**" if result.id == record.winner else result.id,
            result.verdict.status,
            f"{kl.value:.4f}" if kl else "",
            f"{point.usd_per_1m_tokens:.4f}" if point else "",
            describe_saving(point),
            f"{point.output_tokens_per_second:.1f}" if point else "",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    notes = [f"- {note}" for note in record.notes]
    at = f"Cost at concurrency {load}. " if load else ""
    return "\n".join(
        [
            f"**{outcome(record)}**",
            "",
            *rows,
            "",
            f"{at}The whole story is in `report.html`, under Artifacts.",
            "",
            *notes,
        ]
    )


def outcome(record: RunRecord) -> str:
    """The run's result in one sentence, plain: the UI's tables do not render Markdown."""
    winner = result_of(record, record.winner)
    if winner is None:
        return f"No winner: {record.status.replace('-', ' ')}."
    saving = describe_saving(point_at(winner, decide_at(record)))
    return f"{winner.id} wins" + (f": it saves {saving} against {record.base}." if saving else ".")


def describe_saving(point: CostPoint | None) -> str:
    """`35% (30 to 40%)`: the saving and its 95% interval; nothing where none was measured."""
    if point is None or point.saving is None:
        return ""
    return f"{point.saving.value:.0%} ({100 * point.saving.low:.0f} to {point.saving.high:.0%})"


def describe_verdict(verdict: Verdict) -> str:
    """`pass: 5 of 5 conditions`; the verdict alone where the conditions are not known."""
    decided = [item.status for item in verdict.conditions if item.status != "info"]
    return f"{verdict.status}: {decided.count('pass')} of {len(decided)} conditions" if decided else verdict.status


def describe_quality(result: CandidateResult) -> str:
    """What the gate judged quality by, values or differences from the base: `kl_mean 0.0089; piqa/acc_norm −0.003`.
    Where it says nothing, the divergence."""
    seen = {item.name: item.value for item in result.verdict.conditions if item.value is not None}
    metrics = result.quality.metrics if result.quality else {}
    shown = {name: value for name, value in seen.items() if not name.startswith("saving")}
    if not shown and "kl_mean" in metrics:
        shown = {"kl_mean": metrics["kl_mean"].value}
    return "; ".join(f"{name} {number(value)}" for name, value in shown.items())


def describe_cost(point: CostPoint | None) -> str:
    """`$0.084 per 1M tokens at 1, saves 49% (45 to 53%)`."""
    if point is None:
        return ""
    saving = describe_saving(point)
    what = f"${point.usd_per_1m_tokens:.3g} per 1M tokens at {point.concurrency}"
    return f"{what}, saves {saving}" if saving else what


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
