"""Candidate → evidence: what it says to the suite's text, questions and prompts, beside what the base says."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.evaluate import divergence, generation
from pennyweight.evaluate.divergence import HEAD_FILE, Reference
from pennyweight.evaluate.evidence import Evidence, ScoredText
from pennyweight.runtimes import Session
from pennyweight.suite import Suite

VERSION = 3


@dataclass(frozen=True)
class Inputs:
    """What of a suite one look takes."""

    windows: dict[str, np.ndarray] = field(default_factory=dict)
    """Text by name in the suite → token ids, int64 (windows, length)."""
    documents: dict[str, np.ndarray] = field(default_factory=dict)
    """The same → document of each token, int32 (windows, length)."""
    tasks: dict[str, Path] = field(default_factory=dict)
    """Task of ours → JSONL of all its questions."""
    items: dict[str, slice] = field(default_factory=dict)
    """Task → which of its items, in the order of drawing."""
    prompts: np.ndarray | None = None
    """Token ids to continue, int64 (prompts, length)."""
    first_prompt: int = 0


def write_reference(
    session: Any, tokenizer: Any, suite: Suite, inputs: Inputs, files: Path, device: str = "cpu"
) -> dict[str, int]:
    """Everything of the base that candidates are compared with: hidden states on the text, its likelihoods, its
    answers.

    `session` is a transformers session. Returns how many items each task has.
    """
    from pennyweight.evaluate import harness

    if "divergence" in inputs.windows:
        divergence.write_states(session, inputs.windows["divergence"], suite.batch_size, files / divergence.STATES_FILE)
        divergence.write_head(session, files / HEAD_FILE)
    texts = {}
    for name, windows in inputs.windows.items():
        if name != "divergence":
            nll = divergence.likelihoods(session, windows, suite.batch_size)
            texts[name] = ScoredText(nll, nll, inputs.documents[name])
    rows, totals = harness.run_tasks(session, tokenizer, suite, inputs.tasks, inputs.items, device)
    rows += _generated(session, session, tokenizer, suite, inputs)
    Evidence(texts, rows).write(files)
    return totals


def evaluate(
    session: Session | None,
    tokenizer: Any,
    suite: Suite,
    inputs: Inputs,
    reference: Path,
    files: Path,
    base: Callable[[], Any],
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> float:
    """Measure a candidate beside the reference, and write the evidence to `files`. Returns the seconds it took.

    `session` is None for the candidate that is the reference. `base` opens a session of the base, for what only the
    base can judge. Raises StageError where a score is not a finite number.
    """
    from pennyweight.evaluate import harness

    begin = time.perf_counter()
    theirs = Evidence.read(reference)
    texts: dict[str, ScoredText] = {}
    for name, windows in inputs.windows.items():
        documents = inputs.documents[name]
        if name == "divergence":
            known = Reference(reference / divergence.STATES_FILE, reference / HEAD_FILE)
            texts[name] = (
                divergence.same(windows, documents, known)
                if session is None
                else divergence.compare(session, windows, documents, suite.batch_size, known)
            )
        elif session is None:
            texts[name] = theirs.texts[name]
        else:
            nll = divergence.likelihoods(session, windows, suite.batch_size)
            texts[name] = ScoredText(nll, theirs.texts[name].nll, documents)
    if session is None:
        rows = theirs.rows
    else:
        rows, _ = harness.run_tasks(session, tokenizer, suite, inputs.tasks, inputs.items, device, progress)
        if inputs.prompts is not None and suite.generation:
            reader = base()
            rows += _generated(session, reader, tokenizer, suite, inputs)
            reader.close()
    Evidence(texts, rows).write(files)
    return time.perf_counter() - begin


def _generated(session: Session, base: Session, tokenizer: Any, suite: Suite, inputs: Inputs) -> list[dict[str, Any]]:
    if inputs.prompts is None or not suite.generation:
        return []
    tokens = suite.generation.output_tokens
    continuations = generation.continue_prompts(session, inputs.prompts, tokens, suite.batch_size)
    return generation.judge(base, tokenizer, inputs.prompts, continuations, suite.batch_size, inputs.first_prompt)
