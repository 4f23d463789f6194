"""What cannot work: found from the recipe, the model's shape and the machine, before anything is downloaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from pennyweight import datasets, installed, machine, runtimes
from pennyweight.errors import PennyweightError, SourceError, StoreError, did_you_mean
from pennyweight.plan.allocation import budget_problems
from pennyweight.plan.constants import BASELINE_BYTES
from pennyweight.plan.distilling import distill_problems
from pennyweight.plan.records import Plan, PlanProblem, StageEstimate
from pennyweight.plan.shapes import Shapes
from pennyweight.plan.show import format_bytes
from pennyweight.plan.sizes import ModelShape, is_ignored, quantized_layers
from pennyweight.recipe import PER_CHANNEL, Distill, Quantize, Recipe, Recover
from pennyweight.store import Store


@dataclass
class Problems:
    file: str
    found: list[PlanProblem] = field(default_factory=list)

    def add(self, path: str, message: str, hint: str | None = None, kind: Any = "recipe") -> None:
        self.found.append(PlanProblem(self.file, path, message, None, hint, kind))

    def of_kind(self, kind: str) -> bool:
        return any(problem.kind == kind for problem in self.found)


def check_machine(recipe: Recipe, device: str, found: Problems) -> list[str]:
    """Extras that are missing; each also becomes a problem."""
    if device == "cuda" and not machine.has_gpu():
        found.add("device", "device is cuda, and this machine has no NVIDIA GPU", "--set device=cpu", "machine")
    for message in installed.conflicts(machine.has_gpu()):
        found.add("", message, None, "machine")
    extras: list[str] = []
    if device == "cuda" and "openvino" in {*recipe.runtimes.base, *recipe.runtimes.variants}:
        found.add("runtimes", "openvino runs on CPUs, and the device is an NVIDIA GPU", "--set device=cpu", "machine")
    for runtime in sorted({*recipe.runtimes.base, *recipe.runtimes.variants}):
        if missing := installed.missing_packages(runtime, device):
            extra = "gpu" if device == "cuda" else "cpu"
            extras = [extra]
            hint = f"pip install 'pennyweight[{extra}]'"
            found.add("runtimes", f"runtime {runtime} needs {', '.join(missing)}", hint, "machine")
    return extras


def check_levers(recipe: Recipe, found: Problems) -> None:
    """A lever that no runtime of the variants has."""
    for index, lever in enumerate(recipe.benchmark.levers):
        if not any(lever in runtimes.get(name).levers for name in recipe.runtimes.variants):
            names = ", ".join(recipe.runtimes.variants)
            found.add(
                f"benchmark.levers.{index}", f"{names} has no {lever}", "add openvino to `runtimes`, or remove it"
            )


def check_steps(recipe: Recipe, shapes: Shapes, device: str, found: Problems) -> None:
    for path, message in shapes.faults():
        found.add(path, message)
    for variant, steps in recipe.variants.items():
        shape = shapes.of(variant)
        for index, step in enumerate(steps):
            path = f"variants.{variant}.{index}.{step.kind}"
            if isinstance(step, Distill):
                teacher = shapes.of("base")
                for key, message, hint, kind in (
                    distill_problems(teacher, shapes.of(variant, index), steps[: index + 1], device) if teacher else ()
                ):
                    found.add(f"{path}.{key}", message, hint, kind)
                continue
            if isinstance(step, Recover):
                if step.compile and device == "cpu" and not machine.has_cpp_compiler():
                    hint = "install g++, name one in CXX, or leave it out"
                    found.add(f"{path}.compile", "torch.compile needs a C++ compiler on a CPU", hint, "machine")
                teacher = shapes.of(variant, 0)
                if step.hidden and teacher and shape and teacher.hidden != shape.hidden:
                    widths = f"which have {shape.hidden} numbers here and {teacher.hidden} in the base"
                    found.add(f"{path}.hidden", f"compares hidden states, {widths}", "leave it out")
            elif isinstance(step, Quantize) and shape:
                _check_quantize(path, step, shape, "onnxruntime" in recipe.runtimes.variants, found)


def _check_quantize(path: str, step: Quantize, shape: ModelShape, exported: bool, found: Problems) -> None:
    _check_ignore(path, step, shape, found)
    layers = quantized_layers(shape, step)
    _check_embedding(path, step, shape, found)
    if layers and step.scheme == "auto":
        for key, message, hint in budget_problems(shape, step):
            found.add(f"{path}.{key}", message, hint)
    if layers:
        _check_groups(path, step, layers, exported, found)
        if exported or step.maker == "gptqmodel":
            _check_rows(path, step, shape, layers, found)
    else:
        found.add(path, "quantizes no layer of this model", "shorten `ignore`")


def check_data(recipe: Recipe, found: Problems) -> None:
    """Files of this machine that are not there, or not as declared."""
    for name, source in recipe.data.items():
        try:
            datasets.check_local(name, source)
        except PennyweightError as error:
            message = error.message.removeprefix(f"data.{name}").lstrip(":, ")
            found.add(f"data.{name}", message, error.hint)


def check_bases(recipe: Recipe, shapes: Shapes, found: Problems) -> None:
    """Bases that do not speak the recipe's base's tokens, as far as that shows before the download."""
    from pennyweight import sources
    from pennyweight.sources import vocabulary

    own = shapes.of_base("base")
    folder = sources.local_folder(recipe.base)
    for name, base in recipe.bases.items():
        shape, other = shapes.of_base(name), sources.local_folder(base)
        if shape is None or own is None:
            continue
        try:
            difference = vocabulary.difference(other, folder) if folder and other else None
        except SourceError as error:
            found.add(f"bases.{name}", error.message, error.hint)
            continue
        if difference := difference or vocabulary.difference_of_rows(shape.head[0], own.head[0]):
            found.add(f"bases.{name}", difference, vocabulary.HINT)


def _check_ignore(path: str, step: Quantize, shape: ModelShape, found: Problems) -> None:
    names = [*shape.linears, shape.head_name]
    for index, pattern in enumerate(step.ignore):
        if not any(is_ignored(name, [pattern]) for name in names):
            hint = f"a layer here is called {names[0]}" if pattern.startswith("re:") else did_you_mean(pattern, names)
            found.add(f"{path}.ignore.{index}", f"{pattern!r} matches no layer", hint)


def _check_embedding(path: str, step: Quantize, shape: ModelShape, found: Problems) -> None:
    if step.embedding == "none":
        return
    if shape.tied and step.head == step.embedding:
        hint = "remove `head`: a tied head shares the embedding's integers"
        found.add(f"{path}.head", f"head and embedding are one matrix here, and {step.head} would store it twice", hint)


def _check_groups(
    path: str, step: Quantize, layers: dict[str, tuple[int, int, int]], exported: bool, found: Problems
) -> None:
    if step.scheme in PER_CHANNEL:
        return
    if step.scheme == "auto":
        for size in step.candidate_sizes if exported else []:
            if size < 16 or size & (size - 1):
                message = f"onnxruntime has no groups of {size}: powers of two from 16 on"
                found.add(f"{path}.group_sizes", message, "take others, or another runtime")
        return
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


def _check_rows(
    path: str, step: Quantize, shape: ModelShape, layers: dict[str, tuple[int, int, int]], found: Problems
) -> None:
    """GPTQ's layout, which the ONNX exporter reads and gptqmodel writes, packs zero points along a layer's output into
    32-bit integers."""
    maker = "gptqmodel" if step.maker == "gptqmodel" else "onnxruntime's exporter"
    keys = {shape.head_name: "head", shape.embedding_name: "embedding"}
    for name, (rows, _, bits) in layers.items():
        own_embedding = name == shape.embedding_name and (not shape.tied or step.head != "none")  # not in that layout
        if rows * bits % 32 and not own_embedding:
            key = keys.get(name, "ignore")
            together = 32 // math.gcd(32, bits)
            message = f"{maker} packs {together} rows at a time, and {name} has {rows}"
            found.add(f"{path}.{key}", message, "leave it unquantized, or take another backend or runtime")


def group_sizes(inputs: list[int], exported: bool) -> list[int]:
    """Powers of two that divide every layer's input size, from 8 on (16 for onnxruntime) to 1024."""
    common, smallest = math.gcd(*inputs), 16 if exported else 8
    return [size for size in (8, 16, 32, 64, 128, 256, 512, 1024) if size >= smallest and common % size == 0]


