"""What is planned for, and the parts that the stages' estimates share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pennyweight import machine
from pennyweight.plan.constants import (
    COMPARE_SECONDS_PER_LOGIT,
    COPIES,
    EFFICIENCY,
    GRAPH_SECONDS,
    IMPORT_SECONDS,
    QUESTION_TOKENS,
    SECONDS_PER_GB,
    TASK_SHAPES,
    UNKNOWN_TASK,
)
from pennyweight.plan.shapes import Shapes
from pennyweight.plan.sizes import ITEMSIZE, ModelShape, ceil_div, dense_bytes, gguf_bytes, onnx_bytes, packed_bytes
from pennyweight.recipe import From, Quantize, Recipe
from pennyweight.records import Measured
from pennyweight.store import Store


@dataclass
class Job:
    """What every estimate needs, and the libraries that earlier stages have loaded."""

    recipe: Recipe
    store: Store
    device: str
    shapes: Shapes
    measured: Measured | None
    imported: set[str] = field(default_factory=set)

    @property
    def shape(self) -> ModelShape | None:
        """The base's; None where it is not known before the download."""
        return self.shapes.of("base")

    def shape_of(self, variant: str, done: int | None = None) -> ModelShape | None:
        """Shape of a variant's weights, unquantized, after its first `done` steps, all by default; None where it is not
        known, or where a step cannot be applied."""
        return self.shapes.of(variant, done)

    def imports(self, *libraries: str) -> float:
        new = set(libraries) - self.imported
        self.imported |= new
        return sum(IMPORT_SECONDS[name] for name in new)

    def compute_dtype(self, shape: ModelShape, runtime: str, quantized: bool) -> str:
        """What a candidate multiplies in, as EFFICIENCY names it."""
        if quantized and runtime != "transformers":
            return "integers"
        if runtime == "onnxruntime":
            return {"cpu": "float32", "cuda": "float16"}[self.device]
        native = self.device == "cuda" or (shape.dtype == "bfloat16" and machine.has_native_bf16())
        return shape.dtype if native else "float32"

    def loaded_bytes(self, shape: ModelShape, runtime: str, step: Quantize | None) -> int:
        """Memory that a loaded candidate's weights take."""
        if runtime in COPIES:
            return int(COPIES[runtime] * exported_bytes(self, shape, runtime, step))
        untied = math.prod(shape.head) if step and step.head != "none" and shape.tied else 0
        return (shape.parameters + untied) * ITEMSIZE[self.compute_dtype(shape, runtime, step is not None)]


def exported_bytes(job: Job, shape: ModelShape, runtime: str, step: Quantize | None) -> int:
    """Tensor bytes of what is exported for a runtime that does not load checkpoints."""
    if runtime == "openvino":
        return gguf_bytes(shape, step)
    return onnx_bytes(shape, step, job.device)


def score_seconds(
    job: Job, shape: ModelShape, runtime: str, dtype: str, tokens: int, batch_tokens: int
) -> float | None:
    """Time to compute the logits of `tokens` tokens in batches of `batch_tokens`."""
    if job.measured is None:
        return None
    efficiency = EFFICIENCY[runtime, dtype]
    products = 2 * tokens * shape.product_weights / (rate(job, dtype) * efficiency.product)
    return products + ceil_div(tokens, max(batch_tokens, 1)) * shape.layers * efficiency.layer_seconds


def compare_seconds(job: Job, tokens: int) -> float | None:
    """Time to rebuild the base's logits from its hidden states and to compare both, position by position."""
    assert job.shape
    if job.measured is None:
        return None
    dtype = job.compute_dtype(job.shape, "transformers", False)
    head = 2 * tokens * math.prod(job.shape.head) / (rate(job, dtype) * 0.5)
    return head + tokens * job.shape.head[0] * COMPARE_SECONDS_PER_LOGIT


def rate(job: Job, dtype: str) -> float:
    """Floating-point operations a second of the measured product that `dtype` is rated against."""
    assert job.measured
    return 1e9 * (job.measured.gflops_bf16 if dtype in ("bfloat16", "float16") else job.measured.gflops_fp32)


def batch_tokens(recipe: Recipe) -> int:
    text = recipe.evaluate.divergence
    return recipe.evaluate.batch_size * (text.length if text else QUESTION_TOKENS)


