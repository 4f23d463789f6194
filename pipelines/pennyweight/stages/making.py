"""From the base to candidates: fetch, apply the steps, export, prove that the export is the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pennyweight import checkpoints, machine, runtimes
from pennyweight.errors import StageError
from pennyweight.recipe import From, Quantize, Recipe, RuntimeName, Step
from pennyweight.records import Candidate, Checkpoint, Parity
from pennyweight.stages.run import Run, placed
from pennyweight.stages.texts import Texts, calibration_name
from pennyweight.store import Store, digest_of, folder_digest

#: KL between an exported file and the checkpoint that it was made from, in nats per token, above which it is refused.
PARITY_TOLERANCE = 0.02
#: Nats that a token's log-probability may differ by where both compute in float32 and nothing is quantized.
EXACT_TOLERANCE = 0.01
REFERENCE_RUNTIME: RuntimeName = "transformers"


@dataclass(frozen=True)
class Bases:
    """The bases of a recipe on disk, by name; `base` is the recipe's own."""

    found: dict[str, Checkpoint]
    failures: dict[str, str]
    """Why one of the others cannot be started from."""

    def start_of(self, recipe: Recipe, variant: str) -> Checkpoint:
        """What a variant starts from. Raises StageError where that base cannot be used."""
        name = recipe.start_of(variant)
        if name in self.failures:
            raise StageError(self.failures[name])
        return self.found[name]


def fetch_base(run: Run) -> Checkpoint:
    """The base as a checkpoint on disk, digest checked."""
    from pennyweight import sources

    with run.stage("source", "base") as stage, stage.library():
        checkpoint, stage.reused = sources.fetch_base(run.recipe.base, run.store)
    return checkpoint


def fetch_bases(run: Run, base: Checkpoint) -> Bases:
    """All bases of the recipe. What is wrong with one of the others is the error of the variants that start from it."""
    from pennyweight import sources
    from pennyweight.sources import vocabulary

    found, failures = {"base": base}, {}
    for name, other in run.recipe.bases.items():
        with run.forgiving(name, failures), run.stage("source", name) as stage, stage.library():
            checkpoint, stage.reused = sources.fetch_base(other, run.store)
            if difference := vocabulary.difference(Path(checkpoint.path), Path(base.path)):
                raise StageError(f"base {name}: {difference}", vocabulary.HINT)
            found[name] = checkpoint
    return Bases(found, failures)


def make_variant(run: Run, variant: str, steps: list[Step], bases: Bases, texts: Texts) -> Checkpoint:
    """Apply a variant's steps to the base that it starts from, one after the other."""
    from pennyweight.steps import STEPS, StepContext, libraries
    from pennyweight.tracking import training_curves

    base = bases.start_of(run.recipe, variant)
    checkpoint, rounded, done = base, None, []
    for index, step in enumerate(steps):
        if isinstance(step, From):
            continue
        kind = STEPS[step.kind]
        name = calibration_name(variant, index)
        done.append(step.describe())
        if name in texts.failures:
            with run.stage(step.kind, variant):
                raise StageError(texts.failures[name])
        inputs = {
            "version": kind.version,
            "checkpoint": checkpoint.digest,
            "step": step.model_dump(mode="json", exclude={"calibrate"}),
            **({"base": base.digest} if kind.needs_base else {}),
            **({"teacher": bases.found["base"].digest} if kind.needs_teacher else {}),
            **({"rounded": rounded.digest} if kind.needs_rounded and rounded and rounded.digest != base.digest else {}),
            "calibration": texts.digests.get(name),
            "seed": run.recipe.seed,
            "device": run.device,
            "libraries": runtimes.versions(libraries(step)),
            "isa": machine.fingerprint().get("isa"),
            "threads": machine.threads(),
        }

        models = {"base": base, "teacher": bases.found["base"], "rounded": rounded}

        def build(
            files: Path,
            kind: Any = kind,
            step: Any = step,
            name: str = name,
            before: Any = checkpoint,
            models: Any = models,
            inputs: Any = inputs,
        ) -> Any:
            expected = run.plan.expected_seconds(step.kind, variant) or 0.0
            report = partial(run.progress.fraction, step.kind, expected=expected)
            kept = {"store": run.store, "key": digest_of(inputs)}
            text = {"calibration": texts.load(name), "answers": texts.answers(name)}
            context = StepContext(run.device, run.recipe.seed, report=report, **text, **kept, **models)
            training = f"{step.kind} {variant}"
            context = replace(context, say=lambda line: run.progress.say(f"    {training}: {line}"))
            with stage.library(), training_curves(run.recipe.name, training) as measure:
                outcome = kind.run(before, step, replace(context, measure=measure), files)
            made = checkpoints.describe(files, origin=" → ".join([base.origin, *done]))
            past = {
                "pruning": before.pruning,
                "distillation": before.distillation,
                "rounding": before.rounding,
                "healing": before.healing,
            }
            return made.model_copy(update=past | {kind.record: outcome}).model_dump(mode="json")

        with run.stage(step.kind, variant) as stage:
            entry = run.store.get_or_build("step", inputs, build)
            stage.reused = entry.reused
        if isinstance(step, Quantize):
            rounded = checkpoint
        checkpoint = placed(Checkpoint, entry)
    return checkpoint


