"""Runs, stores and machines as text for a terminal."""

from __future__ import annotations

import json
import re
import time
from datetime import date
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pennyweight.columns import columns
from pennyweight.errors import UsageError
from pennyweight.gate import point_at
from pennyweight.recipe.prices import STALE_AFTER_DAYS, Prices, is_stale
from pennyweight.records import RUN_SCHEMA_VERSION, CandidateResult, RunRecord
from pennyweight.suite import metrics_of_condition

if TYPE_CHECKING:
    from pennyweight.garbage import StoreCollection
    from pennyweight.tracking import ModelCollection

SENTENCES = {
    "inconclusive": "no winner: too few samples to decide; the reasons say where",
    "nothing-passed": "no winner: no variant passed the gate",
    "nothing-cheaper": "no winner: nothing that passed the gate is surely cheaper than the base",
    "failed": "no winner: a stage failed",
    "running": "this run did not finish; run the recipe again and it goes on where it stopped",
}


def load_run(folder: Path) -> RunRecord:
    """A run's record, from its folder or from its run.json. Raises UsageError."""
    path = folder / "run.json" if folder.is_dir() else folder
    try:
        raw = json.loads(path.read_text())
        if raw.get("schema_version") != RUN_SCHEMA_VERSION:
            raise UsageError(f"{path} has schema version {raw.get('schema_version')}, not {RUN_SCHEMA_VERSION}")
        return RunRecord.model_validate(raw)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}", "run a recipe first, or name a run's folder"
        ) from error
    except (json.JSONDecodeError, ValidationError) as error:
        raise UsageError(f"{path} is not a run's record: {str(error).splitlines()[0]}") from error


def format_run(record: RunRecord) -> str:
    """The outcome in a sentence, a table of candidates, and the reasons."""
    decide_at = record.recipe.resolved["benchmark"]["decide_at"]
    lines = [headline(record, decide_at), "", *_table(record, decide_at), ""]
    if rows := _roofline(record):
        lines += [*rows, ""]
    if record.levers:
        lines += [*_levers(record), ""]
    for result in record.candidates:
        if result.verdict.status != "base":
            lines.append(f"{result.id}: {result.verdict.status}")
            lines += [indent(reason, "    ") for reason in result.verdict.reasons]
    if record.registered:
        done = record.registered
        lines += ["", f"registered as {done.model} version {done.version}, alias {done.alias}"]
    return "\n".join(lines)


def headline(record: RunRecord, decide_at: int) -> str:
    if not record.winner:
        return SENTENCES[record.status]
    result = next(result for result in record.candidates if result.id == record.winner)
    assert result.cost is not None
    point = point_at(result.cost, decide_at)
    assert point.saving is not None
    return (
        f"winner: {record.winner} at ${point.usd_per_1m_tokens:.3f} per million tokens, "
        f"{point.saving.value:.0%} less than {point.saving_against} "
        f"(95% interval {point.saving.low:.0%} to {point.saving.high:.0%}) at concurrency {decide_at}"
    )


def _levers(record: RunRecord) -> list[str]:
    rows = [["lever", "saving", "95% interval", "", ""]]
    for lever in record.levers:
        saving = lever.saving
        value = f"{saving.value:.0%}" if saving else "-"
        interval = f"{saving.low:.0%} to {saving.high:.0%}" if saving else "-"
        rows.append([lever.lever, value, interval, "kept" if lever.kept else "left off", lever.reason])
    return columns(rows, left=1)


def format_markdown(record: RunRecord) -> str:
    """The outcome for a pull request: a sentence, the table of candidates, and the reasons folded away."""
    decide_at = record.recipe.resolved["benchmark"]["decide_at"]
    head, *rows = _rows(record, decide_at)
    lines = [f"### `{record.name}`", "", f"**{headline(record, decide_at)}**", ""]
    lines += [f"| {' | '.join(head)} |", f"|---|---|{'---:|' * (len(head) - 2)}"]
    for name, *cells in rows:
        shown = f"**`{name}`**" if name == record.winner else f"`{name}`"
        lines.append(f"| {' | '.join([shown, *cells])} |")
    judged = [result for result in record.candidates if result.verdict.status != "base"]
    if judged:
        lines += ["", "<details><summary>Reasons</summary>", ""]
        for result in judged:
            lines += [f"`{result.id}`: {result.verdict.status}", ""]
            lines += [*(f"- {_markdown(reason)}" for reason in result.verdict.reasons), ""]
        lines.append("</details>")
    if record.registered:
        done = record.registered
        lines += ["", f"Registered as `{done.model}` version {done.version}, alias `{done.alias}`."]
    return "\n".join(lines)


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    escaped = re.sub(r"([\\`*_\[\]<>|~#$])", r"\\\1", text)
    return " ".join(escaped.split())


