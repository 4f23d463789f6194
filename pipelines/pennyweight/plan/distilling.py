"""What a `distill` step takes, and what of it cannot work."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pennyweight import machine
from pennyweight.distillation.config import copied_layers
from pennyweight.plan.constants import ACTIVATION_COPIES, BASELINE_BYTES, DISTILLING_EFFICIENCY
from pennyweight.plan.job import Job, per_gb, rate, score_seconds, wave_seconds
from pennyweight.plan.records import StageEstimate
from pennyweight.plan.show import format_bytes
from pennyweight.plan.sizes import ITEMSIZE, ModelShape, dense_bytes
from pennyweight.recipe import Distill, Prune, Step, names_of

#: Bytes for each weight that learns: itself and its gradient in float32, and AdamW's two moments.
LEARNING_BYTES = 16
#: Of those, what a resumable state keeps on disk.
STATE_BYTES = 12
#: Windows that the teacher writes together.
SHARD = 16
#: Logits alive at once in the loss, in float32: the student's, the teacher's, and what is made of them.
LOGIT_BYTES = 4 * 4 * 256 * 49152
#: The same of TRL's loss, for each of the positions that it takes at once. On a GPU its kernels work in place.
TRL_POSITION_BYTES = {"cpu": 4 * 12 * 32768, "cuda": 4 * 2 * 32768}
TRL_POSITIONS = 4096
#: Bytes that move for a weight at each token written, over those of a weight in the dtype that is computed with: what
#: learns is kept in float32, is read (4), cast (2) and read again (2).
CASTING = {"float32": 1, "bfloat16": 4, "float16": 4}


def estimate_distill(job: Job, student: ModelShape, variant: str, index: int) -> StageEstimate:
    """`student` is the shape of what the variant's step of that number makes. The teacher is the base."""
    *before, step = job.recipe.variants[variant][: index + 1]
    assert job.shape and isinstance(step, Distill)
    trunk = _shared_blocks(before, step, job.shape.layers) * _block(job.shape)
    weights, cache = dense_bytes(student), cache_bytes(job.shape, step)
    shared = _asked_before(job, variant, step)
    dtype = job.compute_dtype(job.shape, "transformers", False)
    teacher = 0 if step.ce == 1 or (step.teacher != "live" and shared) else ITEMSIZE[dtype] * job.shape.parameters
    activations = step.batch * step.length * student.layers * student.intermediate * ACTIVATION_COPIES
    logits = LOGIT_BYTES
    if step.on_policy:
        positions = min(step.batch * (step.length - step.on_policy.prompt), TRL_POSITIONS)
        logits = TRL_POSITION_BYTES[job.device] * positions
        # What it has written so far, of all that a step learns from.
        activations = max(activations, step.step_tokens * student.kv_bytes(4))
    outside = 0 if step.train == "all" else math.prod(student.head) * (1 if student.tied else 2)
    learnt = student.parameters - trunk - outside
    kept = 4 + (2 if dtype != "float32" else 0)
    learning = kept * student.parameters + (LEARNING_BYTES - 4) * learnt
    working = 4 * student.parameters + (STATE_BYTES - 4) * learnt + 2 * weights
    notes = [step.describe(), f"distill: {format_bytes(working)} of its disk are free again when it has ended"]
    if cache:
        assert step.teacher != "live"
        size = step.teacher.bytes_per_token(job.shape.head[0])
        notes.append(f"distill: what the teacher says takes {size} bytes a token, {format_bytes(cache)} in all")
    if step.on_policy:
        notes.append(_writes(job, student, step, trunk))
    return StageEstimate(
        stage="distill", subject=variant, seconds=_seconds(job, student, step, shared, trunk), weight_bytes=weights,
        disk_bytes=weights + working + (0 if shared else cache), notes=notes,
        peak_memory_bytes=BASELINE_BYTES["distill"] + teacher + learning + activations + logits,
    )  # fmt: skip


def cache_bytes(teacher: ModelShape, step: Distill) -> int:
    """Bytes of what the teacher says to the text; 0 where it is live."""
    if step.teacher == "live":
        return 0
    learnt = (step.calibrate.samples - step.held_out) * step.length
    return learnt * step.teacher.bytes_per_token(teacher.head[0]) + 4 * step.held_out * step.length * teacher.hidden


def distill_problems(
    teacher: ModelShape, student: ModelShape | None, steps: list[Step], device: str
) -> Iterator[tuple[str, str, str, str]]:
    """(key, what is wrong, hint, kind of problem) of the last of the steps, with which `student` begins."""
    *before, step = steps
    assert isinstance(step, Distill)
    if step.train == "after_cut" and not _shared_blocks(before, step, teacher.layers):
        message = "the first block goes, or is fitted, so none before the cut is the base's"
        yield "train", message, "leave it out", "recipe"
    if step.hidden and student and student.hidden != teacher.hidden:
        message = f"the student's hidden states are {student.hidden} wide, the teacher's {teacher.hidden}"
        yield "hidden", message, "remove `hidden`", "recipe"
    if step.teacher != "live" and step.teacher.k >= teacher.head[0]:
        message = f"the vocabulary has {teacher.head[0]} tokens, {step.teacher.k} of them are no choice"
        yield "teacher.k", message, "take fewer", "recipe"
    if device == "cuda" and machine.has_gpu() and step.processes > len(machine.gpus()):
        message = f"{step.processes} processes need a GPU each, and this machine has {len(machine.gpus())}"
        yield "processes", message, "take fewer", "machine"


