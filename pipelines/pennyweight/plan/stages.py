"""One estimate for each stage that a run will have."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

from pennyweight import machine, runtimes
from pennyweight.plan.constants import (
    ACTIVATION_COPIES,
    BASELINE_BYTES,
    BUILDER_BYTES,
    BUILDER_SECONDS,
    DOWNLOAD_BYTES_PER_SECOND,
    MB,
    PACKING_BYTES,
    PARITY_TOKENS,
    QUESTION_TOKENS,
    TRACK_SECONDS,
    TRAINING_EFFICIENCY,
    WARM_UP,
    WINDOWS_SECONDS,
)
from pennyweight.plan.distilling import estimate_distill
from pennyweight.plan.job import (
    Job,
    batch_tokens,
    candidate_bytes,
    compare_seconds,
    divergence_tokens,
    exported_bytes,
    generation_seconds,
    load_seconds,
    per_gb,
    rate,
    rounds_its_start,
    score_seconds,
    step_of,
    task_tokens,
    wave_seconds,
)
from pennyweight.plan.pruning import estimate_prune
from pennyweight.plan.quantizing import estimate_quantize, largest_layer
from pennyweight.plan.records import StageEstimate
from pennyweight.plan.sizes import ITEMSIZE, ModelShape, adapter_bytes, dense_bytes, packed_bytes
from pennyweight.recipe import Base, Distill, From, Prune, Quantize, Recover, Step
from pennyweight.speed import CEILING_SECONDS
from pennyweight.store import RECORD, Store


def estimate_stages(job: Job) -> list[StageEstimate]:
    return [
        *(_source(job, name, base) for name, base in job.recipe.all_bases.items()),
        *_data(job),
        *_steps(job),
        *_exports(job),
        _reference(job),
        *_evaluations(job),
        _benchmark(job),
        *([_levers(job)] if job.recipe.benchmark.levers else []),
        _track(job),
    ]


def _source(job: Job, name: str, base: Base) -> StageEstimate:
    shape = job.shapes.of_base(name)
    reused = _in_store(job.store, "source", base.uri)
    download = 0 if reused else _base_download(base, shape)
    weights = disk = dense_bytes(shape) if shape else None
    seconds = peak = None
    if shape and weights is not None:
        fetching = (download or 0) / DOWNLOAD_BYTES_PER_SECOND
        seconds = fetching + job.imports("transformers") + per_gb("convert", weights)
        # A GGUF file is unpacked to float32 before it is cast.
        unpacked = 4 * shape.parameters if base.uri.endswith(".gguf") else 0
        peak = BASELINE_BYTES["source"] + weights + unpacked
        if _stays_in_place(base):
            disk, seconds, peak = 0, 1.0 + per_gb("copy", weights), BASELINE_BYTES["source"]  # only its digest is read
    return StageEstimate(
        stage="source", subject=name, seconds=0.0 if reused else seconds, peak_memory_bytes=peak,
        disk_bytes=disk, download_bytes=download, weight_bytes=weights, reused=reused,
    )  # fmt: skip


def _base_download(base: Base, shape: ModelShape | None) -> int | None:
    """Bytes that fetching the base takes: the checkpoint from a hub, an archive's own size; None where unknown."""
    from pennyweight import sources

    scheme = sources.scheme_of(base.uri)
    if scheme == "hf":
        return dense_bytes(shape) if shape else None
    return sources.known_bases().get(base.uri, {}).get("archive_bytes") if scheme == "pypi" else 0


def _stays_in_place(base: Base) -> bool:
    """A folder is used where it lies, unless it must be cast."""
    from pennyweight import sources

    return sources.scheme_of(base.uri) == "file" and not base.uri.endswith(".gguf") and base.dtype == "auto"


def _data(job: Job) -> Iterator[StageEstimate]:
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


def _steps(job: Job) -> Iterator[StageEstimate]:
    """Variants that begin alike share what they have in common: the first of them makes it."""
    made: list[tuple[str, list[Step]]] = []
    for variant, steps in job.recipe.variants.items():
        for index, step in enumerate(steps):
            if isinstance(step, From):
                continue
            estimate = _step(job, variant, index, step)
            result = job.recipe.start_of(variant), [done for done in steps[: index + 1] if not isinstance(done, From)]
            yield estimate.model_copy(update={"seconds": 0.0, "reused": True}) if result in made else estimate
            made.append(result)


