"""Two candidates side by side, question by question: which answers flipped, and whether that is more than chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from pennyweight.benchmark.cost import saving_of
from pennyweight.columns import columns
from pennyweight.errors import UsageError, did_you_mean
from pennyweight.evaluate import estimates
from pennyweight.evaluate.evidence import REFERENCE_SAMPLES, SAMPLES_FOLDER, Row, read_rows
from pennyweight.gate.words import number
from pennyweight.records import CandidateResult, CostPoint, Interval, Record, RunRecord
from pennyweight.show import load_run
from pennyweight.statistics import PairedTable
from pennyweight.statistics.clustered import NORMAL_95
from pennyweight.suite import metrics_of_condition

#: Metrics that compare the choices' log-likelihoods by their length in characters.
_NORMALIZED = ("acc_norm",)


class Flip(Record):
    """One question that one of two candidates answered rightly and the other did not."""

    task: str
    metric: str
    item: int
    prompt: str
    target: str
    ours: str = Field(description="the candidate's answer")
    theirs: str = Field(description="the answer of what it is compared with")
    our_margin: float | None = Field(description="log-likelihood of the right answer over the best wrong one, nats")
    their_margin: float | None = None
    gained: bool = Field(description="whether the candidate is the one that is right")


class MetricComparison(Record):
    """One metric of both: `difference` is ours − theirs, paired question by question."""

    name: str
    ours: float
    theirs: float
    difference: Interval
    n: int
    gained: int | None = None
    lost: int | None = None
    mcnemar_p: float | None = None
    higher_is_better: bool

    @property
    def surely_worse(self) -> bool:
        return self.difference.high < 0 if self.higher_is_better else self.difference.low > 0


class Comparison(Record):
    """`ours` against `theirs`, on the questions that both answered."""

    ours: str
    theirs: str
    metrics: list[MetricComparison]
    flips: list[Flip]
    facts: list[tuple[str, str, str]] = Field(description="(what, ours, theirs): sizes, speed, cost, divergence")


def locate(where: str) -> tuple[RunRecord, CandidateResult]:
    """`RUN[:CANDIDATE]` → the run and one of its candidates, the winner by default. Raises UsageError."""
    path, separator, candidate = where.partition(":")
    record = load_run(Path(path))
    name = candidate if separator else record.winner
    if name is None:
        raise UsageError(f"{path} has no winner", f"name a candidate: {path}:{record.candidates[0].id}")
    return record, find(record, name)


def find(record: RunRecord, candidate: str) -> CandidateResult:
    """A candidate of a run by its id. Raises UsageError."""
    for result in record.candidates:
        if result.id == candidate:
            return result
    known = [result.id for result in record.candidates]
    raise UsageError(f"the run has no candidate {candidate!r}", did_you_mean(candidate, known))


def rows_of(record: RunRecord, result: CandidateResult) -> list[Row]:
    """A candidate's answers, from its run's folder. Raises UsageError where they are gone."""
    if result.quality is None:
        raise UsageError(f"{result.id} was not evaluated: {'; '.join(result.verdict.reasons)}")
    for path in (Path(result.quality.samples_path), Path(record.run_dir) / SAMPLES_FOLDER / f"{result.id}.jsonl"):
        if path.is_file():
            return read_rows(path)
    raise UsageError(
        f"the answers of {result.id} are gone: there is no {result.quality.samples_path}",
        "run the recipe again; what is in the store is not computed twice",
    )


def reference_rows(record: RunRecord) -> list[Row]:
    """The base's answers, as quality was compared with them: to every question that any candidate was asked.

    Raises UsageError where they are gone.
    """
    path = Path(record.run_dir) / SAMPLES_FOLDER / REFERENCE_SAMPLES
    if path.is_file():
        return read_rows(path)
    raise UsageError(f"the base's answers are gone: there is no {path}", "run the recipe again")


def compare(ours: tuple[RunRecord, CandidateResult], theirs: tuple[RunRecord, CandidateResult]) -> Comparison:
    """Compare two candidates of any runs. Raises UsageError where they have no question in common."""
    left, right = rows_of(*ours), rows_of(*theirs)
    known = {(row["task"], row["doc_hash"]) for row in right}
    shared = {(row["task"], row["doc_hash"]) for row in left} & known
    if not shared:
        raise UsageError(
            f"{ours[1].id} and {theirs[1].id} have no question in common", "compare runs of one suite and seed"
        )
    left, right = ([row for row in rows if (row["task"], row["doc_hash"]) in shared] for rows in (left, right))
    assert ours[1].quality is not None
    metrics, flipped = [], []
    for name, measured in ours[1].quality.metrics.items():
        task, _, metric = name.rpartition("/")
        mine, other = ([row for row in rows if row["task"] == task] for rows in (left, right))
        paired = estimates.difference(name, mine, other) if mine and metric in mine[0] else None
        if paired is None:
            continue
        table = paired if isinstance(paired, PairedTable) else None
        metrics.append(
            MetricComparison(
                name=name,
                ours=_mean(mine, metric),
                theirs=_mean(other, metric),
                difference=Interval(value=paired.value, low=paired.bound(NORMAL_95), high=paired.bound(-NORMAL_95)),
                n=paired.n,
                gained=table.gained if table else None,
                lost=table.lost if table else None,
                mcnemar_p=table.mcnemar() if table else None,
                higher_is_better=measured.higher_is_better,
            )
        )
        flipped += flips(mine, other, metric)
    return Comparison(
        ours=_title(*ours), theirs=_title(*theirs), metrics=metrics, flips=flipped, facts=_facts(ours, theirs)
    )


def flips_of_run(record: RunRecord) -> dict[str, list[Flip]]:
    """`flips_of_candidate` of every variant's candidate; nothing where the samples are not at hand."""
    found: dict[str, list[Flip]] = {}
    try:
        theirs = reference_rows(record)
        for result in record.candidates:
            if result.variant == "base" or result.quality is None:
                continue
            found[result.id] = flips_of_candidate(record, result, theirs)
    except UsageError:
        return {}
    return found