def export(run: Run, variant: str, runtime: RuntimeName, checkpoint: Checkpoint, texts: Texts) -> Candidate:
    """A variant for one runtime. A runtime that loads checkpoints as they are has nothing to export."""
    name = f"{variant}@{runtime}"
    plain = _as_it_is(name, variant, runtime, checkpoint, run.device)
    if runtimes.get(runtime).export is None:
        return plain
    inputs = {
        "checkpoint": checkpoint.digest,
        "parity_text": texts.digests.get("parity"),
        **runtimes.key(runtime, run.device),
    }

    def build(files: Path) -> dict[str, Any]:
        with stage.library():
            candidate = _write(plain, run.device, files)
            parity = _check_parity(run, candidate, texts)
        return candidate.model_copy(update={"parity": parity}).model_dump(mode="json")

    with run.stage("export", name) as stage:
        entry = run.store.get_or_build("export", inputs, build)
        stage.reused = entry.reused
    # Two variants can have the same weights, so the names are this run's and the files are the store's.
    return placed(Candidate, entry).model_copy(update={"id": name, "variant": variant, "checkpoint": checkpoint})


def export_alone(checkpoint: Checkpoint, runtime: RuntimeName, device: str, store: Store) -> Candidate:
    """A checkpoint for one runtime outside of a run, where there is no text to compare the exported file on."""
    plain = _as_it_is(f"{Path(checkpoint.path).name}@{runtime}", "base", runtime, checkpoint, device)
    if runtimes.get(runtime).export is None:
        return plain
    if (Path(checkpoint.path) / checkpoints.ADAPTER).is_dir():
        raise StageError(f"{runtime} cannot load the adapter of {checkpoint.path}")
    inputs = {"checkpoint": checkpoint.digest, "parity_text": None, **runtimes.key(runtime, device)}
    entry = store.get_or_build("export", inputs, lambda files: _write(plain, device, files).model_dump(mode="json"))
    return placed(Candidate, entry).model_copy(update={"id": plain.id, "variant": "base", "checkpoint": checkpoint})


def _as_it_is(name: str, variant: str, runtime: RuntimeName, checkpoint: Checkpoint, device: str) -> Candidate:
    return Candidate(
        id=name, variant=variant, runtime=runtime, checkpoint=checkpoint, path=checkpoint.path,
        digest=checkpoint.digest, bytes=checkpoint.bytes, weight_bytes=checkpoint.weight_bytes,
        dtype=runtimes.get(runtime).compute_dtype(checkpoint, device),
    )  # fmt: skip


def _write(plain: Candidate, device: str, files: Path) -> Candidate:
    """Export a candidate's checkpoint to `files`."""
    kind = runtimes.get(plain.runtime)
    kind.export(plain.checkpoint, device, files)
    size, weight_bytes = kind.sizes(files)
    changes = {"path": str(files), "digest": folder_digest(files), "bytes": size, "weight_bytes": weight_bytes}
    return plain.model_copy(update=changes)


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
    exact = own.dtype == "float32" and not quantized and runtimes.get(candidate.runtime).exact
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
