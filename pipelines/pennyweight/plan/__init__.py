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
from pennyweight.plan.problems import (
    Problems,
    check_bases,
    check_data,
    check_lengths,
    check_levers,
    check_machine,
    check_room,
    check_steps,
)
from pennyweight.plan.records import Plan, PlanProblem
from pennyweight.plan.schemes import check_backends, check_runtimes, scheme_notes
from pennyweight.plan.shapes import Shapes, Start
from pennyweight.plan.show import format_bytes, format_plan, format_seconds
from pennyweight.plan.sizes import ITEMSIZE
from pennyweight.plan.stages import estimate_stages
from pennyweight.recipe import Base, Recipe
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
    shapes, notes = _shapes(recipe, store, found)
    shape = shapes.of_base("base")
    missing = check_machine(recipe, device, found) + check_backends(recipe, device, found)
    check_runtimes(recipe, found)
    check_data(recipe, found)
    check_bases(recipe, shapes, found)
    check_steps(recipe, shapes, device, found)
    check_lengths(recipe, shapes, found)
    if shape:
        check_levers(recipe, found)
    notes += _notes(device, measured) + scheme_notes(recipe)
    if recipe.on_inconclusive == "extend":
        notes.append("further looks at undecided candidates are not counted: they depend on what is seen")
    notes += _saving_notes(recipe)
    job = Job(recipe, store, device, shapes, measured)
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


def _shapes(recipe: Recipe, store: Store, found: Problems) -> tuple[Shapes, list[str]]:
    """Shapes of the bases that can be had before the download, and notes on why others cannot."""
    shapes, notes = Shapes(recipe), []
    for name, base in recipe.all_bases.items():
        path = "base" if name == "base" else f"bases.{name}"
        config, unknown = _base_config(base, path, store, found)
        notes += unknown
        if config is not None:
            _add_shape(shapes, name, path, config, found)
    return shapes, notes


def _base_config(base: Base, path: str, store: Store, found: Problems) -> tuple[dict[str, Any] | None, list[str]]:
    """A base's config where it can be had before the download, and notes on why not."""
    from pennyweight import sources

    which = "the base's config" if path == "base" else f"the config of {path}"
    unknown = f"sizes, memory and times are unknown until {which} can be read"
    try:
        config = sources.base_config(base, store)
    except SourceError as error:
        if sources.scheme_of(base.uri) == "file":
            found.add(path, error.message, error.hint)
            return None, []
        return None, [error.message, unknown]
    return config, [] if config else [unknown]


def _add_shape(shapes: Shapes, name: str, path: str, config: dict[str, Any], found: Problems) -> None:
    """Let a base's shape be known, unless it is no decoder to start from, or has code of its own that knows better."""
    base = shapes.recipe.all_bases[name]
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        hint = "start from the model that it was quantized from"
        found.add(path, f"the base is quantized already, in {method} format", hint)
        return
    try:
        shapes.add(name, Start(config, base_dtype(base, config)))
    except (ValueError, KeyError, AttributeError) as error:
        if not base.trust_remote_code:
            reason = str(error).strip("'").splitlines()[0].partition(" Should contain")[0][:160]
            known = f"transformers {installed.installed_version('transformers')} knows no decoder of this kind"
            found.add(path, f"model type {config.get('model_type')!r}: {reason}", known)


def base_dtype(base: Base, config: dict[str, Any]) -> str:
    """dtype that a base's checkpoint is stored in: the recipe's, else bfloat16 for a GGUF file, else the config's."""
    if base.dtype != "auto":
        return base.dtype
    if base.uri.endswith(".gguf"):
        return "bfloat16"
    stated = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return stated if stated in ITEMSIZE else "float32"
