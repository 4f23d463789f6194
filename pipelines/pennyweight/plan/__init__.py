"""The preflight: sizes, memory, time, disk and downloads of every stage, and what cannot work, before any of it runs.

Sizes follow from the model's shapes and are exact; memory and time are estimates from the constants below and this
machine's measured speed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pennyweight import machine
from pennyweight.errors import SourceError, StoreError, did_you_mean
from pennyweight.machine import Measured
from pennyweight.plan.records import Plan, PlanProblem, StageEstimate
from pennyweight.plan.show import format_bytes, format_plan, format_seconds
from pennyweight.plan.sizes import (
    ITEMSIZE,
    ModelShape,
    ceil_div,
    dense_bytes,
    is_ignored,
    model_shape,
    onnx_bytes,
    packed_bytes,
    quantized_layers,
)
from pennyweight.recipe import Base, Quantize, Recipe
from pennyweight.store import RECORD, Store

__all__ = ["Plan", "PlanProblem", "format_bytes", "format_plan", "format_seconds", "make_plan"]

MB = 10**6

# --- constants, measured on two-core machines with SmolLM2-135M -------------------------------------------------------

#: Seconds until a library can be used, paid once a process.
IMPORT_SECONDS = {"transformers": 6.0, "llmcompressor": 3.0, "onnxruntime": 1.0, "lm-eval": 4.0, "mlflow": 4.0}
#: Seconds that the ONNX builder's own process takes before it touches the model.
BUILDER_SECONDS = 9.0
#: Seconds for a gigabyte of weights, read and written together, by what is done to them. `repack` comes on top of
#: `export` where integers are rewritten for the builder and compared with the file afterwards.
SECONDS_PER_GB = {"convert": 20.0, "round": 15.0, "export": 4.0, "repack": 20.0, "load": 1.5, "copy": 2.0}
#: Bytes a second from the network; a guess, and the plan says so.
DOWNLOAD_BYTES_PER_SECOND = 10e6
#: Seconds of GPTQ's solve for each weight; its inner loop runs column by column.
GPTQ_SECONDS_PER_WEIGHT = 3.2e-7
#: Seconds to compare one logit with the base's: two softmaxes and the divergence.
COMPARE_SECONDS_PER_LOGIT = 2.5e-9
#: Seconds to cut a text into windows of tokens.
WINDOWS_SECONDS = 2.0
#: Seconds to create MLflow's database and to log a run, beyond the copy of the winner's files.
TRACK_SECONDS = 12.0

#: Resident memory of this process once the libraries of a stage are loaded, without any weights.
BASELINE_BYTES = {
    "source": 500 * MB,
    "data": 500 * MB,
    "quantize": 900 * MB,
    "export": 1300 * MB,
    "reference": 900 * MB,
    "evaluate": 900 * MB,
    "benchmark": 900 * MB,
    "track": 900 * MB,
}
#: The same for the ONNX builder's own process.
BUILDER_BYTES = 340 * MB
#: Bytes for each weight of the largest quantized layer, at the moment when its integers are packed or repacked.
PACKING_BYTES = {"quantize": 16, "export": 36}
#: onnxruntime's memory for each byte of weights; some are kept a second time, rearranged for its kernels.
ONNX_COPIES = 1.2
#: Activations alive at once, in units of (tokens, intermediate size).
ACTIVATION_COPIES = 12
#: Tokens that an export's parity check scores, and those of one question with one answer.
PARITY_TOKENS = 1024
QUESTION_TOKENS = 40
#: Sequences that gptq calibrates on together.
CALIBRATION_BATCH = 8
#: Shape of the wave that warms a candidate up before those that are counted: tokens in, at most, and out.
WARM_UP = (16, 2)


@dataclass(frozen=True)
class Efficiency:
    """How much of the machine's measured speed a runtime turns into tokens."""

    product: float
    """Fraction of the measured matrix-product rate while scoring."""
    prefill: float
    """The same while reading a wave's prompts."""
    decode: float
    """The same in one decoding step of many requests, where products are thin."""
    read: float
    """Fraction of the measured read speed at which a decoding step streams the weights."""
    layer_seconds: float
    """Time of one layer's calls that no speed changes, for each forward pass."""


