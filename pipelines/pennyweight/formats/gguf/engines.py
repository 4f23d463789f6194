"""Which engines read a GGUF file rightly, as far as it was tried (tests/integration/test_formats.py).

llama.cpp reads all that is written here. OpenVINO GenAI 2026.4 turns the offsets of Q4_1 into integer zero points,
which ours are; in files of others they are not, and it predicts something else without a word.
"""

from __future__ import annotations

from pennyweight.formats.gguf.vocabulary import PIECES

OPENVINO = "OpenVINO GenAI"
TRANSFORMERS = "transformers"


def unfit(architecture: str, types: set[str], split: str, scaled_rope: bool) -> dict[str, str]:
    """Engines that must not load a file, and why. `architecture`, tensor `types` and `split` are GGUF's names."""
    found = {}
    if architecture not in ("llama", "qwen2", "qwen3"):
        found[OPENVINO] = f"it does not know the architecture {architecture}"
    elif scaled_rope:
        found[OPENVINO] = "it ignores RoPE's scaling, and says nothing"
    elif split == PIECES:
        found[OPENVINO] = "it does not know SentencePiece vocabularies"
    elif "BF16" in types:
        found[OPENVINO] = "it does not read BF16"
    if architecture == "gemma":
        found[TRANSFORMERS] = f"it does not know the architecture {architecture}"
    elif scaled_rope:
        found[TRANSFORMERS] = "it ignores RoPE's scaling, and says nothing"
    return found


def notes(split: str) -> list[str]:
    """What a server of the file must know."""
    if split in (PIECES, "smollm", "qwen2", "llama-bpe"):
        return []
    return [f"{OPENVINO} has no rules for words split as {split} does: hand it token ids, not text"]
