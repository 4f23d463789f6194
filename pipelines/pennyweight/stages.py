"""The stages: each takes small records, looks in the store, does its work where it must, and returns a record."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight import benchmark as bench
from pennyweight import evaluate as quality
from pennyweight import machine, runtimes, shipped
from pennyweight.errors import PennyweightError, StageError
from pennyweight.evaluate import looks
from pennyweight.evaluate.evidence import Evidence
from pennyweight.plan import Plan
from pennyweight.progress import Progress
from pennyweight.recipe import Recipe, RuntimeName, Step
from pennyweight.records import BenchmarkReport, Candidate, Checkpoint, Parity, StageTime
from pennyweight.store import Entry, Store, file_digest, folder_digest
from pennyweight.suite import GENERATION, TaskRef

if TYPE_CHECKING:
    import numpy as np

#: KL between an exported file and the checkpoint that it was made from, in nats per token, above which it is refused.
PARITY_TOLERANCE = 0.02
#: Nats that a token's log-probability may differ by where both compute in float32 and nothing is quantized.
EXACT_TOLERANCE = 0.01
#: Enough tokens that one odd token does not decide.
PARITY_WINDOWS = 4
PARITY_LENGTH = 256
REFERENCE_RUNTIME: RuntimeName = "transformers"


@dataclass
class Stage:
    """One stage at work: what it is told to remember of itself."""

    reused: bool = False
    library_seconds: float = 0.0

    @contextmanager
    def library(self) -> Iterator[None]:
        """Time in here is other people's code: training, exporting, scoring, logging."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.library_seconds += time.perf_counter() - begin


@dataclass
class Run:
    """What all stages of one run share."""

    recipe: Recipe
    store: Store
    progress: Progress
    plan: Plan
    device: str
    times: list[StageTime] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, subject: str) -> Iterator[Stage]:
        expected = self.plan.expected_seconds(name, subject) or 0.0
        self.progress.start(name, subject, expected)
        stage, begin, error = Stage(), time.perf_counter(), None
        memory = machine.PeakMemory()
        try:
            with memory:
                yield stage
        except PennyweightError as failure:
            error = failure.message
            raise
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
            raise
        finally:
            seconds = time.perf_counter() - begin
            if not stage.reused:
                machine.release_memory()
            self.times.append(
                StageTime(
                    stage=name,
                    subject=subject,
                    seconds=seconds,
                    library_seconds=stage.library_seconds,
                    reused=stage.reused,
                    peak_memory_bytes=memory.peak_bytes,
                    error=error,
                )
            )
            self.progress.end(name, subject, seconds, expected, stage.reused, error)

    @contextmanager
    def forgiving(self, name: str, errors: dict[str, str]) -> Iterator[None]:
        """What goes wrong in here is `name`'s error and nobody else's; a full disk is everybody's."""
        from pennyweight.errors import StoreError

        try:
            yield
        except StoreError:
            raise
        except PennyweightError as error:
            errors[name] = str(error)
        except Exception as error:
            traceback.print_exc()  # to the run's log
            errors[name] = f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Texts:
    """Token windows on disk, int64 (windows, length), by what they are for."""

    folders: dict[str, Path]
    digests: dict[str, str]
    failures: dict[str, str] = field(default_factory=dict)
    """Why a variant's calibration text cannot be used; that variant's error and nobody else's."""
    notes: list[str] = field(default_factory=list)

    def load(self, name: str) -> np.ndarray | None:
        import numpy as np

        return np.load(self.folders[name] / "windows.npy") if name in self.folders else None

    def documents(self, name: str) -> np.ndarray:
        """The document that each token comes from, int32 (windows, length)."""
        import numpy as np

        return np.load(self.folders[name] / "documents.npy")


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


def fetch_base(run: Run) -> Checkpoint:
    """The base as a checkpoint on disk, digest checked."""
    from pennyweight import sources

    with run.stage("source", "base") as stage, stage.library():
        checkpoint, stage.reused = sources.fetch_base(run.recipe.base, run.store)
    return checkpoint


