"""What the backends and runtimes of a recipe cannot do with its schemes, and what its numbers will mean."""

from __future__ import annotations

from collections.abc import Iterator

from pennyweight import installed
from pennyweight.plan.problems import Problems
from pennyweight.recipe import ACTIVATIONS, Distill, Quantize, Recipe, Recover

#: Scheme → where its arithmetic is done in hardware.
HARDWARE = {
    "w8a8": "NVIDIA GPUs from compute capability 7.5 on and x86 CPUs with VNNI or AMX",
    "w4a8": "Arm CPUs with int8 dot products and Intel GPUs",
    "fp8": "NVIDIA GPUs from compute capability 8.9 on",
}
#: Weights in a block of GGUF's.
BLOCK = 32
#: Scheme of the KV cache → who keeps one.
CACHES = {"fp8": "vLLM keeps such a cache", "int8": "vLLM keeps quantized caches in fp8 alone"}


def check_backends(recipe: Recipe, device: str, found: Problems) -> list[str]:
    """Backends that cannot run here. Returns the extras that are missing."""
    extras: dict[str, None] = {}
    for path, step in _made(recipe):
        package, extra = installed.BACKEND_PACKAGES.get(step.maker, (None, None))
        if step.maker == "gptqmodel" and device != "cuda":
            hint = "remove `backend`: pennyweight's own gptq runs here"
            found.add(f"{path}.backend", "gptqmodel runs on NVIDIA GPUs, and the device is the CPU", hint, "machine")
        elif package and extra and installed.installed_version(package) is None:
            extras[extra] = None
            found.add(path, f"{step.maker} is not installed", f"pip install 'pennyweight[{extra}]'", "machine")
    return list(extras)


def check_runtimes(recipe: Recipe, found: Problems) -> None:
    """Schemes that a runtime of the variants cannot load, and healing that they do not allow."""
    exporting = [runtime for runtime in recipe.runtimes.variants if runtime != "transformers"]
    for runtime in exporting:
        for path, step in quantizers(recipe):
            if step.scheme in ACTIVATIONS:
                hint = "take runtimes: {variants: [transformers]}; vLLM serves the checkpoint"
                found.add(f"{path}.scheme", f"{runtime} cannot load {step.scheme}: it rounds activations", hint)
            if step.kv_cache != "none":
                hint = "remove `kv_cache`, or take runtimes: {variants: [transformers]}"
                found.add(f"{path}.kv_cache", f"{runtime} cannot load the scales of a quantized KV cache", hint)
            if runtime == "openvino":
                _check_blocks(path, step, found)
    for variant, steps in recipe.variants.items():
        for index, step in enumerate(steps):
            path = f"variants.{variant}.{index}.recover"
            if isinstance(step, Recover) and step.keeps_adapter:
                if exporting:
                    hint = "take low_rank, which is merged, or runtimes: {variants: [transformers]}"
                    found.add(f"{path}.train", f"{exporting[0]} cannot load a checkpoint's adapter", hint)
                if index + 1 < len(steps):
                    found.add(f"{path}.train", "a step after this one would lose the adapter", "make it the last step")
            before = [b for b in steps[:index] if isinstance(b, Quantize) and b.scheme in ACTIVATIONS]
            if isinstance(step, Recover) and before:
                message = f"recover trains the scales of packed integers, which {before[0].scheme} has none of"
                found.add(path, message, "quantize to w8a16, w4a16 or w3a16")


def _check_blocks(path: str, step: Quantize, found: Problems) -> None:
    """OpenVINO reads GGUF, whose blocks hold 32 weights, and zero points with 4 bits alone."""
    if step.scheme in ACTIVATIONS:
        return
    for size in step.candidate_sizes:
        if size % BLOCK:
            hint = "take 32, 64 or 128"
            found.add(f"{path}.group_size", f"openvino has no groups of {size}: multiples of {BLOCK}", hint)
    if not step.symmetric and {"w8a16", "auto"} & {step.scheme, step.head, step.embedding}:
        found.add(f"{path}.symmetric", "openvino has no zero points with 8-bit integers", "take symmetric: true")


def scheme_notes(recipe: Recipe) -> list[str]:
    """What a reader must know of schemes that a runtime only imitates."""
    steps = [step for _, step in quantizers(recipe)]
    notes = []
    if any("w3a16" in (s.scheme, s.embedding) for s in steps):
        notes += [
            f"w3a16 in {runtime}: it has no 3-bit integers, so each takes four bits there and reads as many"
            for runtime in recipe.runtimes.variants
            if runtime != "transformers"
        ]
    if "transformers" not in recipe.runtimes.variants:
        return notes
    notes += [
        f"{scheme} in transformers: activations are rounded as its arithmetic would and multiplied in floating point, "
        f"so quality is {scheme}'s and speed is not. Hardware that has it: {HARDWARE[scheme]}"
        for scheme in ACTIVATIONS
        if any(step.scheme == scheme for step in steps)
    ]
    notes += [
        f"{kind} kv_cache in transformers: keys and values are rounded by the checkpoint's scales and kept in floats, "
        f"so quality is a quantized cache's and memory is not. {engine}"
        for kind, engine in CACHES.items()
        if any(step.kv_cache == kind for step in steps)
    ]
    return notes


def _made(recipe: Recipe) -> Iterator[tuple[str, Quantize | Distill]]:
    """(key path, step) of every step that has a maker."""
    for variant, steps in recipe.variants.items():
        for index, step in enumerate(steps):
            if isinstance(step, Quantize | Distill):
                yield f"variants.{variant}.{index}.{step.kind}", step


def quantizers(recipe: Recipe) -> Iterator[tuple[str, Quantize]]:
    """(key path, step) of every quantize step."""
    return ((path, step) for path, step in _made(recipe) if isinstance(step, Quantize))