def check_lengths(recipe: Recipe, shapes: Shapes, found: Problems) -> None:
    """Texts and requests longer than a model knows positions."""
    for variant, steps in recipe.variants.items():
        shape = shapes.of(variant)
        for index, step in enumerate(steps):
            if shape and step.calibrate and step.calibrate.length > shape.context:
                path = f"variants.{variant}.{index}.{step.kind}.{step.text_key}"
                message = f"windows of {step.calibrate.length} tokens; the model knows {shape.context} positions"
                found.add(path, message)
    known = {name: shape.context for name in recipe.all_bases if (shape := shapes.of_base(name))}
    if not known:
        return
    shortest = min(known, key=known.__getitem__)
    context = known[shortest]
    limit = f"{'the model' if shortest == 'base' else f'base {shortest}'} knows {context} positions"
    for name, text in recipe.evaluate.texts().items():
        if text.length > context:
            found.add("evaluate", f"{name} windows of {text.length} tokens; {limit}")
    if (spec := recipe.evaluate.generation) and spec.input_tokens + spec.output_tokens > context:
        found.add("evaluate.generation", f"{spec.input_tokens} + {spec.output_tokens} tokens; {limit}")
    load = recipe.benchmark.workload
    if load.input_tokens + load.output_tokens > context:
        found.add("benchmark.workload", f"{load.input_tokens} + {load.output_tokens} tokens a request; {limit}")


def check_room(plan: Plan, store: Store, found: Problems) -> None:
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


def _check_memory(needs: dict[str, int], free: int, kind: str, found: Problems) -> None:
    worst = max(needs, key=needs.__getitem__, default=None)
    if worst is not None and needs[worst] > free:
        message = f"{worst} needs about {format_bytes(needs[worst])} of {kind}; {format_bytes(free)} are free"
        found.add("", message, "free some, take a smaller base, or a machine with more", "resource")


def _title(stage: StageEstimate) -> str:
    return f"{stage.stage} {stage.subject}"
