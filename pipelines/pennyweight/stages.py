"""The stages: each takes small records, looks in the store, does its work where it must, and returns a record."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight import benchmark as bench
from pennyweight import evaluate as quality
from pennyweight import machine, runtimes, shipped
from pennyweight.errors import PennyweightError, StageError
from pennyweight.plan import Plan
from pennyweight.progress import Progress
from pennyweight.recipe import Recipe, RuntimeName, Step
from pennyweight.records import (
    BenchmarkReport,
    Candidate,
    Checkpoint,
    Parity,
    QualityReport,
    StageTime,
)
from pennyweight.store import Entry, Store, file_digest, folder_digest

if TYPE_CHECKING:
    import numpy as np

#: KL between an exported file and the checkpoint that it was made from, in nats per token, above which it is refused.
PARITY_TOLERANCE = 0.02
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

    paths: dict[str, Path]
    digests: dict[str, str]
    failures: dict[str, str] = field(default_factory=dict)
    """Why a variant's calibration text could not be cut; that variant's error and nobody else's."""

    def load(self, name: str) -> np.ndarray | None:
        import numpy as np

        return np.load(self.paths[name]) if name in self.paths else None


@dataclass(frozen=True)
class Reference:
    folder: Path
    key: str

    def rows(self) -> list[dict[str, Any]]:
        return quality.read_samples(self.folder / quality.SAMPLES)


@dataclass(frozen=True)
class Evaluated:
    quality: QualityReport
    samples: Path

    def rows(self) -> list[dict[str, Any]]:
        return quality.read_samples(self.samples)


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
    prompt_text = next(iter(sorted(name for name, source in recipe.data.items() if source.text)), None)
    if suite.divergence:
        text = prompt_text = suite.divergence.text
        wanted["divergence"] = (text, suite.divergence.windows, suite.divergence.length, suite.seed)
        wanted["parity"] = (text, PARITY_WINDOWS, min(PARITY_LENGTH, suite.divergence.length), suite.seed + 1)
    if prompt_text is not None:
        shape = recipe.benchmark.workload
        wanted["prompts"] = (prompt_text, max(recipe.benchmark.concurrency), shape.input_tokens, recipe.seed + 2)
    paths, digests, failures = {}, {}, {}
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
            paths[purpose] = entry.files / "windows.npy"
            digests[purpose] = entry.record["digest"]
    return Texts(paths, digests, failures)


def _windows(run: Run, base: Checkpoint, text: Path, count: int, length: int, seed: int) -> Entry:
    from pennyweight import datasets

    inputs = {
        "version": 1,
        "text": file_digest(text),
        "tokenizer": _tokenizer_digest(Path(base.path)),
        "count": count,
        "length": length,
        "seed": seed,
        "libraries": runtimes.versions(("tokenizers", "numpy")),
    }

    def build(files: Path) -> dict[str, Any]:
        import numpy as np
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base.path)
        np.save(files / "windows.npy", datasets.windows(tokenizer, datasets.texts(text), count, length, seed))
        return {"digest": file_digest(files / "windows.npy")}

    return run.store.get_or_build("windows", inputs, build)


def check_overlap(run: Run, texts: Texts) -> None:
    """Raise StageError where a variant calibrates on text that the evaluation uses."""
    calibration = [name for name in texts.paths if name.startswith("calibration/")]
    if not calibration or "divergence" not in texts.paths:
        return
    from pennyweight import datasets

    with run.stage("data", "overlap check") as stage:
        stage.reused = True
        for name in calibration:
            inputs = {"version": 1, "calibration": texts.digests[name], "evaluation": texts.digests["divergence"]}

            def build(_: Path, name: str = name) -> dict[str, Any]:
                found = datasets.token_overlap(texts.load(name), texts.load("divergence"))
                datasets.refuse_overlap(found, name.removeprefix("calibration/"))
                return found.model_dump(mode="json")

            stage.reused &= run.store.get_or_build("overlap", inputs, build).reused