def _block(shape: ModelShape) -> int:
    """Weights that a token is multiplied with in one block."""
    return (shape.product_weights - math.prod(shape.head)) // shape.layers


def _shared_blocks(before: list[Step], step: Distill, layers: int) -> int:
    """First blocks of the base that will not learn. Those that a search will take out are taken to begin half-way."""
    if step.train != "after_cut":
        return 0
    shared = layers - 1
    for other in before:
        if isinstance(other, Prune):
            first = min(other.drop) if other.drop else layers // 2
            shared = min(shared, first - (1 if other.refit and other.text else 0))
    if step.student:
        copied = copied_layers(layers, step.student.layers)
        shared = sum(place == layer for place, layer in enumerate(copied))
    return max(shared, 0)


def _step_seconds(job: Job, student: ModelShape, step: Distill, trunk: int) -> tuple[float, float]:
    """(to learn, to write what is learnt on) of a step. A forward pass is 2 operations for each weight and token, a
    backward pass 4: 2 where a weight does not learn and what comes before it does. `trunk` are the weights before those
    that learn; a teacher who reads the same batch computes with them once for both."""
    assert job.shape
    dtype = job.compute_dtype(job.shape, "transformers", False)
    asks = step.teacher == "live" and step.ce < 1
    operations = 6 * student.product_weights + (2 * job.shape.product_weights if asks else 0)
    operations -= (6 if asks and not step.on_policy else 4) * trunk
    operations -= 0 if step.train == "all" else 2 * math.prod(student.head)
    learning = operations * step.step_tokens / (rate(job, dtype) * DISTILLING_EFFICIENCY[dtype])
    if step.on_policy is None:
        return learning, 0.0
    prompt, together = step.on_policy.prompt, step.batch * step.accumulate
    writing = wave_seconds(job, student, "transformers", None, together, prompt, step.length - prompt)
    assert writing is not None
    return learning, writing * CASTING[dtype]


def _writes(job: Job, student: ModelShape, step: Distill, trunk: int) -> str:
    assert step.on_policy
    count, most = step.batch * step.accumulate, step.length - step.on_policy.prompt
    said = f"distill: in every step the student writes {count} texts of up to {most} tokens"
    if job.measured is None:
        return said
    learning, writing = _step_seconds(job, student, step, trunk)
    return f"{said}, about {writing:.2g} s of {learning + writing:.2g} s where none ends before"


def _seconds(job: Job, student: ModelShape, step: Distill, shared: bool, trunk: int) -> float | None:
    assert job.shape
    if job.measured is None:
        return None
    dtype = job.compute_dtype(job.shape, "transformers", False)
    speed = rate(job, dtype) * DISTILLING_EFFICIENCY[dtype]
    a_step = sum(_step_seconds(job, student, step, trunk))
    a_look = (2 * student.product_weights + 2 * job.shape.head[0] * job.shape.hidden) * step.held_out * step.length
    a_look /= speed
    allowed = [] if step.minutes is None else [60 * step.minutes]
    if step.most_steps is not None:
        allowed.append(step.most_steps * a_step + -(-step.most_steps // step.check_every) * a_look)
    tokens = step.calibrate.samples * step.length if step.teacher != "live" and not shared else 0
    asking = score_seconds(job, job.shape, "transformers", dtype, tokens, step.batch * step.length) if tokens else 0.0
    writing = _writing_seconds(job, step)
    assert asking is not None and writing is not None
    loading = job.imports("transformers") + per_gb("load", 3 * dense_bytes(student))
    return loading + writing + asking + a_look + min(allowed)


def _writing_seconds(job: Job, step: Distill) -> float | None:
    """The teacher's own text, a shard at a time."""
    assert job.shape
    if step.generate is None:
        return 0.0
    prompt, learnt = step.generate.prompt, step.calibrate.samples - step.held_out
    wave = wave_seconds(job, job.shape, "transformers", None, SHARD, prompt, step.length - prompt)
    return None if wave is None else -(-learnt // SHARD) * wave


def _asked_before(job: Job, variant: str, step: Distill) -> bool:
    """Whether an earlier variant keeps the same words of the teacher."""

    def asked(other: Distill) -> tuple[object, ...]:
        shape = (*names_of(other.calibrate.source), other.calibrate.samples, other.length, other.held_out)
        return (*shape, other.temperature, other.teacher, other.generate)

    for name, steps in job.recipe.variants.items():
        if name == variant:
            return False
        if any(isinstance(other, Distill) and asked(other) == asked(step) for other in steps):
            return step.teacher != "live"
    return False