def _table(record: RunRecord, decide_at: int) -> list[str]:
    return columns(_rows(record, decide_at), left=2)


def _rows(record: RunRecord, decide_at: int) -> list[list[str]]:
    """The table of candidates, its head first."""
    metrics = _metric_names(record)
    memory = any(result.cost and result.cost.peak_memory_bytes is not None for result in record.candidates)
    head = [
        "candidate",
        "verdict",
        "MB",
        *(["memory MB"] if memory else []),
        *metrics,
        "tok/s",
        "$/1M tokens",
        "saving",
    ]
    return [head, *[_row(result, metrics, decide_at, memory) for result in record.candidates]]


def _metric_names(record: RunRecord) -> list[str]:
    measured: dict[str, None] = {}
    for result in record.candidates:
        if result.quality:
            measured |= dict.fromkeys(result.quality.metrics)
    gated = [name for condition in record.recipe.resolved["gate"] for name in metrics_of_condition(condition)]
    return [name for name in dict.fromkeys(gated) if name in measured]


def _row(result: CandidateResult, metrics: list[str], decide_at: int, memory: bool) -> list[str]:
    size = f"{result.candidate.bytes / 1e6:.0f}" if result.candidate else "-"
    sizes = [size, _memory(result)] if memory else [size]
    values = []
    for name in metrics:
        value = result.quality.metrics.get(name) if result.quality else None
        values.append(
            "-" if value is None else f"{value.value:.3f}" if abs(value.value) < 100 else f"{value.value:.1f}"
        )
    speed = dollars = saving = "-"
    if result.cost:
        point = point_at(result.cost, decide_at)
        speed, dollars = f"{point.output_tokens_per_second:.1f}", f"{point.usd_per_1m_tokens:.3f}"
        saving = f"{point.saving.value:.0%}" if point.saving else "-"
    return [result.id, result.verdict.status, *sizes, *values, speed, dollars, saving]


def _memory(result: CandidateResult) -> str:
    found = result.cost.peak_memory_bytes if result.cost else None
    return "-" if found is None else f"{found / 1e6:.0f}"


def _roofline(record: RunRecord) -> list[str]:
    """What each candidate reached of what the machine allows, at every load; nothing where that was not measured."""
    points = [(r.id, p) for r in record.candidates if r.cost for p in r.cost.points if p.roofline]
    if not points:
        return []
    energy = any(point.joules_per_output_token is not None for _, point in points)
    head = ["roofline", "bound", "at", "tok/s", "best", "realized", "MBU", "MFU", "largest saving", "saving"]
    rows = [[*head, *(["J/token"] if energy else [])]]
    for name, point in points:
        found = point.roofline
        assert found is not None
        row = [name, found.bound, str(point.concurrency), f"{point.output_tokens_per_second:.1f}"]
        row += [
            f"{found.best_output_tokens_per_second:.1f}",
            f"{found.realized:.0%}",
            f"{found.mbu:.0%}",
            f"{found.mfu:.0%}",
        ]
        row.append("-" if found.largest_saving is None else f"{found.largest_saving:.0%}")
        row.append(f"{point.saving.value:.0%}" if point.saving else "-")
        if energy:
            row.append("-" if point.joules_per_output_token is None else f"{point.joules_per_output_token:.3g}")
        rows.append(row)
    return columns(rows, left=2)