def _step(job: Job, variant: str, index: int, step: Step) -> StageEstimate:
    shape, made = job.shape_of(variant), job.shape_of(variant, index + 1)
    if shape is None or made is None or (isinstance(step, Distill) and job.shape is None):
        return _unknown(step.kind, variant)
    if isinstance(step, Prune):
        before = job.shape_of(variant, index)
        assert before
        return estimate_prune(job, before, made, variant, step)
    if isinstance(step, Quantize):
        return estimate_quantize(job, shape, variant, step)
    if isinstance(step, Distill):
        return estimate_distill(job, made, variant, index)
    assert isinstance(step, Recover)
    return _recover(job, shape, variant, step)


def _recover(job: Job, shape: ModelShape, variant: str, step: Recover) -> StageEstimate:
    """The teacher reads each window once, the student three times over: forward, and twice backward."""
    quantized, teacher = step_of(job.recipe, variant), job.shape_of(variant, 0)
    assert teacher
    # What was quantized is loaded beside the teacher, unless it is the teacher.
    models = [teacher, shape] if rounds_its_start(job.recipe, variant) else [teacher, shape, shape]
    weights = packed_bytes(shape, quantized) + adapter_bytes(shape, quantized, step) if quantized else None
    dtype = job.compute_dtype(shape, "transformers", False)
    seconds = None
    if job.measured is not None:
        speed = rate(job, dtype) * TRAINING_EFFICIENCY[dtype]
        step_seconds = (2 * teacher.product_weights + 6 * shape.product_weights) * step.batch * step.length / speed
        look_seconds = 2 * (teacher.product_weights + shape.product_weights) * step.held_out * step.length / speed
        allowed = [] if step.minutes is None else [60 * step.minutes]
        if step.most_steps is not None:
            looks = -(-step.most_steps // step.check_every)
            allowed.append(step.most_steps * step_seconds + looks * look_seconds)
        loading = job.imports("transformers") + per_gb("load", sum(map(dense_bytes, models)) + dense_bytes(shape))
        seconds = loading + look_seconds + min(allowed)
    # Teacher, integers and embedding of the student, and one layer's weights and their gradients at a time.
    loaded = ITEMSIZE[dtype] * sum(model.parameters for model in models)
    places = 5 * 4 * sum(rows * columns for rows, columns in shape.linears.values()) if step.moves == "by-one" else 0
    activations = step.batch * step.length * shape.layers * shape.intermediate * ACTIVATION_COPIES
    return StageEstimate(
        stage="recover", subject=variant, seconds=seconds, disk_bytes=weights, weight_bytes=weights,
        peak_memory_bytes=BASELINE_BYTES["recover"] + loaded + places + activations, notes=[step.describe()],
    )  # fmt: skip


def _exports(job: Job) -> Iterator[StageEstimate]:
    for variant, runtime in job.recipe.candidates():
        if runtime == "transformers":
            continue
        subject, step, shape = f"{variant}@{runtime}", step_of(job.recipe, variant), job.shape_of(variant)
        if shape is None:
            yield _unknown("export", subject)
            continue
        source = packed_bytes(shape, step) if step else dense_bytes(shape)
        weights = exported_bytes(job, shape, runtime, step)
        tokens = PARITY_TOKENS, PARITY_TOKENS
        scoring = [
            score_seconds(job, shape, "transformers", job.compute_dtype(shape, "transformers", False), *tokens),
            score_seconds(job, shape, runtime, job.compute_dtype(shape, runtime, step is not None), *tokens),
        ]
        seconds = None
        if None not in scoring:
            building = per_gb("export", source + weights) + per_gb("load", source) + load_seconds(runtime, weights)
            building += per_gb("repack", source + weights) if step else 0.0
            building += BUILDER_SECONDS if runtime == "onnxruntime" else 0.0
            seconds = job.imports("transformers", runtime) + building + sum(scoring)
        yield StageEstimate(
            stage="export", subject=subject, seconds=seconds, disk_bytes=weights, weight_bytes=weights,
            peak_memory_bytes=_export_memory(shape, step, source, weights),
        )  # fmt: skip


def _export_memory(shape: ModelShape, step: Quantize | None, source: int, weights: int) -> int:
    """Beside this process, the builder's: the checkpoint, the file, and the largest layer while it is repacked. After
    it, the parity check: the checkpoint in float32 and its logits."""
    building = BUILDER_BYTES + source + weights + PACKING_BYTES["export"] * largest_layer(shape, step)
    checking = 4 * shape.parameters + 3 * 4 * PARITY_TOKENS * shape.head[0]
    return BASELINE_BYTES["export"] + max(building, checking)


def _reference(job: Job) -> StageEstimate:
    """The base's hidden states on the text, kept with its head, and its answers."""
    subject = "base@transformers"
    shape = job.shape
    if shape is None:
        return _unknown("reference", subject)
    dtype, batch, windows = (
        job.compute_dtype(shape, "transformers", False),
        batch_tokens(job.recipe),
        divergence_tokens(job.recipe),
    )
    scoring = score_seconds(job, shape, "transformers", dtype, windows + task_tokens(job.recipe), batch)
    generating = generation_seconds(job, shape, "transformers", None)
    known = scoring is not None and generating is not None
    weights, stored = job.loaded_bytes(shape, "transformers", None), _reference_bytes(job, windows)
    loading = _suite_imports(job, "transformers") + per_gb("load", weights)
    questions = job.recipe.evaluate.batch_size * QUESTION_TOKENS * shape.head[0] * ITEMSIZE[dtype]
    activations = batch * ACTIVATION_COPIES * shape.intermediate * ITEMSIZE[dtype]
    return StageEstimate(
        stage="reference", subject=subject, seconds=loading + scoring + generating if known else None,
        peak_memory_bytes=BASELINE_BYTES["reference"] + weights + stored + max(questions, activations),
        disk_bytes=stored,
    )  # fmt: skip


def _evaluations(job: Job) -> Iterator[StageEstimate]:
    windows = divergence_tokens(job.recipe)
    for variant, runtime in job.recipe.candidates():
        subject, step, shape = f"{variant}@{runtime}", step_of(job.recipe, variant), job.shape_of(variant)
        if shape is None or job.shape is None:
            yield _unknown("evaluate", subject)
            continue
        seconds = compare_seconds(job, windows)
        peak = BASELINE_BYTES["evaluate"] + _reference_bytes(job, windows)
        if subject != "base@transformers":  # that one is the reference, and only compared with itself
            dtype, weights = job.compute_dtype(shape, runtime, step is not None), job.loaded_bytes(shape, runtime, step)
            tokens, batch = windows + task_tokens(job.recipe), batch_tokens(job.recipe)
            scoring, generating = (
                score_seconds(job, shape, runtime, dtype, tokens, batch),
                generation_seconds(job, shape, runtime, step),
            )
            graphs = 2 if job.recipe.evaluate.generation else 1
            loading = _suite_imports(job, runtime) + load_seconds(runtime, weights, graphs)
            seconds = None if None in (seconds, scoring, generating) else seconds + scoring + generating + loading
            widest = shape.head[0] + ACTIVATION_COPIES * shape.intermediate
            peak += weights + batch * widest * ITEMSIZE.get(dtype, 4)
        yield StageEstimate(stage="evaluate", subject=subject, seconds=seconds, peak_memory_bytes=peak, disk_bytes=MB)


def _suite_imports(job: Job, runtime: str) -> float:
    return job.imports("transformers", runtime, *(["lm-eval"] if job.recipe.evaluate.tasks else []))


def _reference_bytes(job: Job, windows: int) -> int:
    """Hidden states of that many tokens, and the head."""
    assert job.shape
    return (windows * job.shape.hidden + math.prod(job.shape.head)) * ITEMSIZE[job.shape.dtype] if windows else 0


def _benchmark(job: Job) -> StageEstimate:
    from pennyweight.benchmark import rounds_at

    spec, subject = job.recipe.benchmark, "all candidates"
    names = list(job.recipe.candidates())
    shapes = {variant: job.shape_of(variant) for variant, _ in names}
    if None in shapes.values():
        return _unknown("benchmark", subject)
    seconds: float | None = job.imports("transformers", *job.recipe.runtimes.base, *job.recipe.runtimes.variants)
    load, requests = spec.workload, max(spec.concurrency)
    for variant, runtime in names:
        model = shapes[variant], runtime, step_of(job.recipe, variant)
        for concurrency in spec.concurrency:
            wave = wave_seconds(job, *model, concurrency, load.input_tokens, load.output_tokens)
            warm_up = wave_seconds(job, *model, concurrency, min(WARM_UP[0], load.input_tokens), WARM_UP[1])
            seconds = (
                None if None in (seconds, wave, warm_up) else seconds + rounds_at(spec, concurrency) * wave + warm_up
            )
    loaded = [job.loaded_bytes(shapes[variant], runtime, step_of(job.recipe, variant)) for variant, runtime in names]
    turns = sum(1 + rounds_at(spec, concurrency) for concurrency in spec.concurrency)
    resident = _stay_loaded(job, names)
    once = sum(load_seconds(runtime, size) for (_, runtime), size in zip(names, loaded))
    loading = once * (1 if resident else turns) + 2 * CEILING_SECONDS
    cache = 2 * requests * (load.input_tokens + load.output_tokens) * max(s.kv_bytes(4) for s in shapes.values())
    logits = 4 * requests * load.input_tokens * shapes["base"].head[0]  # onnxruntime computes all of a prompt's
    return StageEstimate(
        stage="benchmark", subject=subject, seconds=None if seconds is None else seconds + loading, disk_bytes=0,
        peak_memory_bytes=BASELINE_BYTES["benchmark"] + (sum(loaded) if resident else max(loaded)) + cache + logits,
        notes=[] if resident else ["benchmark: too little memory to keep all candidates loaded; loaded in turn"],
    )  # fmt: skip


def _levers(job: Job) -> StageEstimate:
    """The winner is not known, so its time is that of the slowest that may win."""
    spec, subject = job.recipe.benchmark, "the winner"
    names = [name for name in job.recipe.candidates() if name[0] != "base" and runtimes.get(name[1]).levers]
    shapes = {variant: job.shape_of(variant) for variant, _ in names}
    if None in shapes.values() or not names:
        return _unknown("levers", subject)
    load = spec.workload
    models = [(shapes[variant], runtime, step_of(job.recipe, variant)) for variant, runtime in names]
    waves = [wave_seconds(job, *model, spec.decide_at, load.input_tokens, load.output_tokens) for model in models]
    loaded = [job.loaded_bytes(*model) for model in models]
    turns = 2 * (1 + spec.decide_rounds)
    loading = 2 * max(load_seconds(runtime, size) for (_, runtime), size in zip(names, loaded))
    seconds = None if None in waves else len(spec.levers) * (turns * max(waves) + loading)
    return StageEstimate(
        stage="levers", subject=subject, seconds=seconds, disk_bytes=0,
        peak_memory_bytes=BASELINE_BYTES["levers"] + 3 * max(loaded),
    )  # fmt: skip


def _stay_loaded(job: Job, names: list[tuple[str, str]]) -> bool:
    """The benchmark's own rule for keeping all candidates loaded between their turns."""
    from pennyweight.benchmark import LOADED_OVER_DISK, RESIDENT_SHARE

    needed = sum(candidate_bytes(job, *name) for name in names) * LOADED_OVER_DISK
    return needed < machine.free_memory(job.device) * RESIDENT_SHARE


def _track(job: Job) -> StageEstimate:
    copied: int | None = 0
    if job.recipe.register_as:
        names = [name for name in job.recipe.candidates() if name[0] != "base"]
        known = all(job.shape_of(variant) for variant, _ in names)
        copied = max(candidate_bytes(job, *name) for name in names) if known else None
    seconds = None if copied is None else job.imports("mlflow") + TRACK_SECONDS + per_gb("copy", copied)
    return StageEstimate(
        stage="track", subject=job.recipe.name, seconds=seconds,
        peak_memory_bytes=BASELINE_BYTES["track"], disk_bytes=copied,
        notes=["track: disk for the largest variant, should it win"] if copied else [],
    )  # fmt: skip


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