def fetch_data(run: Run) -> dict[str, Path]:
    """All data sets of the recipe as JSONL on disk, by name."""
    from pennyweight import datasets

    with run.stage("data", ", ".join(run.recipe.data) or "none") as stage:
        found = {}
        for name, source in run.recipe.data.items():
            found[name], reused = datasets.fetch(name, source, run.store)
            stage.reused |= reused
    return found


def make_windows(run: Run, base: Checkpoint, data: dict[str, Path]) -> Texts:
    """Cut the texts that are calibrated on, evaluated on and used as prompts into windows of the base's tokens."""
    recipe = run.recipe
    wanted: dict[str, tuple[str, int, int, int]] = {}  # purpose → (data set, windows, length, seed)
    for variant, steps in recipe.variants.items():
        for index, step in enumerate(steps):
            if step.calibrate:
                c = step.calibrate
                wanted[_calibration_name(variant, index)] = (c.source, c.samples, c.length, recipe.seed)
    suite = recipe.evaluate
    for name, item in suite.texts().items():
        wanted[_text_name(name)] = (item.text, item.windows, item.length, suite.seed)
    if suite.generation:
        item = suite.generation
        wanted[_text_name(GENERATION)] = (item.text, item.prompts, item.input_tokens, suite.seed + 3)
    known = [item.text for item in suite.texts().values()] + ([suite.generation.text] if suite.generation else [])
    known += sorted(name for name, source in recipe.data.items() if source.text)
    if known:
        shape = recipe.benchmark.workload
        parity_length = min(PARITY_LENGTH, suite.divergence.length) if suite.divergence else PARITY_LENGTH
        wanted["parity"] = (known[0], PARITY_WINDOWS, parity_length, suite.seed + 1)
        wanted["prompts"] = (known[0], max(recipe.benchmark.concurrency), shape.input_tokens, recipe.seed + 2)
    folders, digests, failures = {}, {}, {}
    with run.stage("data", "token windows") as stage:
        stage.reused = True
        for purpose, (source, count, length, seed) in wanted.items():
            try:
                entry = _windows(run, base, data[source], count, length, seed)
            except StageError as error:
                if not purpose.startswith("calibration/"):
                    raise
                failures[purpose] = str(error)
                continue
            stage.reused &= entry.reused
            folders[purpose] = entry.files
            digests[purpose] = entry.record["digest"]
    return Texts(folders, digests, failures)


def _windows(run: Run, base: Checkpoint, text: Path, count: int, length: int, seed: int) -> Entry:
    from pennyweight import datasets

    def build(files: Path) -> dict[str, Any]:
        import numpy as np

        cut, owners = datasets.windows(_tokenizer(base), datasets.texts(text), count, length, seed)
        np.save(files / "windows.npy", cut)
        np.save(files / "documents.npy", owners)
        return {"digest": file_digest(files / "windows.npy")}

    return run.store.get_or_build(
        "windows", _text_key(base, text) | {"count": count, "length": length, "seed": seed}, build
    )


def _text_key(base: Checkpoint, text: Path) -> dict[str, Any]:
    from pennyweight.datasets import WINDOWS_VERSION

    return {
        "version": WINDOWS_VERSION,
        "text": file_digest(text),
        "tokenizer": _tokenizer_digest(Path(base.path)),
        "libraries": runtimes.versions(("tokenizers", "numpy")),
    }


def totals(run: Run, base: Checkpoint, data: dict[str, Path], reference: Reference) -> dict[str, int]:
    """Source of evidence → how many windows, items or prompts the data have. Counted only where more may be drawn."""
    from pennyweight import datasets

    suite = run.recipe.evaluate
    if run.recipe.on_inconclusive != "extend":
        return {}
    lengths = {name: (item.text, item.length) for name, item in suite.texts().items()}
    if suite.generation:
        lengths[GENERATION] = (suite.generation.text, suite.generation.input_tokens)
    found = dict(reference.totals)
    with run.stage("data", "items to draw from") as stage:
        stage.reused = True
        for name, (text, length) in lengths.items():

            def build(_: Path, text: str = text, length: int = length) -> dict[str, Any]:
                return {"available": datasets.available(_tokenizer(base), datasets.texts(data[text]), length)}

            entry = run.store.get_or_build("available", _text_key(base, data[text]) | {"length": length}, build)
            stage.reused &= entry.reused
            found[name] = entry.record["available"]
    return found


