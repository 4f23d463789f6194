"""The preflight: sizes, memory, time, disk and downloads of every stage, and what cannot work, before any of it runs.

Sizes follow from the model's shapes and are exact; memory and time are estimates from the constants below and this
machine's measured speed.
"""

from __future__ import annotations

import time
from typing import Any

from pennyweight import installed, machine, speed
from pennyweight.errors import SourceError, StoreError
from pennyweight.plan.constants import DOWNLOAD_BYTES_PER_SECOND
from pennyweight.plan.job import Job
from pennyweight.plan.problems import Problems, check_lengths, check_levers, check_machine, check_room, check_steps
from pennyweight.plan.records import Plan, PlanProblem
from pennyweight.plan.schemes import check_backends, check_runtimes, scheme_notes
from pennyweight.plan.show import format_bytes, format_plan, format_seconds
from pennyweight.plan.sizes import ITEMSIZE, ModelShape, model_shape
from pennyweight.plan.stages import estimate_stages
from pennyweight.recipe import Recipe
from pennyweight.records import Measured
from pennyweight.store import Store

__all__ = ["Plan", "PlanProblem", "format_bytes", "format_plan", "format_seconds", "make_plan"]


def make_plan(recipe: Recipe, store: Store, *, file: str | None = None) -> Plan:
    """Estimate every stage of a run on this machine, and find what cannot work. Downloads no weights and no data.

    `file` is how the problems name the recipe; its name by default. Faults are in `Plan.problems`, not raised.
    """
    device = machine.resolve_device(recipe.device)
    found = Problems(file or recipe.name)
    measured = measured_speed(store, device)
    config, notes = _base_config(recipe, store, found)
    shape = _shape(recipe, config, found)
    missing = check_machine(recipe, device, found) + check_backends(recipe, device, found)
    check_runtimes(recipe, found)
    if shape:
        check_steps(recipe, shape, device, found)
        check_lengths(recipe, shape, found)
        check_levers(recipe, found)
    notes += _notes(device, measured) + scheme_notes(recipe)
    if recipe.on_inconclusive == "extend":
        notes.append("further looks at undecided candidates are not counted: they depend on what is seen")
    notes += _saving_notes(recipe)
    job = Job(recipe, store, device, shape, measured)
    stages = [] if found.of_kind("recipe") and shape is None else estimate_stages(job)
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
    check_room(plan, store, found)
    return plan.model_copy(update={"problems": found.found})


def _saving_notes(recipe: Recipe) -> list[str]:
    from pennyweight.benchmark import rounds_at

    spec = recipe.benchmark
    loads = [condition.concurrency or spec.decide_at for condition in recipe.saving_conditions]
    return [
        f"the saving at {load} is judged on {rounds_at(spec, load)} rounds, "
        f"benchmark.{'decide_rounds' if load == spec.decide_at else 'rounds'}"
        for load in loads
    ]


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
        entry = store.get_or_build("measure", inputs, lambda _: speed.measure(device=device).model_dump(mode="json"))
    except StoreError:
        return speed.measure(device=device)  # a store that cannot be written is reported with the other problems
    return Measured.model_validate(entry.record)


def _base_config(recipe: Recipe, store: Store, found: Problems) -> tuple[dict[str, Any] | None, list[str]]:
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


def _shape(recipe: Recipe, config: dict[str, Any] | None, found: Problems) -> ModelShape | None:
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
            known = f"transformers {installed.installed_version('transformers')} knows no decoder of this kind"
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