def divergence_tokens(recipe: Recipe) -> int:
    """Tokens that divergence is measured on."""
    text = recipe.evaluate.divergence
    return text.windows * text.length if text else 0


def generation_seconds(job: Job, shape: ModelShape, runtime: str, step: Quantize | None) -> float | None:
    """Time to continue the suite's prompts, wave by wave, and for the base to read the continuations."""
    spec, batch = job.recipe.evaluate.generation, job.recipe.evaluate.batch_size
    if spec is None:
        return 0.0
    assert job.shape
    dtype = job.compute_dtype(job.shape, "transformers", False)
    wave = wave_seconds(job, shape, runtime, step, min(batch, spec.prompts), spec.input_tokens, spec.output_tokens)
    tokens = spec.prompts * (spec.input_tokens + spec.output_tokens)
    wave_tokens = batch * (spec.input_tokens + spec.output_tokens)
    reading = score_seconds(job, job.shape, "transformers", dtype, tokens, wave_tokens)
    return None if wave is None or reading is None else ceil_div(spec.prompts, batch) * wave + reading


def task_tokens(recipe: Recipe) -> int:
    """Tokens that one candidate scores in the suite's tasks and perplexity texts."""
    total = sum(text.windows * text.length for text in recipe.evaluate.perplexity)
    for ref in recipe.evaluate.tasks:
        items, requests, tokens = TASK_SHAPES.get(ref.task, UNKNOWN_TASK)
        total += min(ref.limit or items, items) * requests * tokens
    return total


def step_of(recipe: Recipe, variant: str) -> Quantize | None:
    """What a variant's weights are quantized by; None for the base."""
    return next((step for step in recipe.variants.get(variant, []) if isinstance(step, Quantize)), None)


def rounds_its_start(recipe: Recipe, variant: str) -> bool:
    """What a variant quantizes is the base that it starts from, unchanged."""
    first = next(step for step in recipe.variants[variant] if not isinstance(step, From))
    return isinstance(first, Quantize)


def per_gb(work: str, size: int) -> float:
    return SECONDS_PER_GB[work] * size / 1e9


def wave_seconds(
    job: Job,
    shape: ModelShape,
    runtime: str,
    step: Quantize | None,
    concurrency: int,
    input_tokens: int,
    output_tokens: int,
) -> float | None:
    """One wave of requests served together: the prompts, then one step for each further token."""
    if job.measured is None:
        return None
    dtype = job.compute_dtype(shape, runtime, step is not None)
    efficiency = EFFICIENCY[runtime, dtype]
    calls = shape.layers * efficiency.layer_seconds
    token = 2 * concurrency * shape.product_weights / rate(job, dtype)  # one token of each request
    streamed = _streamed_bytes(job, shape, runtime, step) / (job.measured.read_gb_per_s * 1e9 * efficiency.read)
    prefill = input_tokens * token / efficiency.prefill + calls
    return prefill + (output_tokens - 1) * (streamed + token / efficiency.decode + calls)


def _streamed_bytes(job: Job, shape: ModelShape, runtime: str, step: Quantize | None) -> int:
    """Bytes of weights that a decoding step reads: all but the embedding, of which it reads one row a request."""
    exported = runtime != "transformers"
    weights = exported_bytes(job, shape, runtime, step) if exported else job.loaded_bytes(shape, runtime, step)
    itemsize = 4 if runtime == "onnxruntime" and job.device == "cpu" else ITEMSIZE[shape.dtype]
    separate = not shape.tied or (step is not None and step.head != "none")
    return weights - (math.prod(shape.head) * itemsize if separate else 0)


def load_seconds(runtime: str, size: int, graphs: int = 1) -> float:
    """Time until a runtime has loaded a candidate of `size` bytes in memory, and made that many graphs of it."""
    return per_gb("load", size) + graphs * GRAPH_SECONDS.get(runtime, 0.0)


def candidate_bytes(job: Job, variant: str, runtime: str) -> int:
    shape, step = job.shape_of(variant), step_of(job.recipe, variant)
    if shape is None:
        return 0
    if runtime != "transformers":
        return exported_bytes(job, shape, runtime, step)
    return packed_bytes(shape, step) if step else dense_bytes(shape)