#: (runtime, what it multiplies in) → its efficiency; `integers` are rated against float32, float16 against bfloat16.
EFFICIENCY = {
    ("transformers", "float32"): Efficiency(0.60, 0.60, 0.58, 0.80, 9.0e-4),
    ("transformers", "bfloat16"): Efficiency(0.40, 0.30, 0.15, 0.60, 1.4e-3),
    ("transformers", "float16"): Efficiency(0.30, 0.30, 0.15, 0.60, 1.4e-3),
    ("onnxruntime", "float32"): Efficiency(0.70, 0.45, 0.42, 0.58, 1.0e-4),
    ("onnxruntime", "float16"): Efficiency(0.40, 0.30, 0.15, 0.58, 1.0e-4),
    ("onnxruntime", "integers"): Efficiency(0.80, 0.50, 0.40, 0.42, 1.0e-4),
}

#: Task → (items, requests an item, tokens a request), counted on the shipped data with a 49,152-word vocabulary.
TASK_SHAPES = {"piqa": (1500, 2, 28), "openbookqa": (500, 4, 18), "commonsense_qa_cloze": (1221, 5, 22)}
#: The same for a task that is not in the table.
UNKNOWN_TASK = (1000, 4, 40)


# --- the plan ---------------------------------------------------------------------------------------------------------


def make_plan(recipe: Recipe, store: Store, *, file: str | None = None) -> Plan:
    """Estimate every stage of a run on this machine, and find what cannot work. Downloads no weights and no data.

    `file` is how the problems name the recipe; its name by default. Faults are in `Plan.problems`, not raised.
    """
    device = machine.resolve_device(recipe.device)
    found = _Problems(file or recipe.name)
    measured = measured_speed(store, device)
    config, notes = _base_config(recipe, store, found)
    shape = _shape(recipe, config, found)
    missing = _check_machine(recipe, device, found)
    if shape:
        _check_steps(recipe, shape, found)
        _check_lengths(recipe, shape, found)
    notes += _notes(device, measured)
    job = _Job(recipe, store, device, shape, measured)
    stages = [] if found.of_kind("recipe") and shape is None else _stages(job)
    plan = Plan(
        name=recipe.name,
        device=device,
        stages=stages,
        problems=found.found,
        missing_extras=missing,
        measured=measured,
        free_disk_bytes=machine.free_disk_bytes(store.root),
        available_memory_bytes=machine.available_memory_bytes(),
        notes=notes,
    )
    _check_room(plan, store, found)
    return plan.model_copy(update={"problems": found.found})


def _notes(device: str, measured: Measured | None) -> list[str]:
    notes = [f"downloads are taken to run at {DOWNLOAD_BYTES_PER_SECOND / 1e6:.0f} MB/s"]
    if measured is None:
        notes.append("times are unknown: there is no GPU to measure")
    elif device == "cuda":
        notes.append("times on a GPU are rough: the estimates were calibrated on CPUs")
    return notes