def check_overlap(run: Run, base: Checkpoint, data: dict[str, Path], texts: Texts) -> Texts:
    """Refuse variants that calibrate on what they are judged on; where their recipe allows it, note it instead."""
    from pennyweight import datasets

    calibration = [name for name in texts.folders if name.startswith("calibration/")]
    if not calibration:
        return texts
    suite = run.recipe.evaluate
    judged: dict[str, str] = {name: texts.digests[name] for name in texts.digests if name.startswith("text/")}
    judged |= {ref.task: file_digest(data[_task_data(ref)]) for ref in suite.tasks if ref.origin == "pennyweight"}
    failures, notes = dict(texts.failures), list(texts.notes)
    with run.stage("data", "overlap check") as stage:
        stage.reused = True
        for name in calibration:
            for against, digest in judged.items():

                def build(_: Path, name: str = name, against: str = against) -> dict[str, Any]:
                    evaluation = texts.load(against)
                    if evaluation is None:
                        ref = next(ref for ref in suite.tasks if ref.task == against)
                        evaluation = datasets.question_tokens(_tokenizer(base), data[_task_data(ref)])
                    spell = _tokenizer(base).decode
                    found = datasets.token_overlap(texts.load(name), evaluation, decode=spell)
                    return found.model_dump(mode="json")

                inputs = {"version": 3, "calibration": texts.digests[name], "evaluation": digest}
                entry = run.store.get_or_build("overlap", inputs, build)
                stage.reused &= entry.reused
                variant, _, index = name.removeprefix("calibration/").rpartition("/")
                calibrate = run.recipe.variants[variant][int(index)].calibrate
                try:
                    datasets.refuse_overlap(datasets.Overlap.model_validate(entry.record), variant)
                except StageError as error:
                    if calibrate and calibrate.allow_overlap:
                        notes.append(f"Allowed by the recipe: {error}")
                    else:
                        failures[name] = str(error)
    return replace(texts, failures=failures, notes=notes)


def make_variant(run: Run, variant: str, steps: list[Step], base: Checkpoint, texts: Texts) -> Checkpoint:
    """Apply a variant's steps to the base, one after the other."""
    from pennyweight.steps import STEPS, StepContext, libraries

    checkpoint, done = base, []
    for index, step in enumerate(steps):
        kind = STEPS[step.kind]
        name = _calibration_name(variant, index)
        done.append(step.describe())
        if name in texts.failures:
            raise StageError(texts.failures[name])
        inputs = {
            "version": kind.version,
            "checkpoint": checkpoint.digest,
            "step": step.model_dump(mode="json", exclude={"calibrate"}),
            **({"base": base.digest} if kind.needs_base else {}),
            "calibration": texts.digests.get(name),
            "seed": run.recipe.seed,
            "device": run.device,
            "libraries": runtimes.versions(libraries(step)),
            "isa": machine.fingerprint().get("isa"),
            "threads": machine.threads(),
        }

        def build(files: Path, kind: Any = kind, step: Any = step, name: str = name, before: Any = checkpoint) -> Any:
            from pennyweight import checkpoints

            expected = run.plan.expected_seconds(step.kind, variant) or 0.0
            report = partial(run.progress.fraction, step.kind, expected=expected)
            context = StepContext(run.device, run.recipe.seed, texts.load(name), base, report)
            with stage.library():
                outcome = kind.run(before, step, context, files)
            made = checkpoints.describe(files, origin=" → ".join([base.origin, *done]))
            past = {"rounding": before.rounding, "healing": before.healing}
            return made.model_copy(update=past | {kind.record: outcome}).model_dump(mode="json")

        with run.stage(step.kind, variant) as stage:
            entry = run.store.get_or_build("step", inputs, build)
            stage.reused = entry.reused
        checkpoint = _placed(Checkpoint, entry)
    return checkpoint