def flips_of_candidate(record: RunRecord, result: CandidateResult, theirs: list[Row]) -> list[Flip]:
    """What a candidate answered otherwise than the base, whose answers are `theirs`.

    Only metrics that the gate is on, where it is on any. Raises UsageError where its answers are gone.
    """
    ours = rows_of(record, result)
    return [flip for metric in _gated(record, result) for flip in _flips_of(metric, ours, theirs)]


def _gated(record: RunRecord, result: CandidateResult) -> list[str]:
    assert result.quality is not None
    conditions = record.recipe.resolved.get("gate", [])
    on_gate = {name for condition in conditions for name in metrics_of_condition(condition)}
    answered = [name for name, metric in result.quality.metrics.items() if metric.gained is not None]
    return [name for name in answered if name in on_gate] or answered


def _flips_of(name: str, ours: list[Row], theirs: list[Row]) -> list[Flip]:
    task, _, metric = name.rpartition("/")
    return flips(*([row for row in rows if row["task"] == task] for rows in (ours, theirs)), metric)


def flips(ours: list[Row], theirs: list[Row], metric: str) -> list[Flip]:
    """Questions that exactly one side got right, those that the candidate lost first, the largest change first."""
    others = {(row["task"], row["doc_hash"]): row for row in theirs}
    found = []
    for row in ours:
        other = others.get((row["task"], row["doc_hash"]))
        if other is None or {row.get(metric), other.get(metric)} != {0.0, 1.0}:
            continue
        found.append(
            Flip(
                task=row["task"],
                metric=metric,
                item=row["doc_id"],
                prompt=row.get("prompt", ""),
                target=_target(row),
                ours=answer_of(row, metric),
                theirs=answer_of(other, metric),
                our_margin=margin_of(row, metric),
                their_margin=margin_of(other, metric),
                gained=row[metric] > other[metric],
            )
        )
    return sorted(found, key=lambda flip: (flip.gained, -abs((flip.our_margin or 0) - (flip.their_margin or 0))))


def answer_of(row: Row, metric: str) -> str:
    """What the model chose, or wrote."""
    if "choices" not in row:
        return str(row.get("answer", ""))
    scores = _choice_scores(row, metric)
    return row["choices"][max(range(len(scores)), key=scores.__getitem__)]


def margin_of(row: Row, metric: str) -> float | None:
    """How much the right choice was preferred to the best wrong one, in nats; for `acc_norm`, nats per character."""
    if "choices" not in row or not isinstance(row["target"], int):
        return None
    scores = _choice_scores(row, metric)
    return scores[row["target"]] - max(score for index, score in enumerate(scores) if index != row["target"])


def _choice_scores(row: Row, metric: str) -> list[float]:
    scores = row["loglikelihoods"]
    if metric not in _NORMALIZED:
        return scores
    return [score / max(len(choice), 1) for score, choice in zip(scores, row["choices"])]


def _target(row: Row) -> str:
    target = row.get("target", "")
    return row["choices"][target] if isinstance(target, int) and "choices" in row else str(target)


def _mean(rows: list[Row], metric: str) -> float:
    return sum(row[metric] for row in rows) / len(rows)


def _title(record: RunRecord, result: CandidateResult) -> str:
    return f"{Path(record.run_dir).name}:{result.id}"


def _facts(
    ours: tuple[RunRecord, CandidateResult], theirs: tuple[RunRecord, CandidateResult]
) -> list[tuple[str, str, str]]:
    sides = [_facts_of(*side) for side in (ours, theirs)]
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    rows = [(name, sides[0].get(name, "–"), sides[1].get(name, "–")) for name in names]
    return rows + savings(ours, theirs)