def measured_speed(store: Store, device: str) -> Measured | None:
    """This machine's speed, measured once a day and kept in the store; None for a GPU that is not there."""
    if device == "cuda" and not machine.has_gpu():
        return None
    inputs = {
        "machine": machine.fingerprint(),
        "threads": machine.threads(),
        "device": device,
        "day": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    try:
        entry = store.get_or_build("measure", inputs, lambda _: machine.measure(device=device).model_dump(mode="json"))
    except StoreError:
        return machine.measure(device=device)  # a store that cannot be written is reported with the other problems
    return Measured.model_validate(entry.record)


def _base_config(recipe: Recipe, store: Store, found: _Problems) -> tuple[dict[str, Any] | None, list[str]]:
    """The base's config where it can be had before the download, and notes on why not."""
    from pennyweight import sources

    unknown = "sizes, memory and times are unknown until the base's config can be read"
    try:
        config = sources.base_config(recipe.base, store)
    except SourceError as error:
        if sources.scheme_of(recipe.base.uri) == "file":
            found.add("base", error.message, error.hint)
            return None, []
        return None, [error.message, unknown]
    return config, [] if config else [unknown]


def _shape(recipe: Recipe, config: dict[str, Any] | None, found: _Problems) -> ModelShape | None:
    if config is None:
        return None
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        hint = "start from the model that it was quantized from"
        found.add("base", f"the base is quantized already, in {method} format", hint)
        return None
    try:
        return model_shape(config, base_dtype(recipe, config))
    except (ValueError, KeyError, AttributeError) as error:
        if not recipe.base.trust_remote_code:
            reason = str(error).strip("'").splitlines()[0][:160]
            known = f"transformers {machine.installed_version('transformers')} knows no decoder of this kind"
            found.add("base", f"model type {config.get('model_type')!r}: {reason}", known)
        return None


def base_dtype(recipe: Recipe, config: dict[str, Any]) -> str:
    """dtype that the base's checkpoint is stored in: the recipe's, else bfloat16 for a GGUF file, else the config's."""
    if recipe.base.dtype != "auto":
        return recipe.base.dtype
    if recipe.base.uri.endswith(".gguf"):
        return "bfloat16"
    stated = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return stated if stated in ITEMSIZE else "float32"


# --- what cannot work -------------------------------------------------------------------------------------------------


@dataclass
class _Problems:
    file: str
    found: list[PlanProblem] = field(default_factory=list)

    def add(self, path: str, message: str, hint: str | None = None, kind: Any = "recipe") -> None:
        self.found.append(PlanProblem(self.file, path, message, None, hint, kind))

    def of_kind(self, kind: str) -> bool:
        return any(problem.kind == kind for problem in self.found)


def _check_machine(recipe: Recipe, device: str, found: _Problems) -> list[str]:
    """Extras that are missing; each also becomes a problem."""
    if device == "cuda" and not machine.has_gpu():
        found.add("device", "device is cuda, and this machine has no NVIDIA GPU", "--set device=cpu", "machine")
    for message in machine.conflicts():
        found.add("", message, None, "machine")
    extras: list[str] = []
    for runtime in sorted({*recipe.runtimes.base, *recipe.runtimes.variants}):
        if missing := machine.missing_packages(runtime, device):
            extra = "gpu" if device == "cuda" else "cpu"
            extras = [extra]
            hint = f"pip install 'pennyweight[{extra}]'"
            found.add("runtimes", f"runtime {runtime} needs {', '.join(missing)}", hint, "machine")
    return extras


def _check_steps(recipe: Recipe, shape: ModelShape, found: _Problems) -> None:
    exported = "onnxruntime" in recipe.runtimes.variants
    for variant, steps in recipe.variants.items():
        for index, step in enumerate(steps):
            path = f"variants.{variant}.{index}.quantize"
            if index:
                found.add(path, "the step before it has quantized these weights already", "keep one of the two")
                continue
            _check_ignore(path, step, shape, found)
            layers = quantized_layers(shape, step)
            if layers:
                _check_groups(path, step, layers, exported, found)
            else:
                found.add(path, "quantizes no layer of this model", "shorten `ignore`")


def _check_ignore(path: str, step: Quantize, shape: ModelShape, found: _Problems) -> None:
    names = [*shape.linears, shape.head_name]
    for index, pattern in enumerate(step.ignore):
        if not any(is_ignored(name, [pattern]) for name in names):
            hint = f"a layer here is called {names[0]}" if pattern.startswith("re:") else did_you_mean(pattern, names)
            found.add(f"{path}.ignore.{index}", f"{pattern!r} matches no layer", hint)


def _check_groups(
    path: str, step: Quantize, layers: dict[str, tuple[int, int, int]], exported: bool, found: _Problems
) -> None:
    size = step.group_size
    choices = group_sizes([columns for _, columns, _ in layers.values()], exported)
    hint = "leave those layers alone with `ignore`"
    if choices:
        hint = f"these sizes would do: {', '.join(map(str, choices))}"
    wrong = [name for name, (_, columns, _) in layers.items() if columns % size]
    if wrong:
        columns = layers[wrong[0]][1]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        found.add(f"{path}.group_size", f"{size} does not divide {columns}, the input size of {wrong[0]}{more}", hint)
    elif exported and (size < 16 or size & (size - 1)):
        found.add(f"{path}.group_size", f"onnxruntime has no groups of {size}: powers of two from 16 on", hint)


def group_sizes(inputs: list[int], exported: bool) -> list[int]:
    """Powers of two that divide every layer's input size, from 8 on (16 for onnxruntime) to 1024."""
    common, smallest = math.gcd(*inputs), 16 if exported else 8
    return [size for size in (8, 16, 32, 64, 128, 256, 512, 1024) if size >= smallest and common % size == 0]


def _check_lengths(recipe: Recipe, shape: ModelShape, found: _Problems) -> None:
    limit = f"the model knows {shape.context} positions"
    for variant, steps in recipe.variants.items():
        for index, step in enumerate(steps):
            if step.calibrate and step.calibrate.length > shape.context:
                path = f"variants.{variant}.{index}.quantize.calibrate.length"
                found.add(path, f"windows of {step.calibrate.length} tokens; {limit}")
    text = recipe.evaluate.divergence
    if text and text.length > shape.context:
        found.add("evaluate", f"divergence windows of {text.length} tokens; {limit}")
    load = recipe.benchmark.workload
    if load.input_tokens + load.output_tokens > shape.context:
        found.add("benchmark.workload", f"{load.input_tokens} + {load.output_tokens} tokens a request; {limit}")


def _check_room(plan: Plan, store: Store, found: _Problems) -> None:
    try:
        store.check_writable()
    except StoreError as error:
        found.add("", error.message, error.hint, "resource")
    if plan.disk_bytes > plan.free_disk_bytes:
        need, free = format_bytes(plan.disk_bytes), format_bytes(plan.free_disk_bytes)
        hint = "free some, or `pennyweight store gc`, or name a folder on another disk in PENNYWEIGHT_HOME"
        found.add("", f"a run needs {need} of disk; {free} are free at {store.root}", hint, "resource")
    work = [stage for stage in plan.stages if stage.peak_memory_bytes is not None and not stage.reused]
    _check_memory({_title(s): s.peak_memory_bytes for s in work}, plan.available_memory_bytes, "memory", found)
    if plan.device == "cuda" and machine.has_gpu():
        on_gpu = {_title(s): s.peak_memory_bytes - BASELINE_BYTES[s.stage] for s in work}
        largest = max(gpu["memory_gib"] for gpu in machine.gpus())
        _check_memory(on_gpu, int(largest * 2**30), "GPU memory", found)


def _check_memory(needs: dict[str, int], free: int, kind: str, found: _Problems) -> None:
    worst = max(needs, key=needs.__getitem__, default=None)
    if worst is not None and needs[worst] > free:
        message = f"{worst} needs about {format_bytes(needs[worst])} of {kind}; {format_bytes(free)} are free"
        found.add("", message, "free some, take a smaller base, or a machine with more", "resource")


def _title(stage: StageEstimate) -> str:
    return f"{stage.stage} {stage.subject}"


# --- the stages -------------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """What every estimate needs, and the libraries that earlier stages have loaded."""

    recipe: Recipe
    store: Store
    device: str
    shape: ModelShape | None
    measured: Measured | None
    imported: set[str] = field(default_factory=set)

    def imports(self, *libraries: str) -> float:
        new = set(libraries) - self.imported
        self.imported |= new
        return sum(IMPORT_SECONDS[name] for name in new)

    def compute_dtype(self, runtime: str, quantized: bool) -> str:
        """What a candidate multiplies in, as EFFICIENCY names it."""
        if runtime == "onnxruntime":
            return "integers" if quantized else {"cpu": "float32", "cuda": "float16"}[self.device]
        assert self.shape
        native = self.device == "cuda" or (self.shape.dtype == "bfloat16" and machine.has_native_bf16())
        return self.shape.dtype if native else "float32"

    def loaded_bytes(self, runtime: str, step: Quantize | None) -> int:
        """Memory that a loaded candidate's weights take."""
        assert self.shape
        if runtime == "onnxruntime":
            return int(ONNX_COPIES * onnx_bytes(self.shape, step, self.device))
        untied = math.prod(self.shape.head) if step and step.head != "none" and self.shape.tied else 0
        return (self.shape.parameters + untied) * ITEMSIZE[self.compute_dtype(runtime, step is not None)]


def _stages(job: _Job) -> list[StageEstimate]:
    return [
        _source(job),
        *_data(job),
        *_quantize(job),
        *_exports(job),
        _reference(job),
        *_evaluations(job),
        _benchmark(job),
        _track(job),
    ]


def _source(job: _Job) -> StageEstimate:
    shape, base = job.shape, job.recipe.base
    reused = _in_store(job.store, "source", base.uri)
    download = 0 if reused else _base_download(job)
    weights = disk = dense_bytes(shape) if shape else None
    seconds = peak = None
    if shape and weights is not None:
        fetching = (download or 0) / DOWNLOAD_BYTES_PER_SECOND
        seconds = fetching + job.imports("transformers") + _per_gb("convert", weights)
        # A GGUF file is unpacked to float32 before it is cast.
        unpacked = 4 * shape.parameters if base.uri.endswith(".gguf") else 0
        peak = BASELINE_BYTES["source"] + weights + unpacked
        if _stays_in_place(base):
            disk, seconds, peak = 0, 1.0 + _per_gb("copy", weights), BASELINE_BYTES["source"]  # only its digest is read
    return StageEstimate(
        stage="source", subject="base", seconds=0.0 if reused else seconds, peak_memory_bytes=peak,
        disk_bytes=disk, download_bytes=download, weight_bytes=weights, reused=reused,
    )  # fmt: skip


def _base_download(job: _Job) -> int | None:
    """Bytes that fetching the base takes: the checkpoint from a hub, an archive's own size; None where unknown."""
    from pennyweight import sources

    uri = job.recipe.base.uri
    scheme = sources.scheme_of(uri)
    if scheme == "hf":
        return dense_bytes(job.shape) if job.shape else None
    return sources.known_bases().get(uri, {}).get("archive_bytes") if scheme == "pypi" else 0


def _stays_in_place(base: Base) -> bool:
    """A folder is used where it lies, unless it must be cast."""
    from pennyweight import sources

    return sources.scheme_of(base.uri) == "file" and not base.uri.endswith(".gguf") and base.dtype == "auto"


def _data(job: _Job) -> Iterator[StageEstimate]:
    """The data sets, and their windows of tokens. What lies in one archive is downloaded once."""
    sets = job.recipe.data
    absent = {name: data for name, data in sets.items() if not _in_store(job.store, "data", data.uri)}
    archives = {data.archive_sha256 or data.uri: data for data in absent.values() if not data.uri.startswith("file:")}
    sizes = [data.bytes for data in archives.values()]
    known = sum(size or 0 for size in sizes)
    yield StageEstimate(
        stage="data", subject=", ".join(sets) or "none",
        seconds=known / DOWNLOAD_BYTES_PER_SECOND + len(absent), peak_memory_bytes=BASELINE_BYTES["data"],
        disk_bytes=known, download_bytes=None if None in sizes else known, reused=bool(sets) and not absent,
    )  # fmt: skip
    yield StageEstimate(
        stage="data", subject="token windows", seconds=job.imports("transformers") + WINDOWS_SECONDS,
        peak_memory_bytes=BASELINE_BYTES["data"], disk_bytes=MB,
    )  # fmt: skip


def _quantize(job: _Job) -> Iterator[StageEstimate]:
    for variant, steps in job.recipe.variants.items():
        step, shape = steps[-1], job.shape
        if shape is None:
            yield _unknown("quantize", variant)
            continue
        weights = packed_bytes(shape, step)
        rounding = _per_gb("round", dense_bytes(shape))
        solving = _gptq_seconds(job, step) if step.method == "gptq" else 0.0
        yield StageEstimate(
            stage="quantize", subject=variant,
            seconds=None if solving is None else job.imports("transformers", "llmcompressor") + rounding + solving,
            peak_memory_bytes=_quantize_memory(shape, step, weights), disk_bytes=weights, weight_bytes=weights,
            notes=[step.describe()],
        )  # fmt: skip


def _gptq_seconds(job: _Job, step: Quantize) -> float | None:
    """Two passes of the calibration text, a Hessian for each layer's input (2 · tokens · in²), and the solve."""
    assert job.shape and step.calibrate
    if job.measured is None:
        return None
    tokens = step.calibrate.samples * step.calibrate.length
    dtype = job.compute_dtype("transformers", False)
    layers = [job.shape.linears[name] for name in quantized_layers(job.shape, step) if name in job.shape.linears]
    hessians = sum(2 * tokens * columns**2 for _, columns in layers)
    forward = 2 * _score_seconds(job, "transformers", dtype, tokens, CALIBRATION_BATCH * step.calibrate.length)
    hessian = hessians / (job.measured.gflops_fp32 * 1e9)
    solve = sum(rows * columns for rows, columns in layers) * GPTQ_SECONDS_PER_WEIGHT
    return forward + hessian + solve


def _quantize_memory(shape: ModelShape, step: Quantize, weights: int) -> int:
    """The model and, later, its packed form; before that, gptq's calibration."""
    itemsize, dense = ITEMSIZE[shape.dtype], dense_bytes(shape)
    packing = weights // 2 + PACKING_BYTES["quantize"] * _largest(shape, step)
    calibrating = 0
    if step.calibrate:
        batch = CALIBRATION_BATCH * step.calibrate.length
        tokens = step.calibrate.samples * step.calibrate.length
        calibrating = 2 * tokens * shape.hidden * itemsize  # inputs and outputs of the layer at work
        calibrating += batch * (shape.head[0] * itemsize + ACTIVATION_COPIES * shape.intermediate * itemsize)
        calibrating += 3 * 4 * shape.intermediate**2  # a Hessian and its factors
    return BASELINE_BYTES["quantize"] + dense + max(packing, calibrating)


def _largest(shape: ModelShape, step: Quantize | None) -> int:
    """Weights of the largest layer that a step quantizes."""
    layers = quantized_layers(shape, step) if step else {}
    return max((rows * columns for rows, columns, _ in layers.values()), default=0)


def _exports(job: _Job) -> Iterator[StageEstimate]:
    for variant, runtime in job.recipe.candidates():
        if runtime != "onnxruntime":
            continue
        subject, step = f"{variant}@{runtime}", _step_of(job.recipe, variant)
        if job.shape is None:
            yield _unknown("export", subject)
            continue
        source = packed_bytes(job.shape, step) if step else dense_bytes(job.shape)
        weights = onnx_bytes(job.shape, step, job.device)
        scoring = [
            _score_seconds(job, "transformers", job.compute_dtype("transformers", False), PARITY_TOKENS, PARITY_TOKENS),
            _score_seconds(job, runtime, job.compute_dtype(runtime, step is not None), PARITY_TOKENS, PARITY_TOKENS),
        ]
        seconds = None
        if None not in scoring:
            building = BUILDER_SECONDS + _per_gb("export", source + weights) + _per_gb("load", source + weights)
            building += _per_gb("repack", source + weights) if step else 0.0
            seconds = job.imports("transformers", runtime) + building + sum(scoring)
        yield StageEstimate(
            stage="export", subject=subject, seconds=seconds, disk_bytes=weights, weight_bytes=weights,
            peak_memory_bytes=_export_memory(job, step, source, weights),
        )  # fmt: skip


def _export_memory(job: _Job, step: Quantize | None, source: int, weights: int) -> int:
    """Beside this process, the builder's: the checkpoint, the file, and the largest layer while it is repacked. After
    it, the parity check: the checkpoint in float32 and its logits."""
    assert job.shape
    building = BUILDER_BYTES + source + weights + PACKING_BYTES["export"] * _largest(job.shape, step)
    checking = 4 * job.shape.parameters + 3 * 4 * PARITY_TOKENS * job.shape.head[0]
    return BASELINE_BYTES["export"] + max(building, checking)


def _reference(job: _Job) -> StageEstimate:
    """The base's hidden states on the text, kept with its head, and its answers."""
    subject = "base@transformers"
    if job.shape is None:
        return _unknown("reference", subject)
    dtype, batch, windows = job.compute_dtype("transformers", False), _batch_tokens(job.recipe), _windows(job.recipe)
    scoring = _score_seconds(job, "transformers", dtype, windows + _task_tokens(job.recipe), batch)
    weights, stored = job.loaded_bytes("transformers", None), _reference_bytes(job, windows)
    loading = _suite_imports(job, "transformers") + _per_gb("load", weights)
    questions = job.recipe.evaluate.batch_size * QUESTION_TOKENS * job.shape.head[0] * ITEMSIZE[dtype]
    activations = batch * ACTIVATION_COPIES * job.shape.intermediate * ITEMSIZE[dtype]
    return StageEstimate(
        stage="reference", subject=subject, seconds=None if scoring is None else loading + scoring,
        peak_memory_bytes=BASELINE_BYTES["reference"] + weights + stored + max(questions, activations),
        disk_bytes=stored,
    )  # fmt: skip


def _evaluations(job: _Job) -> Iterator[StageEstimate]:
    windows = _windows(job.recipe)
    for variant, runtime in job.recipe.candidates():
        subject, step = f"{variant}@{runtime}", _step_of(job.recipe, variant)
        if job.shape is None:
            yield _unknown("evaluate", subject)
            continue
        seconds = _compare_seconds(job, windows)
        peak = BASELINE_BYTES["evaluate"] + _reference_bytes(job, windows)
        if subject != "base@transformers":  # that one is the reference, and only compared with itself
            dtype, weights = job.compute_dtype(runtime, step is not None), job.loaded_bytes(runtime, step)
            tokens, batch = windows + _task_tokens(job.recipe), _batch_tokens(job.recipe)
            scoring = _score_seconds(job, runtime, dtype, tokens, batch)
            loading = _suite_imports(job, runtime) + _per_gb("load", weights)
            seconds = None if seconds is None or scoring is None else seconds + scoring + loading
            widest = job.shape.head[0] + ACTIVATION_COPIES * job.shape.intermediate
            peak += weights + batch * widest * ITEMSIZE.get(dtype, 4)
        yield StageEstimate(stage="evaluate", subject=subject, seconds=seconds, peak_memory_bytes=peak, disk_bytes=MB)


def _suite_imports(job: _Job, runtime: str) -> float:
    return job.imports("transformers", runtime, *(["lm-eval"] if job.recipe.evaluate.tasks else []))


def _reference_bytes(job: _Job, windows: int) -> int:
    """Hidden states of that many tokens, and the head."""
    assert job.shape
    return (windows * job.shape.hidden + math.prod(job.shape.head)) * ITEMSIZE[job.shape.dtype] if windows else 0


def _benchmark(job: _Job) -> StageEstimate:
    from pennyweight.benchmark import rounds_at

    spec, subject = job.recipe.benchmark, "all candidates"
    if job.shape is None:
        return _unknown("benchmark", subject)
    seconds: float | None = job.imports("transformers", *job.recipe.runtimes.base, *job.recipe.runtimes.variants)
    names = list(job.recipe.candidates())
    load, requests = spec.workload, max(spec.concurrency)
    for variant, runtime in names:
        step = _step_of(job.recipe, variant)
        for concurrency in spec.concurrency:
            wave = _wave_seconds(job, runtime, step, concurrency, load.input_tokens, load.output_tokens)
            warm_up = _wave_seconds(job, runtime, step, concurrency, min(WARM_UP[0], load.input_tokens), WARM_UP[1])
            seconds = (
                None if None in (seconds, wave, warm_up) else seconds + rounds_at(spec, concurrency) * wave + warm_up
            )
    loaded = [job.loaded_bytes(runtime, _step_of(job.recipe, variant)) for variant, runtime in names]
    turns = sum(1 + rounds_at(spec, concurrency) for concurrency in spec.concurrency)
    resident = _stay_loaded(job, names)
    loading = _per_gb("load", sum(loaded) * (1 if resident else turns))
    cache = 2 * requests * (load.input_tokens + load.output_tokens) * job.shape.kv_bytes(4)
    logits = 4 * requests * load.input_tokens * job.shape.head[0]  # onnxruntime computes all of a prompt's
    return StageEstimate(
        stage="benchmark", subject=subject, seconds=None if seconds is None else seconds + loading, disk_bytes=0,
        peak_memory_bytes=BASELINE_BYTES["benchmark"] + (sum(loaded) if resident else max(loaded)) + cache + logits,
        notes=[] if resident else ["benchmark: too little memory to keep all candidates loaded; loaded in turn"],
    )  # fmt: skip


def _stay_loaded(job: _Job, names: list[tuple[str, str]]) -> bool:
    """The benchmark's own rule for keeping all candidates loaded between their turns."""
    from pennyweight.benchmark import LOADED_OVER_DISK, RESIDENT_SHARE

    needed = sum(_candidate_bytes(job, *name) for name in names) * LOADED_OVER_DISK
    return needed < machine.free_memory(job.device) * RESIDENT_SHARE


def _wave_seconds(
    job: _Job, runtime: str, step: Quantize | None, concurrency: int, input_tokens: int, output_tokens: int
) -> float | None:
    """One wave of requests served together: the prompts, then one step for each further token."""
    assert job.shape
    if job.measured is None:
        return None
    dtype = job.compute_dtype(runtime, step is not None)
    efficiency = EFFICIENCY[runtime, dtype]
    calls = job.shape.layers * efficiency.layer_seconds
    token = 2 * concurrency * job.shape.product_weights / _rate(job, dtype)  # one token of each request
    streamed = _streamed_bytes(job, runtime, step) / (job.measured.read_gb_per_s * 1e9 * efficiency.read)
    prefill = input_tokens * token / efficiency.prefill + calls
    return prefill + (output_tokens - 1) * (streamed + token / efficiency.decode + calls)


def _streamed_bytes(job: _Job, runtime: str, step: Quantize | None) -> int:
    """Bytes of weights that a decoding step reads: all but the embedding, of which it reads one row a request."""
    assert job.shape
    weights = onnx_bytes(job.shape, step, job.device) if runtime == "onnxruntime" else job.loaded_bytes(runtime, step)
    itemsize = 4 if runtime == "onnxruntime" and job.device == "cpu" else ITEMSIZE[job.shape.dtype]
    separate = not job.shape.tied or (step is not None and step.head != "none")
    return weights - (math.prod(job.shape.head) * itemsize if separate else 0)


def _track(job: _Job) -> StageEstimate:
    copied: int | None = 0
    if job.recipe.register_as:
        names = [name for name in job.recipe.candidates() if name[0] != "base"]
        copied = max(_candidate_bytes(job, *name) for name in names) if job.shape else None
    seconds = None if copied is None else job.imports("mlflow") + TRACK_SECONDS + _per_gb("copy", copied)
    return StageEstimate(
        stage="track", subject=job.recipe.name, seconds=seconds,
        peak_memory_bytes=BASELINE_BYTES["track"], disk_bytes=copied,
        notes=["track: disk for the largest variant, should it win"] if copied else [],
    )  # fmt: skip


def _candidate_bytes(job: _Job, variant: str, runtime: str) -> int:
    step = _step_of(job.recipe, variant)
    if job.shape is None:
        return 0
    if runtime == "onnxruntime":
        return onnx_bytes(job.shape, step, job.device)
    return packed_bytes(job.shape, step) if step else dense_bytes(job.shape)


# --- parts of the estimates -------------------------------------------------------------------------------------------


def _score_seconds(job: _Job, runtime: str, dtype: str, tokens: int, batch_tokens: int) -> float | None:
    """Time to compute the logits of `tokens` tokens in batches of `batch_tokens`."""
    assert job.shape
    if job.measured is None:
        return None
    efficiency = EFFICIENCY[runtime, dtype]
    products = 2 * tokens * job.shape.product_weights / (_rate(job, dtype) * efficiency.product)
    return products + ceil_div(tokens, max(batch_tokens, 1)) * job.shape.layers * efficiency.layer_seconds


def _compare_seconds(job: _Job, tokens: int) -> float | None:
    """Time to rebuild the base's logits from its hidden states and to compare both, position by position."""
    assert job.shape
    if job.measured is None:
        return None
    head = 2 * tokens * math.prod(job.shape.head) / (_rate(job, job.compute_dtype("transformers", False)) * 0.5)
    return head + tokens * job.shape.head[0] * COMPARE_SECONDS_PER_LOGIT


def _rate(job: _Job, dtype: str) -> float:
    """Floating-point operations a second of the measured product that `dtype` is rated against."""
    assert job.measured
    return 1e9 * (job.measured.gflops_bf16 if dtype in ("bfloat16", "float16") else job.measured.gflops_fp32)


def _batch_tokens(recipe: Recipe) -> int:
    text = recipe.evaluate.divergence
    return recipe.evaluate.batch_size * (text.length if text else QUESTION_TOKENS)


def _windows(recipe: Recipe) -> int:
    """Tokens that divergence is measured on."""
    text = recipe.evaluate.divergence
    return text.windows * text.length if text else 0


def _task_tokens(recipe: Recipe) -> int:
    """Tokens that one candidate scores in the suite's tasks."""
    total = 0
    for ref in recipe.evaluate.tasks:
        items, requests, tokens = TASK_SHAPES.get(ref.task, UNKNOWN_TASK)
        total += min(ref.limit or items, items) * requests * tokens
    return total


def _step_of(recipe: Recipe, variant: str) -> Quantize | None:
    return recipe.variants[variant][-1] if variant in recipe.variants else None


def _per_gb(work: str, size: int) -> float:
    return SECONDS_PER_GB[work] * size / 1e9


def _unknown(stage: str, subject: str) -> StageEstimate:
    return StageEstimate(stage=stage, subject=subject, seconds=None, peak_memory_bytes=None, disk_bytes=None)


def _in_store(store: Store, stage: str, uri: str) -> bool:
    """Whether a result of `stage` names `uri` as what it was built from."""
    for path in (store.root / stage).glob(f"*/{RECORD}"):
        try:
            if json.dumps(uri) in path.read_text():
                return True
        except OSError:
            continue
    return False