def export(run: Run, variant: str, runtime: RuntimeName, checkpoint: Checkpoint, texts: Texts) -> Candidate:
    """A variant for one runtime. A runtime that loads checkpoints as they are has nothing to export."""
    kind = runtimes.get(runtime)
    name = f"{variant}@{runtime}"
    dtype = kind.compute_dtype(checkpoint, run.device)
    if kind.export is None:
        return Candidate(
            id=name, variant=variant, runtime=runtime, checkpoint=checkpoint, path=checkpoint.path,
            digest=checkpoint.digest, bytes=checkpoint.bytes, weight_bytes=checkpoint.weight_bytes, dtype=dtype,
        )  # fmt: skip
    inputs = {
        "checkpoint": checkpoint.digest,
        "parity_text": texts.digests.get("parity"),
        **runtimes.key(runtime, run.device),
    }

    def build(files: Path) -> dict[str, Any]:
        with stage.library():
            kind.export(checkpoint, run.device, files)
        size, weight_bytes = kind.sizes(files)
        candidate = Candidate(
            id=name, variant=variant, runtime=runtime, checkpoint=checkpoint, path=str(files),
            digest=folder_digest(files), bytes=size, weight_bytes=weight_bytes, dtype=dtype,
        )  # fmt: skip
        with stage.library():
            parity = _check_parity(run, candidate, texts)
        return candidate.model_copy(update={"parity": parity}).model_dump(mode="json")

    with run.stage("export", name) as stage:
        entry = run.store.get_or_build("export", inputs, build)
        stage.reused = entry.reused
    # Two variants can have the same weights, so the names are this run's and the files are the store's.
    return _placed(Candidate, entry).model_copy(update={"id": name, "variant": variant, "checkpoint": checkpoint})


def _check_parity(run: Run, candidate: Candidate, texts: Texts) -> Parity | None:
    """KL of the exported file against its own checkpoint. Raises StageError beyond the tolerance."""
    import torch

    from pennyweight.evaluate.divergence import token_kl

    windows = texts.load("parity")
    if windows is None:
        return None
    dtype = "float32" if run.device == "cpu" else candidate.checkpoint.dtype
    own = candidate.model_copy(update={"path": candidate.checkpoint.path, "dtype": dtype})
    session = runtimes.get(REFERENCE_RUNTIME).load(own, run.device)
    expected = torch.log_softmax(session.logits(windows).float().cpu(), -1)
    session.close()
    session = runtimes.get(candidate.runtime).load(candidate, run.device)
    found = torch.log_softmax(session.logits(windows).float().cpu(), -1)
    session.close()
    kl = token_kl(expected.flatten(0, 1), found.flatten(0, 1)).mean().item()
    following = torch.from_numpy(windows)[:, 1:, None]
    moved = (expected[:, :-1].gather(-1, following) - found[:, :-1].gather(-1, following)).abs()
    quantized = runtimes.get(candidate.runtime).quantized_tensors(Path(candidate.path))
    exact = own.dtype == "float32" and not quantized
    if not kl <= PARITY_TOLERANCE:
        raise StageError(
            f"{candidate.id}: the exported file is not its checkpoint: KL {kl:.4f} > {PARITY_TOLERANCE} nats per token",
            "this is a fault of the export, not of the model; another runtime may carry this variant",
        )
    if exact and not moved.max().item() <= EXACT_TOLERANCE:
        raise StageError(
            f"{candidate.id}: the exported file is not its checkpoint: a token's log-probability is off by "
            f"{moved.max().item():.3g}, more than {EXACT_TOLERANCE}, and nothing in it is quantized",
            "this is a fault of the export, not of the model; another runtime may carry this variant",
        )
    return Parity(
        kl_mean=kl,
        top1_agreement=(expected.argmax(-1) == found.argmax(-1)).float().mean().item(),
        tokens=windows.size,
        tolerance=PARITY_TOLERANCE,
        delta_mean=moved.mean().item(),
        delta_max=moved.max().item(),
        quantized_tensors=quantized,
    )


