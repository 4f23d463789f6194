"""What a `quantize` step takes."""

from __future__ import annotations

from pennyweight.plan.constants import (
    ACTIVATION_COPIES,
    BASELINE_BYTES,
    CALIBRATION_BATCH,
    COMPARE_SECONDS_PER_LOGIT,
    GPTQ_SECONDS_PER_WEIGHT,
    IMPORT_SECONDS,
    PACKING_BYTES,
    SEARCH_SECONDS_PER_WEIGHT,
    TRAINING_EFFICIENCY,
)
from pennyweight.plan.job import Job, per_gb, score_seconds
from pennyweight.plan.records import StageEstimate
from pennyweight.plan.sizes import ITEMSIZE, ModelShape, dense_bytes, packed_bytes, quantized_layers
from pennyweight.quantization.allocation.sensitivity import BATCH_TOKENS
from pennyweight.quantization.awq import EXPONENTS
from pennyweight.recipe import Quantize


def estimate_quantize(job: Job, shape: ModelShape, variant: str, step: Quantize) -> StageEstimate:
    weights = packed_bytes(shape, step)
    library = {"llm-compressor": ["llmcompressor"], "auto-round": ["auto-round"]}.get(step.maker, [])
    rounding = job.imports("transformers", *library) + per_gb("round", dense_bytes(shape)) + _reload_seconds(shape)
    calibrated = step.calibrate and (step.scheme, step.method) != ("auto", "rtn")
    solving = _calibration_seconds(job, shape, step) if calibrated else 0.0
    if step.scheme == "auto":
        searching = _allocation_seconds(job, shape, step)
        solving = None if solving is None or searching is None else solving + searching
    return StageEstimate(
        stage="quantize", subject=variant, seconds=None if solving is None else rounding + solving,
        peak_memory_bytes=_quantize_memory(shape, step, weights), disk_bytes=weights, weight_bytes=weights,
        notes=[step.describe()],
    )  # fmt: skip


def _reload_seconds(shape: ModelShape) -> float:
    """The fresh process that loads what was written."""
    return IMPORT_SECONDS["transformers"] + per_gb("load", dense_bytes(shape))


def _calibration_seconds(job: Job, shape: ModelShape, step: Quantize) -> float | None:
    """Two passes of the calibration text, and what the method makes of it."""
    assert step.calibrate
    if job.measured is None:
        return None
    tokens = step.calibrate.samples * step.calibrate.length
    dtype = job.compute_dtype(shape, "transformers", False)
    forward = 2 * score_seconds(job, shape, "transformers", dtype, tokens, CALIBRATION_BATCH * step.calibrate.length)
    layers = [shape.linears[name] for name in quantized_layers(shape, step) if name in shape.linears]
    return forward + _solving_seconds(job, step, layers, tokens)


def _allocation_seconds(job: Job, shape: ModelShape, step: Quantize) -> float | None:
    """Forward and back through the sensitivity's windows, and a product more for each choice; then the trials."""
    assert step.calibrate
    if job.measured is None:
        return None
    length, dtype = step.calibrate.length, job.compute_dtype(shape, "transformers", False)
    choices = len(step.choices) * len(step.candidate_sizes)
    passes = (2 + choices) * step.search.windows * length
    looked = (choices + 1 + step.search.trials) * step.search.held_out * length
    scoring = score_seconds(job, shape, "transformers", dtype, passes + looked, step.search.held_out * length)
    return scoring + looked * shape.head[0] * COMPARE_SECONDS_PER_LOGIT


def _allocation_memory(shape: ModelShape, step: Quantize) -> int:
    """The weights a second time, rounded; then the base's probabilities, or activations kept for the way back."""
    assert step.calibrate
    probabilities = 4 * step.search.held_out * step.calibrate.length * shape.head[0]
    back = 4 * BATCH_TOKENS * shape.layers * ACTIVATION_COPIES * shape.intermediate
    return 4 * shape.parameters + probabilities + back


def _solving_seconds(job: Job, step: Quantize, layers: list[tuple[int, int]], tokens: int) -> float:
    """gptq and awq gather Σ x xᵀ of each layer's input (2 · tokens · in²) and search scales. gptq then goes column by
    column; awq tries its exponents, each with a search and a product (2 · out · in²). autoround trains in float32:
    forward, and twice that backward, for a batch in each of its steps."""
    assert job.measured and step.calibrate
    fp32 = job.measured.gflops_fp32 * 1e9
    weights = sum(rows * columns for rows, columns in layers)
    moments = sum(2 * tokens * columns**2 for _, columns in layers) / fp32
    search = weights * SEARCH_SECONDS_PER_WEIGHT
    if step.method == "gptq":
        return moments + search + weights * GPTQ_SECONDS_PER_WEIGHT
    if step.method == "awq":
        products = sum(2 * rows * columns**2 for rows, columns in layers) / fp32
        return moments + search + len(EXPONENTS) * (search + products)
    if step.method == "autoround":
        learnt = step.iterations * min(CALIBRATION_BATCH, step.calibrate.samples) * step.calibrate.length
        return 3 * 2 * weights * learnt / (fp32 * TRAINING_EFFICIENCY["float32"])
    return 0.0


def _quantize_memory(shape: ModelShape, step: Quantize, weights: int) -> int:
    """The model and, later, its packed form, and a fresh process that loads it; before that, the calibration."""
    itemsize = ITEMSIZE[shape.dtype]
    dense = dense_bytes(shape) if step.maker == "pennyweight" else 4 * shape.parameters  # others work in float32
    packing = weights // 2 + PACKING_BYTES["quantize"] * largest_layer(shape, step)
    calibrating = 0
    if step.calibrate:
        batch = CALIBRATION_BATCH * step.calibrate.length
        tokens = step.calibrate.samples * step.calibrate.length
        calibrating = 2 * tokens * shape.hidden * itemsize  # inputs and outputs of the layer at work
        calibrating += batch * (shape.head[0] * itemsize + ACTIVATION_COPIES * shape.intermediate * itemsize)
        calibrating += 3 * 4 * shape.intermediate**2  # a Hessian and its factors
    reloading = BASELINE_BYTES["evaluate"] + dense
    allocating = _allocation_memory(shape, step) if step.scheme == "auto" else 0
    return BASELINE_BYTES["quantize"] + dense + max(packing, calibrating, reloading, allocating)


def largest_layer(shape: ModelShape, step: Quantize | None) -> int:
    """Weights of the largest layer that a step quantizes."""
    layers = quantized_layers(shape, step) if step else {}
    return max((rows * columns for rows, columns, _ in layers.values()), default=0)