def savings(
    ours: tuple[RunRecord, CandidateResult], theirs: tuple[RunRecord, CandidateResult]
) -> list[tuple[str, str, str]]:
    """What ours saves against theirs at each load, where one run measured both in turn."""
    if ours[0].run_dir != theirs[0].run_dir or ours[1].id == theirs[1].id:
        return []
    found = []
    for point, other in zip(_points(ours[1]), _points(theirs[1])):
        (base, logs), (other_base, minus) = _log_ratios(ours[1], point), _log_ratios(theirs[1], other)
        if base != other_base or not logs or len(logs) != len(minus):
            continue
        saving = saving_of([one - two for one, two in zip(logs, minus)])
        words = f"{saving.value:.1%} ({saving.low:.1%} to {saving.high:.1%})"
        found.append((f"saving against theirs at {point.concurrency}, 95% interval", words, "–"))
    return found


def _log_ratios(result: CandidateResult, point: CostPoint) -> tuple[str, list[float]]:
    """(the base candidate that costs are compared with, how ours compare round by round); the base's own are 0."""
    if point.saving_against is None:
        return result.id, [0.0] * point.rounds
    return point.saving_against, point.log_ratios


def _facts_of(record: RunRecord, result: CandidateResult) -> dict[str, str]:
    found = {"verdict": result.verdict.status}
    if result.candidate:
        found["size"] = f"{result.candidate.bytes / 1e6:,.0f} MB"
    metrics: dict[str, Any] = result.quality.metrics if result.quality else {}
    for name in ("kl_mean", "perplexity_ratio", "top1_agreement"):
        if name in metrics:
            found[f"{name} against its base"] = number(metrics[name].value)
    for point in _points(result):
        at = f"at {point.concurrency}"
        found[f"output tokens/s {at}"] = number(point.output_tokens_per_second)
        found[f"$ per 1M tokens {at}"] = f"{point.usd_per_1m_tokens:.3f}"
    return found


def _points(result: CandidateResult) -> list[CostPoint]:
    return result.cost.points if result.cost else []


# --- as text ----------------------------------------------------------------------------------------------------------


def format_comparison(found: Comparison, limit: int = 10) -> str:
    """For a terminal."""
    lines = [f"{found.ours} against {found.theirs}", ""]
    rows = [["", "ours", "theirs"], *map(list, found.facts)]
    lines += [*columns(rows), "", *columns([_HEAD, *map(_metric_row, found.metrics)])]
    lines += ["", *format_flips(found.flips, limit)]
    return "\n".join(lines).rstrip()


_HEAD = ["metric", "ours", "theirs", "difference", "95% interval", "gained", "lost", "McNemar p", "n"]


def _metric_row(metric: MetricComparison) -> list[str]:
    difference = metric.difference
    counts = ["–" if value is None else f"{value}" for value in (metric.gained, metric.lost)]
    return [
        metric.name,
        f"{metric.ours:.3f}",
        f"{metric.theirs:.3f}",
        number(difference.value, signed=True),
        f"{number(difference.low, signed=True)} to {number(difference.high, signed=True)}",
        *counts,
        "–" if metric.mcnemar_p is None else f"{metric.mcnemar_p:.3f}",
        f"{metric.n:,}",
    ]


def format_flips(found: list[Flip], limit: int) -> list[str]:
    """Questions that flipped, both answers and margins."""
    if not found:
        return ["no answer flipped"]
    lines = []
    for flip in found[:limit]:
        lines += [
            f"{'gained' if flip.gained else 'lost'}  {flip.task}/{flip.metric}, item {flip.item}",
            f"    {_short(flip.prompt)}",
            f"    right:  {_short(flip.target)}",
            f"    ours:   {_short(flip.ours)}{_margin(flip.our_margin)}",
            f"    theirs: {_short(flip.theirs)}{_margin(flip.their_margin)}",
        ]
    if len(found) > limit:
        lines.append(f"… and {len(found) - limit} more (--limit)")
    return lines


def _short(text: str, width: int = 110) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else f"{flat[: width - 1]}…"


def _margin(value: float | None) -> str:
    return "" if value is None else f"  (margin {number(value, signed=True)})"


def format_markdown(found: Comparison) -> str:
    """For a pull request's comment."""
    lines = [f"### `{found.ours}` against `{found.theirs}`", "", "| | ours | theirs |", "|---|---:|---:|"]
    lines += [f"| {name} | {ours} | {theirs} |" for name, ours, theirs in found.facts]
    lines += ["", f"| {' | '.join(_HEAD)} |", f"|---|{'---:|' * (len(_HEAD) - 1)}"]
    lines += [f"| {' | '.join(_metric_row(metric))} |" for metric in found.metrics]
    worse = [metric.name for metric in found.metrics if metric.surely_worse]
    lines += ["", f"**Surely worse: {', '.join(worse)}.**" if worse else "Nothing is surely worse."]
    return "\n".join(lines)
