"""What is installed of what Pennyweight can use."""

from __future__ import annotations

import importlib.metadata
from typing import Any, Literal

from pennyweight.errors import StageError

#: Wheels that overwrite each other's files: (for a CPU, for a GPU).
RIVALS = (("onnxruntime", "onnxruntime-gpu"), ("onnxruntime-genai", "onnxruntime-genai-cuda"))

#: Packages that each runtime needs. An element of several names is met by any of them; on a GPU by the last alone.
RUNTIME_PACKAGES = {
    "transformers": (("torch",), ("transformers",)),
    "onnxruntime": (*RIVALS, ("onnx-ir",)),
    "openvino": (("openvino-genai",),),
}

#: Backends of steps that are not part of this package → (what each needs, the extra that has it).
BACKEND_PACKAGES = {
    "llm-compressor": ("llmcompressor", "llm-compressor"),
    "auto-round": ("auto-round", "auto-round"),
    "gptqmodel": ("gptqmodel", "gpu"),
    "trl": ("trl", "trl"),
}


def installed_version(package: str) -> str | None:
    """An installed distribution's version, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def require(backend: str) -> None:
    """Raise StageError where a backend of BACKEND_PACKAGES is not installed."""
    package, extra = BACKEND_PACKAGES[backend]
    if installed_version(package) is None:
        raise StageError(f"{backend} is not installed", f"pip install 'pennyweight[{extra}]'")


def extras() -> dict[str, dict[str, Any]]:
    """Each extra of this package: whether it is installed, and which of its requirements are not met."""
    from packaging.requirements import Requirement

    missing: dict[str, list[str]] = {}
    metadata = importlib.metadata.metadata("pennyweight")
    for name in metadata.get_all("Provides-Extra") or []:
        missing[name] = []
        for text in importlib.metadata.requires("pennyweight") or []:
            requirement = Requirement(text)
            if not requirement.marker or not requirement.marker.evaluate({"extra": name}):
                continue
            if requirement.marker.evaluate({"extra": ""}):
                continue  # needed anyway, not by this extra
            version = installed_version(requirement.name)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                missing[name].append(f"{requirement.name}{requirement.specifier}")
    return {name: {"installed": not wanted, "missing": wanted} for name, wanted in missing.items()}


def conflicts(gpu: bool) -> list[str]:
    """Installed packages that overwrite each other's files, in words with the fix for this kind of machine."""
    wanted = "gpu" if gpu else "cpu"
    return [
        f"{cpu} and {cuda} are both installed and overwrite each other's files: uninstall both, "
        f"then pip install 'pennyweight[{wanted}]'"
        for cpu, cuda in RIVALS
        if installed_version(cpu) and installed_version(cuda)
    ]


def missing_packages(runtime: str, device: Literal["cpu", "cuda"] = "cpu") -> list[str]:
    """Packages that a runtime needs on `device` and that are not installed."""
    choices = [names[-1:] if device == "cuda" else names for names in RUNTIME_PACKAGES[runtime]]
    return [names[0] for names in choices if not any(map(installed_version, names))]
