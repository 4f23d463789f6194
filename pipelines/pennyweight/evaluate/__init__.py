"""Candidate → quality report, on the same samples as the base's."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.errors import StageError
from pennyweight.evaluate import divergence
from pennyweight.recipe import Suite
from pennyweight.records import Candidate, MetricValue, QualityReport
from pennyweight.runtimes import Session
from pennyweight.store import file_digest

VERSION = 1
SAMPLES = "samples.jsonl"
WINDOWS = "windows.npy"


def write_reference(session: Any, tokenizer: Any, suite: Suite, inputs: EvaluationInputs, files: Path) -> None:
    """Everything of the base that candidates are compared with: hidden states on the text, and its answers."""
    if inputs.windows is not None:
        np.save(files / WINDOWS, inputs.windows)
        divergence.write_reference(session, inputs.windows, suite.batch_size, files)
    _write_samples(_answers(session, tokenizer, suite, inputs), files / SAMPLES)


def evaluate(
    session: Session | None, tokenizer: Any, candidate: Candidate, suite: Suite, inputs: EvaluationInputs,
    reference: Path, files: Path,
) -> QualityReport:  # fmt: skip
    """Measure a candidate against the reference. `session` is None for the candidate that is the reference.

    Raises StageError where a score is not a finite number.
    """
    begin = time.perf_counter()
    metrics: dict[str, MetricValue] = {}
    if inputs.windows is not None:
        tokens = _same_tokens(reference, inputs.windows) if session is None else divergence.compare(
            session, inputs.windows, suite.batch_size, reference
        )  # fmt: skip
        metrics |= divergence.metrics(tokens)
    base_rows = read_samples(reference / SAMPLES)
    rows = base_rows if session is None else _answers(session, tokenizer, suite, inputs)
    metrics |= task_metrics(rows, base_rows, suite)
    _write_samples(rows, files / SAMPLES)
    return QualityReport(
        candidate=candidate.id,
        metrics=metrics,
        samples_path=SAMPLES,
        samples_digest=file_digest(files / SAMPLES),
        tokens_scored=0 if inputs.windows is None else inputs.windows.size,
        seconds=time.perf_counter() - begin,
    )


class EvaluationInputs:
    """The suite's data on disk: token windows for divergence, and each task's questions."""

    def __init__(self, windows: np.ndarray | None, tasks: dict[str, Path]):
        self.windows = windows
        self.tasks = tasks


def task_metrics(
    rows: list[dict[str, Any]], base_rows: list[dict[str, Any]], suite: Suite
) -> dict[str, MetricValue]:  # fmt: skip
    """Mean and standard error of each task metric, and its paired difference from the base's."""
    found: dict[str, MetricValue] = {}
    higher = suite.metrics()
    for ref in suite.tasks:
        ours, theirs = (by_task(table, ref.task) for table in (rows, base_rows))
        if [row["doc_hash"] for row in ours] != [row["doc_hash"] for row in theirs]:
            raise StageError(f"{ref.task}: the candidate and the base did not answer the same questions")
        for name in (name for name in higher if name.startswith(f"{ref.task}/")):
            metric = name.partition("/")[2]
            values = np.array([row[metric] for row in ours])
            base = np.array([row[metric] for row in theirs])
            found[name] = MetricValue(
                value=float(values.mean()),
                stderr=_stderr(values),
                n=len(values),
                base=float(base.mean()),
                delta=float((values - base).mean()),
                delta_stderr=_stderr(values - base),
                higher_is_better=higher[name],
            )
    return found


def by_task(rows: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["task"] == task]


def read_samples(path: Path) -> list[dict[str, Any]]:
    with path.open() as lines:
        return [json.loads(line) for line in lines]


def _answers(session: Session, tokenizer: Any, suite: Suite, inputs: EvaluationInputs) -> list[dict[str, Any]]:
    if not suite.tasks:
        return []
    from pennyweight.evaluate import harness

    return harness.run_tasks(session, tokenizer, suite, inputs.tasks)


def _write_samples(rows: list[dict[str, Any]], path: Path) -> None:
    for row in rows:
        if not all(math.isfinite(value) for value in row["loglikelihoods"]):
            raise StageError(f"{row['task']} item {row['doc_id']}: a log-likelihood is not a finite number")
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


def _same_tokens(reference: Path, windows: np.ndarray) -> divergence.TokenDivergence:
    """The reference against itself: no divergence, by definition."""
    nll = divergence.reference_nll(windows, reference)
    nothing = np.zeros(windows.shape, np.float32)
    return divergence.TokenDivergence(nothing, np.ones(windows.shape, bool), nll, nll)


def _stderr(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