def make_reference(run: Run, candidate: Candidate, part: Part) -> Reference:
    """What the base itself says to a part of the suite, in transformers. Computed once for all candidates."""
    inputs = {"candidate": candidate.digest, "dtype": candidate.dtype, **part.key}

    def build(files: Path) -> dict[str, Any]:
        session = _load(run, candidate)
        with stage.library():
            tokenizer, suite = _tokenizer(candidate.checkpoint), run.recipe.evaluate
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
            session = None if is_reference else _load(run, candidate)
            seconds = quality.evaluate(
                session,
                _tokenizer(candidate.checkpoint),
                run.recipe.evaluate,
                part.inputs,
                reference.folder,
                files,
                lambda: _load(run, base),
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
        purpose, seen = _text_name(name), texts
        if look:
            entry = _windows(run, base, data[text], min(added.stop, totals[name]), length, seed)
            seen = Texts({purpose: entry.files}, {purpose: entry.record["digest"]})
        found = seen.load(purpose)
        assert found is not None
        digests[name] = [seen.digests[purpose], look]
        if name == GENERATION:
            prompts = found[added]
        else:
            windows[name], documents[name] = found[added], seen.documents(purpose)[added]
    refs = [ref for ref in suite.tasks if ref.task in sources]
    ours = {ref.task: data[_task_data(ref)] for ref in refs if ref.origin == "pennyweight"}
    inputs = quality.Inputs(
        windows,
        documents,
        ours,
        {ref.task: looks.part(first[ref.task], look) for ref in refs},
        prompts,
        looks.part(first[GENERATION], look).start or 0 if prompts is not None else 0,
    )
    return Part(look, inputs, _suite_key(run, digests, refs, ours, look))


def benchmark(run: Run, candidates: list[Candidate], texts: Texts) -> BenchmarkReport:
    """What a token costs on every candidate. One stage over the whole set: another candidate measures all again."""
    settings = run.recipe.benchmark
    inputs = {
        "version": bench.VERSION,
        "candidates": {candidate.id: candidate.digest for candidate in candidates},
        "settings": settings.model_dump(mode="json"),
        "prompts": texts.digests.get("prompts"),
        "runtimes": [runtimes.key(name, run.device) for name in sorted({c.runtime for c in candidates})],
        "machine": machine.fingerprint(),
    }

    def build(_: Path) -> dict[str, Any]:
        windows = _prompts(run, texts)
        expected = run.plan.expected_seconds("benchmark", "all candidates") or 0.0
        with stage.library():
            report = bench.run_benchmark(
                candidates,
                settings,
                lambda requests, tokens: windows[:requests, :tokens],
                run.device,
                lambda detail, done: run.progress.fraction("benchmark", detail, done, expected),
            )
        return report.model_dump(mode="json")

    with run.stage("benchmark", "all candidates") as stage:
        found = run.store.find("benchmark", inputs)
        if found and _is_stale(found):
            run.store.discard(found)
        entry = run.store.get_or_build("benchmark", inputs, build)
        stage.reused = entry.reused
    return BenchmarkReport.model_validate(entry.record)


def _is_stale(entry: Entry) -> bool:
    measured = datetime.fromisoformat(entry.record["measured_at"])
    return bool(entry.record["failures"]) or datetime.now(UTC) - measured > timedelta(days=bench.MAX_AGE_DAYS)


def _prompts(run: Run, texts: Texts) -> np.ndarray:
    windows = texts.load("prompts")
    if windows is None:
        raise StageError(
            "there is no text to make prompts of",
            "give the suite `divergence:`, or the recipe a data set with `text:`",
        )
    return windows


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


def _task_data(ref: TaskRef) -> str:
    return shipped.tasks()[ref.task]["metadata"]["data"]


def _text_name(name: str) -> str:
    return f"text/{name}"


def _load(run: Run, candidate: Candidate) -> Any:
    return runtimes.get(candidate.runtime).load(candidate, run.device)


def _tokenizer(checkpoint: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint.path)


def _tokenizer_digest(folder: Path) -> list[list[str]]:
    return [[path.name, file_digest(path)] for path in sorted(folder.glob("token*")) if path.is_file()]


def _calibration_name(variant: str, index: int) -> str:
    return f"calibration/{variant}/{index}"


def _placed(kind: Any, entry: Entry) -> Any:
    """A record read back from the store, its path where the store has its files now."""
    return kind.model_validate({**entry.record, "path": str(entry.files)})
