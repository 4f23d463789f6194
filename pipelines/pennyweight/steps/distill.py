"""`distill`: train a checkpoint, or a student drawn from the base, to predict what the base predicts.

Hinton et al., Distilling the Knowledge in a Neural Network, 2015; after pruning, Muralidharan et al., Compact Language
Models via Pruning and Knowledge Distillation, 2024.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight import checkpoints, installed, runtimes
from pennyweight.errors import StageError
from pennyweight.memory import out_of_memory_of
from pennyweight.quantization import decoder
from pennyweight.recipe import Distill
from pennyweight.records import Checkpoint, Distillation
from pennyweight.store import Entry, digest_of, folder_bytes, folder_digest

if TYPE_CHECKING:
    from pennyweight.steps import StepContext

LIBRARIES = ("transformers", "torch", "accelerate")


def run(checkpoint: Checkpoint, step: Distill, context: StepContext, files: Path) -> Distillation:
    """Write the student that was best on held-out text to `files`.

    Raises StageError where the step lacks text or its teacher, where the vocabularies differ, where nothing was learnt
    before a loss was not finite, or where what the step needs is not installed.
    """
    if step.on_policy:
        installed.require("trl")
    if context.calibration is None or context.teacher is None or context.store is None:
        raise StageError("distill needs text, a teacher and a store")
    from pennyweight.distillation.state import clean

    begin = time.monotonic()
    context = _last_first(context)
    _check_vocabularies(checkpoint, context.teacher)
    with (
        out_of_memory_of("distill", "lower `batch` or `length`, and raise `accumulate`"),
        context.store.workspace("distill", context.key) as workspace,
    ):
        if damage := clean(workspace):
            context.say(damage)
        context = _generated(step, context)
        cached = _cache(step, context)
        work, course = _train(checkpoint, step, context, workspace, cached)
        _check_course(course, context)
        _write(Path(work.student), workspace / _best(course.kept), files)
        return Distillation(
            steps=course.steps,
            tokens=course.tokens,
            ended_by=course.ended_by,
            kept_step=course.kept,
            shared_blocks=work.shared,
            kl_before=course.curve[0][1],
            kl_after=course.best,
            curve=course.curve,
            losses=course.losses,
            cache_bytes_per_token=None
            if step.teacher == "live"
            else step.teacher.bytes_per_token(_predicted(context.teacher)),
            cache_reused=bool(cached and cached.reused),
            tokens_per_second=course.tokens / course.seconds if course.seconds else 0.0,
            training_seconds=course.seconds,
            seconds=time.monotonic() - begin,
            earlier=checkpoint.distillation,
        )


def _last_first(context: StepContext) -> StepContext:
    """The context with the windows in the other order. Steps before this one that drew fewer of the same text were
    fitted to the first: those would flatter the student where they are held out, and teach it little elsewhere."""
    import numpy as np

    turned = {
        name: None if windows is None else np.ascontiguousarray(windows[::-1])
        for name, windows in (("calibration", context.calibration), ("answers", context.answers))
    }
    return replace(context, **turned)


def _train(
    checkpoint: Checkpoint, step: Distill, context: StepContext, workspace: Path, cached: Entry | None
) -> tuple[Any, Any]:
    import numpy as np
    import torch

    from pennyweight.distillation import crew, student
    from pennyweight.distillation.train import Work, train
    from pennyweight.distillation.worker import train_in_processes

    assert context.teacher
    torch.manual_seed(context.seed)
    start = Path(checkpoint.path)
    if step.student:
        start = workspace / "start"
        try:
            student.draw(Path(context.teacher.path), step, start)
        except ValueError as error:
            raise StageError(f"distill: {error}") from None
    np.save(workspace / "windows.npy", context.calibration)
    learns_answers = step.answers or step.generate is not None
    if learns_answers:
        if context.answers is None:
            raise StageError("distill: `answers` needs data with answers", "remove `answers`")
        np.save(workspace / "answers.npy", context.answers)
    shared = _shared(Path(context.teacher.path), start) if step.train == "after_cut" else 0
    work = Work(
        teacher=context.teacher,
        student=str(start),
        dtype=checkpoint.dtype,
        windows=str(workspace / "windows.npy"),
        settings=step,
        device=context.device,
        workspace=str(workspace),
        cache=str(cached.files) if cached else None,
        answers=str(workspace / "answers.npy") if learns_answers else None,
        seed=context.seed,
        shared=shared,
    )
    together = None if step.on_policy else crew.leading()
    trains = together.train if together else train if step.processes == 1 else train_in_processes
    return work, trains(work, context.report, context.measure)


def _shared(teacher: Path, student: Path) -> int:
    """First blocks that a student shares with the teacher. Raises StageError where there are none."""
    from pennyweight.distillation.trunk import shared_blocks

    if found := shared_blocks(teacher, student):
        return found
    message = "distill: the student's first block is none of the base's, so there is nothing before the cut"
    raise StageError(message, "remove `train: after_cut`")


def _generated(step: Distill, context: StepContext) -> StepContext:
    """The context with what the teacher wrote to learn on, from the store, or written there now."""
    if step.generate is None:
        return context
    import numpy as np

    from pennyweight.distillation import generation

    assert context.teacher and context.calibration is not None
    windows, settings = context.calibration, step.generate
    inputs = _said(context, windows[step.held_out :]) | {
        "version": generation.VERSION,
        "settings": settings.model_dump(mode="json"),
        "seed": context.seed,
    }

    def write(teacher: Any, folder: Path) -> None:
        import torch

        ids = torch.from_numpy(windows[step.held_out :]).to(context.device)
        generation.write(teacher, ids, settings, context.seed, folder, context.report)

    said = generation.read(_kept("generated", inputs, context, write).files)
    answers = np.ones(windows.shape, dtype=bool)
    answers[step.held_out :, : settings.prompt] = False
    return replace(context, calibration=np.concatenate([windows[: step.held_out], said]), answers=answers)


def _cache(step: Distill, context: StepContext) -> Entry | None:
    """What the teacher says to the text, from the store, or written there now."""
    if step.teacher == "live":
        return None
    from pennyweight.distillation import cache

    windows, settings = context.calibration, step.teacher
    inputs = _said(context, windows) | {
        "version": cache.VERSION,
        "held_out": step.held_out,
        "settings": settings.model_dump(mode="json"),
        "temperature": step.temperature,
        "seed": context.seed if settings.cache == "sampled" else None,
    }

    def write(teacher: Any, folder: Path) -> None:
        import torch

        ids = torch.from_numpy(windows).to(context.device)
        learnt, held_out = ids[step.held_out :], ids[: step.held_out]
        cache.write(teacher, learnt, held_out, settings, step.temperature, context.seed, folder, context.report)

    return _kept("teacher", inputs, context, write)


def _said(context: StepContext, windows: Any) -> dict[str, Any]:
    """What identifies the teacher at a text."""
    assert context.teacher
    return {
        "teacher": context.teacher.digest,
        "windows": hashlib.sha256(windows.tobytes()).hexdigest(),
        "shape": list(windows.shape),
        "device": context.device,
        "libraries": runtimes.versions(LIBRARIES[:2]),
    }


def _kept(stage: str, inputs: dict[str, Any], context: StepContext, write: Callable[[Any, Path], None]) -> Entry:
    """What `write(teacher, folder)` leaves as .npy files, from the store; a killed run goes on from those it left."""
    assert context.teacher and context.store
    base, store = context.teacher, context.store

    def build(files: Path) -> dict[str, Any]:
        with store.workspace(stage, digest_of(inputs)) as workspace:
            write(decoder.load(base, context.device), workspace)
            for path in workspace.glob("*.npy"):
                shutil.move(path, files)
        return {"bytes": folder_bytes(files), "digest": folder_digest(files)}

    entry = store.get_or_build(stage, inputs, build)
    if entry.reused and folder_digest(entry.files) != entry.record.get("digest"):
        context.say(f"what the teacher said is damaged in {entry.folder}: it is asked again")
        store.discard(entry)
        entry = store.get_or_build(stage, inputs, build)
    return entry


def _check_course(course: Any, context: StepContext) -> None:
    """Raise StageError where nothing was learnt before it failed; say so where nothing was learnt without a failure."""
    if not math.isfinite(course.best):
        hint = "the checkpoint before this step has weights that are not numbers"
        raise StageError(f"distill: {course.ended_by}, with the weights that it was given", hint)
    if course.kept:
        return
    if course.ended_by.startswith(("a loss", "a held-out KL")):
        message = f"distill: {course.ended_by}, and no state before it was better than the first"
        raise StageError(message, "lower `learning_rate`")
    context.say(
        f"nothing was better than the weights that it began with, a held-out KL of {course.best:.4f}, so they stay; "
        "lower `learning_rate`, or give it more steps"
    )


def _check_vocabularies(student: Checkpoint, teacher: Checkpoint) -> None:
    sizes = [_predicted(each) for each in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise StageError(
            f"distill: the student predicts {sizes[0]} tokens, the teacher {sizes[1]}",
            "a student learns from a teacher of the same vocabulary",
        )


def _predicted(checkpoint: Checkpoint) -> int:
    """Tokens that a model predicts."""
    config = checkpoints.read_config(Path(checkpoint.path))
    return (config.get("text_config") or config).get("vocab_size") or 0


def _best(step: int) -> str:
    from pennyweight.distillation.train import BEST

    return BEST.format(step)


def _write(student: Path, best: Path, files: Path) -> None:
    """The best weights with the student's other files. They stay where they were: who is killed before the result is in
    the store goes on from there."""
    from pennyweight.distillation.student import copy_beside

    copy_beside(student, files)
    for path in best.iterdir():
        if path.suffix == ".safetensors" or path.name == checkpoints.INDEX:
            _link(path, files / path.name)


def _link(path: Path, to: Path) -> None:
    """The same bytes under another name, where the file system can."""
    try:
        os.link(path, to)
    except OSError:
        shutil.copy(path, to)
