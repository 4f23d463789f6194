"""What a candidate and the base say to the suite, a look at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight import evaluate as quality
from pennyweight import runtimes, shipped
from pennyweight.evaluate import looks
from pennyweight.evaluate.evidence import Evidence
from pennyweight.records import Candidate, Checkpoint
from pennyweight.stages.making import REFERENCE_RUNTIME
from pennyweight.stages.run import Run
from pennyweight.stages.texts import Texts, cut_windows, load_tokenizer, task_data, text_name
from pennyweight.store import file_digest
from pennyweight.suite import GENERATION, TaskRef


@dataclass(frozen=True)
class Reference:
    """What the base said to one look's part of the suite."""

    folder: Path
    key: str
    totals: dict[str, int]
    """Task → how many items it has."""

    def evidence(self) -> Evidence:
        return Evidence.read(self.folder)


@dataclass(frozen=True)
class Part:
    """What one look takes of the suite: the data, and what identifies them."""

    look: int
    inputs: quality.Inputs
    key: dict[str, Any]


def part_of_suite(
    run: Run,
    base: Checkpoint,
    data: dict[str, Path],
    texts: Texts,
    look: int,
    sources: set[str],
    totals: dict[str, int],
) -> Part:
    """What look number `look` (from 0) adds of `sources`. `totals` are needed from the second look on."""
    suite, first = run.recipe.evaluate, run.recipe.evaluate.first_sizes()
    windows, documents, digests, prompts = {}, {}, {}, None
    shapes = {name: (item.text, item.length, suite.seed) for name, item in suite.texts().items()}
    if suite.generation:
        shapes[GENERATION] = (suite.generation.text, suite.generation.input_tokens, suite.seed + 3)
    for name, (text, length, seed) in shapes.items():
        if name not in sources:
            continue
        added = looks.part(first[name], look)
        purpose, seen = text_name(name), texts
        if look:
            entry = cut_windows(run, base, data[text], min(added.stop, totals[name]), length, seed)
            seen = Texts({purpose: entry.files}, {purpose: entry.record["digest"]})
        found = seen.load(purpose)
        assert found is not None
        digests[name] = [seen.digests[purpose], look]
        if name == GENERATION:
            prompts = found[added]
        else:
            windows[name], documents[name] = found[added], seen.documents(purpose)[added]
    refs = [ref for ref in suite.tasks if ref.task in sources]
    ours = {ref.task: data[task_data(ref)] for ref in refs if ref.origin == "pennyweight"}
    inputs = quality.Inputs(
        windows,
        documents,
        ours,
        {ref.task: looks.part(first[ref.task], look) for ref in refs},
        prompts,
        looks.part(first[GENERATION], look).start or 0 if prompts is not None else 0,
    )
    return Part(look, inputs, _suite_key(run, digests, refs, ours, look))


def make_reference(run: Run, candidate: Candidate, part: Part) -> Reference:
    """What the base itself says to a part of the suite, in transformers. Computed once for all candidates."""
    inputs = {"candidate": candidate.digest, "dtype": candidate.dtype, **part.key}

    def build(files: Path) -> dict[str, Any]:
        session = load(run, candidate)
        with stage.library():
            tokenizer, suite = load_tokenizer(candidate.checkpoint), run.recipe.evaluate
            found = quality.write_reference(session, tokenizer, suite, part.inputs, files, run.device)
        session.close()
        return {"totals": found}

    with run.stage("reference", _subject(candidate, part)) as stage:
        entry = run.store.get_or_build("reference", inputs, build)
        stage.reused = entry.reused
    return Reference(entry.files, entry.key, entry.record["totals"])


def evaluate(run: Run, candidate: Candidate, base: Candidate, part: Part, reference: Reference) -> Evidence:
    """What the candidate says to a part of the suite, beside what the base said.

    `base` is the base's candidate in transformers.
    """
    is_reference = candidate.digest == base.digest and candidate.runtime == base.runtime
    inputs = {
        "candidate": candidate.digest,
        "dtype": candidate.dtype,
        "reference": reference.key,
        **part.key,
        **runtimes.key(candidate.runtime, run.device),
    }
    expected = run.plan.expected_seconds("evaluate", candidate.id) or 0.0

    def build(files: Path) -> dict[str, Any]:
        with stage.library():
            session = None if is_reference else load(run, candidate)
            seconds = quality.evaluate(
                session,
                load_tokenizer(candidate.checkpoint),
                run.recipe.evaluate,
                part.inputs,
                reference.folder,
                files,
                lambda: load(run, base),
                run.device,
                lambda done: run.progress.fraction("evaluate", candidate.id, done, expected),
            )
            if session is not None:
                session.close()
        return {"seconds": seconds}

    with run.stage("evaluate", _subject(candidate, part)) as stage:
        entry = run.store.get_or_build("evaluate", inputs, build)
        stage.reused = entry.reused
    return Evidence.read(entry.files, entry.record["seconds"])


def _subject(candidate: Candidate, part: Part) -> str:
    return f"{candidate.id}, look {part.look + 1}" if part.look else candidate.id


def _suite_key(
    run: Run, digests: dict[str, Any], refs: list[TaskRef], data: dict[str, Path], look: int
) -> dict[str, Any]:
    """What of the suite changes a candidate's numbers."""
    suite = run.recipe.evaluate
    return {
        "evaluate_version": quality.VERSION,
        "texts": digests,
        "generation": suite.generation.output_tokens if suite.generation and GENERATION in digests else None,
        "tasks": [
            [ref.task, ref.limit, look, shipped.tasks()[ref.task], file_digest(data[ref.task])]
            if ref.task in data
            else [ref.task, ref.limit, look, ref.origin]
            for ref in refs
        ],
        "batch_size": suite.batch_size,
        "seed": suite.seed,
        "libraries_of_suite": runtimes.versions(("lm-eval", "tokenizers", "datasets")),
        **{f"base_{name}": value for name, value in runtimes.key(REFERENCE_RUNTIME, run.device).items()},
    }


def load(run: Run, candidate: Candidate) -> Any:
    return runtimes.get(candidate.runtime).load(candidate, run.device)