def make_variant(run: Run, variant: str, steps: list[Step], base: Checkpoint, texts: Texts) -> Checkpoint:
    """Apply a variant's steps to the base, one after the other."""
    from pennyweight.steps import STEPS, StepContext

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
            "calibration": texts.digests.get(name),
            "seed": run.recipe.seed,
            "device": run.device,
            "libraries": runtimes.versions(kind.libraries),
            "isa": machine.fingerprint().get("isa"),
            "threads": machine.threads(),
        }

        def build(files: Path, kind: Any = kind, step: Any = step, name: str = name, before: Any = checkpoint) -> Any:
            from pennyweight import checkpoints

            context = StepContext(run.device, run.recipe.seed, texts.load(name))
            with stage.library():
                kind.run(before, step, context, files)
            return checkpoints.describe(files, origin=" → ".join([base.origin, *done])).model_dump(mode="json")

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
    if not kl <= PARITY_TOLERANCE:
        raise StageError(
            f"{candidate.id}: the exported file is not its checkpoint: KL {kl:.4f} > {PARITY_TOLERANCE} nats per token",
            "this is a fault of the export, not of the model; another runtime may carry this variant",
        )
    agreement = (expected.argmax(-1) == found.argmax(-1)).float().mean().item()
    return Parity(
        kl_mean=kl,
        top1_agreement=agreement,
        tokens=windows.size,
        tolerance=PARITY_TOLERANCE,
        quantized_tensors=runtimes.get(candidate.runtime).quantized_tensors(Path(candidate.path)),
    )


def make_reference(run: Run, base: Checkpoint, data: dict[str, Path], texts: Texts) -> Reference:
    """What the base itself says to the suite, in transformers. Computed once for all candidates."""
    candidate = export(run, "base", REFERENCE_RUNTIME, base, texts)
    inputs = {
        "candidate": candidate.digest,
        "dtype": candidate.dtype,
        **_suite_key(run, REFERENCE_RUNTIME, data, texts),
    }

    def build(files: Path) -> dict[str, Any]:
        session = _load(run, candidate)
        with stage.library():
            quality.write_reference(session, _tokenizer(base), run.recipe.evaluate, _inputs(run, data, texts), files)
        session.close()
        return {}

    with run.stage("reference", candidate.id) as stage:
        entry = run.store.get_or_build("reference", inputs, build)
        stage.reused = entry.reused
    return Reference(entry.files, entry.key)


def evaluate(run: Run, candidate: Candidate, data: dict[str, Path], texts: Texts, reference: Reference) -> Evaluated:
    """The candidate's quality, on the same samples as the reference."""
    is_reference = candidate.variant == "base" and candidate.runtime == REFERENCE_RUNTIME
    key = _suite_key(run, candidate.runtime, data, texts)
    inputs = {"candidate": candidate.digest, "dtype": candidate.dtype, "reference": reference.key, **key}

    def build(files: Path) -> dict[str, Any]:
        with stage.library():
            session = None if is_reference else _load(run, candidate)
            tokenizer = None if is_reference else _tokenizer(candidate.checkpoint)
            suite, on_disk = run.recipe.evaluate, _inputs(run, data, texts)
            report = quality.evaluate(session, tokenizer, candidate, suite, on_disk, reference.folder, files)
            if session is not None:
                session.close()
        return report.model_dump(mode="json")

    with run.stage("evaluate", candidate.id) as stage:
        entry = run.store.get_or_build("evaluate", inputs, build)
        stage.reused = entry.reused
    samples = entry.files / quality.SAMPLES
    report = QualityReport.model_validate(entry.record)
    return Evaluated(report.model_copy(update={"candidate": candidate.id, "samples_path": str(samples)}), samples)


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


def _suite_key(run: Run, runtime: RuntimeName, data: dict[str, Path], texts: Texts) -> dict[str, Any]:
    """What of the suite changes a candidate's numbers."""
    suite = run.recipe.evaluate
    task_data = {ref.task: file_digest(data[_task_data(ref.task)]) for ref in suite.tasks}
    return {
        "evaluate_version": quality.VERSION,
        "divergence": texts.digests.get("divergence"),
        "tasks": [[ref.task, ref.limit, shipped.tasks()[ref.task], task_data[ref.task]] for ref in suite.tasks],
        "batch_size": suite.batch_size,
        "seed": suite.seed,
        "libraries_of_suite": runtimes.versions(("lm-eval", "tokenizers", "datasets")),
        **runtimes.key(runtime, run.device),
    }


def _inputs(run: Run, data: dict[str, Path], texts: Texts) -> quality.EvaluationInputs:
    tasks = {ref.task: data[_task_data(ref.task)] for ref in run.recipe.evaluate.tasks}
    return quality.EvaluationInputs(texts.load("divergence"), tasks)


def _task_data(task: str) -> str:
    return shipped.tasks()[task]["metadata"]["data"]


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
