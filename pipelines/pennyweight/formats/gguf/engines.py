"""Which engines read a GGUF file rightly, as far as it was tried (tests/integration/test_formats.py).

llama.cpp reads all that is written here. OpenVINO GenAI 2026.4 turns the offsets of Q4_1 into integer zero points,
which ours are; in files of others they are not, and it predicts something else without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pennyweight.formats.gguf.header import read_header
from pennyweight.formats.gguf.vocabulary import PIECES

OPENVINO = "OpenVINO GenAI"
TRANSFORMERS = "transformers"
#: Tensor types that OpenVINO GenAI was seen to read rightly.
TRIED = {"F32", "F16", "Q8_0", "Q4_0", "Q4_1"}
#: Distance of a zero point from a whole number that comes of an offset in float16.
WHOLE = 1 / 32


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


def openvino_misreads(file: Path) -> tuple[str | None, list[str]]:
    """Why OpenVINO GenAI must not load a file that others may have written, None where nothing is known against it; and
    the types of its tensors that nobody has tried."""
    import numpy as np

    header = read_header(file)
    value = header.fields.get
    architecture = value("general.architecture")
    types = {tensor.type for tensor in header.tensors}
    scaled = value(f"{architecture}.rope.scaling.type") not in (None, "none")
    scaled |= any(tensor.name == "rope_freqs.weight" for tensor in header.tensors)
    split = PIECES if value("tokenizer.ggml.model") == "llama" else value("tokenizer.ggml.pre")
    reason = unfit(architecture, types, split, scaled).get(OPENVINO)
    fractional = [
        tensor.name
        for tensor in header.tensors
        if tensor.type == "Q4_1" and not _has_whole_zeros(np.memmap(file, np.uint8, "r", tensor.offset, tensor.bytes))
    ]
    if reason is None and fractional:
        reason = f"it rounds the offsets of Q4_1 to whole steps, which those of {fractional[0]} are not"
    return reason, sorted(types - TRIED)


def _has_whole_zeros(data: Any) -> bool:
    """Whether the offsets m of Q4_1's blocks (d, m, 16 bytes of integers) are −d · z with whole 0 ≤ z ≤ 15."""
    import numpy as np

    scales, offsets = data.reshape(-1, 20)[:, :4].copy().view(np.float16).astype(np.float32).T
    empty = scales == 0
    zeros = -offsets[~empty] / scales[~empty]
    whole = np.abs(zeros - zeros.round()) <= WHOLE
    return bool(np.all(whole & (zeros > -WHOLE) & (zeros < 15 + WHOLE)) and not offsets[empty].any())