def format_store(entries: list[tuple[str, str, Path, float, int]]) -> str:
    if not entries:
        return "the store is empty"
    lines = [f"{stage:<12} {key[:16]}  {size / 1e6:>10,.1f} MB" for stage, key, _, _, size in entries]
    return "\n".join([*lines, f"{len(entries)} results, {sum(entry[4] for entry in entries) / 1e6:,.1f} MB"])


def format_store_collection(found: StoreCollection) -> str:
    """What went, or would go, and what stays."""
    rows = [["stage", "result", "last used", "MB"]]
    for item in found.results:
        age = (time.time() - item.used) / 86400
        rows.append([item.stage, item.key[:16], f"{age:.0f} days ago", f"{item.bytes / 1e6:,.1f}"])
    stays = f"{found.kept} results stay, {found.kept_bytes / 1e6:,.1f} MB"
    return "\n".join([*(columns(rows, left=2) if found.results else []), f"{_removed(found)}; {stays}"])


def format_models_collection(found: ModelCollection) -> str:
    """What went, or would go, and why the rest stays."""
    rows = [["model", "version", "candidate", "made", "MB"]]
    for item in found.garbage:
        cells = [item.model or "(files without a version)", item.version or "-", item.candidate or "-"]
        rows.append([*cells, item.created[:10], f"{item.bytes / 1e6:,.1f}"])
    lines = columns(rows, left=3) if found.garbage else []
    lines += [f"{kept.model} version {kept.version} stays: {kept.reason}" for kept in found.kept]
    return "\n".join([*lines, _removed(found)])


def _removed(found: StoreCollection | ModelCollection) -> str:
    words = ("would remove", "would free") if found.dry_run else ("removed", "freed")
    return f"{words[0]} {found.removed}, {words[1]} {found.freed_bytes / 1e6:,.1f} MB"


def price_rows(prices: Prices, today: date) -> dict[str, list[dict[str, Any]]]:
    """The price sheet as it stands `today`: machines by the hour, APIs by the million tokens."""
    from pennyweight.benchmark.prices import price_of

    machines = [
        {**price_of(spec).model_dump(mode="json"), "stale": is_stale(spec.date, today)}
        for spec in prices.machines.values()
    ]
    apis = [
        {"name": name, **api.model_dump(mode="json"), "stale": is_stale(api.date, today)}
        for name, api in prices.apis.items()
    ]
    return {"machines": machines, "apis": apis}


def format_prices(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Two tables, and the sources that their last column counts."""
    sources = list(dict.fromkeys(row["source"] for row in [*rows["machines"], *rows["apis"]]))

    def origin(row: dict[str, Any]) -> list[str]:
        mark = "" if not row["stale"] else "stale" if row["date"] else "undated"
        return [row["date"], mark, f"[{sources.index(row['source']) + 1}]"]

    machines = [["machine", "bought", "$ an hour", "a busy hour", "date", "", "source"]] + [
        [row["name"], row["purchase"], f"{row['usd_per_hour']:.6g}", f"{row['usd_per_busy_hour']:.6g}", *origin(row)]
        for row in rows["machines"]
    ]
    apis = [["API", "", "$ for 1M in", "1M out", "date", "", "source"]] + [
        [row["name"], row["note"], f"{row['input']:g}", f"{row['output']:g}", *origin(row)] for row in rows["apis"]
    ]
    lines = [*columns(machines, left=2), "", *columns(apis, left=2), ""]
    lines += [f"[{number}] {source}" for number, source in enumerate(sources, 1)]
    return "\n".join([*lines, f"stale: older than {STALE_AFTER_DAYS} days"])


def format_doctor(found: dict[str, Any]) -> str:
    """Nested facts as indented lines."""
    return "\n".join(_indented(found, 0))


def _indented(value: Any, depth: int) -> list[str]:
    pad = "  " * depth
    lines = []
    for key, item in value.items():
        label = str(key).replace("_", " ")
        if isinstance(item, dict):
            lines += [f"{pad}{label}:", *_indented(item, depth + 1)]
        elif isinstance(item, list):
            lines.append(f"{pad}{label}: {', '.join(map(_plain, item)) or 'none'}")
        else:
            lines.append(f"{pad}{label}: {_plain(item)}")
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.1f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return "unknown" if value is None else str(value)
