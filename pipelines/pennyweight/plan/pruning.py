"""What a `prune` step takes, and what is to be gained by it."""

from __future__ import annotations

from pennyweight.plan.constants import ACTIVATION_COPIES, BASELINE_BYTES, COMPARE_SECONDS_PER_LOGIT
from pennyweight.plan.job import Job, per_gb, rate, score_seconds, wave_seconds
from pennyweight.plan.records import StageEstimate
from pennyweight.plan.show import format_bytes
from pennyweight.plan.sizes import ITEMSIZE, ModelShape, dense_bytes
from pennyweight.pruning.config import BATCH_TOKENS, BEAM, SEARCHED, SURVIVORS
from pennyweight.recipe import Prune


def estimate_prune(job: Job, before: ModelShape, after: ModelShape, variant: str, step: Prune) -> StageEstimate:
    """`before` and `after` are the shapes that the step finds and leaves."""
    weights, itemsize = dense_bytes(after), ITEMSIZE[job.compute_dtype(before, "transformers", False)]
    # The model, the probabilities that trials are compared with, and two streams of hidden states as a third is made.
    peak = BASELINE_BYTES["quantize"] + itemsize * before.parameters
    tokens = (SEARCHED + step.held_out) * step.length if step.text else 0
    peak += tokens * before.head[0] * itemsize
    peak += 3 * _fitted_tokens(step) * before.hidden * itemsize
    peak += BATCH_TOKENS * (ACTIVATION_COPIES * before.intermediate + 3 * before.head[0]) * 4
    peak += 3 * 8 * before.intermediate**2 if step.ffn else 5 * 4 * before.intermediate**2 if step.text else 0
    seconds = None
    if job.measured is not None:
        loading = job.imports("transformers") + per_gb("load", 3 * dense_bytes(before))
        seconds = loading + _searching(job, before, step) + _fitting(job, before, step)
    return StageEstimate(
        stage="prune", subject=variant, seconds=seconds, peak_memory_bytes=peak, disk_bytes=weights,
        weight_bytes=weights, notes=[f"{variant}: {step.describe()}: {_gain(job, before, after)}"],
    )  # fmt: skip


def _searching(job: Job, shape: ModelShape, step: Prune) -> float:
    """Half of the blocks and the head for each trial, on a batch that is doubled while fewer trials are left."""
    if not step.layers or step.choose != "kl":
        return 0.0
    batches = max(1, min(SEARCHED, step.samples) * step.length // BATCH_TOKENS)
    later, exchanges = [BEAM * shape.layers] * (step.layers - 1), step.layers * (shape.layers - step.layers)
    measured = sum(_race(count, batches) for count in [shape.layers, *later, exchanges])
    tokens = measured * min(BATCH_TOKENS, SEARCHED * step.length)
    dtype = job.compute_dtype(shape, "transformers", False)
    whole = score_seconds(job, shape, "transformers", dtype, tokens, BATCH_TOKENS)
    assert whole is not None
    return whole / 2 + tokens * shape.head[0] * COMPARE_SECONDS_PER_LOGIT


def _race(trials: int, batches: int) -> int:
    """Batches that a race measures."""
    total, used, left = trials, 1, trials
    while used < batches:
        left, used = -(-left // SURVIVORS), 2 * used
        total += left * used // 2
    return total


def _fitting(job: Job, shape: ModelShape, step: Prune) -> float:
    """Three passes of the text through every block that is fitted, and the moments of its last layer in float32; one
    through those before the first that goes, about half of them."""
    if not (tokens := _fitted_tokens(step)):
        return 0.0
    assert job.measured
    dtype = job.compute_dtype(shape, "transformers", False)
    narrows = bool(step.ffn or step.kv_groups)
    passes = score_seconds(job, shape, "transformers", dtype, (3 if narrows else 2) * tokens, BATCH_TOKENS)
    fitted = shape.layers if narrows else shape.layers // 2
    moments = 2 * tokens * shape.intermediate * (shape.intermediate + shape.hidden) * fitted
    assert passes is not None
    return passes + (2 if step.ffn else 1) * moments / (rate(job, "float32") * 0.5)


def _fitted_tokens(step: Prune) -> int:
    """Tokens that what stays is fitted to, or that its channels and heads are chosen by."""
    if step.text is None or not (step.refit or step.ffn or step.kv_groups):
        return 0
    return (step.samples - step.held_out) * step.length


def _gain(job: Job, before: ModelShape, after: ModelShape) -> str:
    """Parameters and bytes before and after, and how much faster the workload should be at the load that decides."""
    words = (
        f"{before.parameters / 1e6:,.1f} M → {after.parameters / 1e6:,.1f} M parameters, "
        f"{format_bytes(dense_bytes(before))} → {format_bytes(dense_bytes(after))}"
    )
    spec, load = job.recipe.benchmark, job.recipe.benchmark.workload
    factors = []
    for runtime in job.recipe.runtimes.variants:
        waves = [
            wave_seconds(job, shape, runtime, None, spec.decide_at, load.input_tokens, load.output_tokens)
            for shape in (before, after)
        ]
        if None not in waves:
            factors.append(f"{waves[0] / waves[1]:.2f}× on {runtime}")
    return f"{words}; predicted speed {', '.join(factors)}" if factors else words
