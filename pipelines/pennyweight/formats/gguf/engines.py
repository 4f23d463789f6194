"""Which engines read a GGUF file rightly, as far as that was tried: see tests/integration/test_formats.py."""

from __future__ import annotations

from pennyweight.errors import StageError

OPENVINO = "OpenVINO GenAI"


def unfit(architecture: str, types: set[str]) -> dict[str, str]:
    """Engines that must not load a file of this architecture and these tensor types, and why.

    `architecture` and `types` are GGUF's own names.
    """
    if "Q4_1" in types:
        return {OPENVINO: "it reads the offsets of Q4_1 from the wrong bytes, and says nothing"}
    if architecture not in ("llama", "qwen2", "qwen3"):
        return {OPENVINO: f"it does not know the architecture {architecture}"}
    return {}


def refuse(engine: str, architecture: str, types: set[str]) -> None:
    """Raise StageError if the engine must not load such a file."""
    if why := unfit(architecture, types).get(engine):
        raise StageError(f"{engine} cannot serve this file: {why}", "quantize with symmetric: true, or take llama.cpp")
