"""What a candidate's tokens ask of a machine: bytes to read and operations to do, the fewest that will do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight import checkpoints, runtimes
from pennyweight.plan.sizes import ITEMSIZE, model_shape
from pennyweight.records import Candidate


@dataclass(frozen=True)
class Work:
    """A decoder's work for each token. Layers attend to a window of positions, or to all (None)."""

    weight_bytes: int
    """Weights that one forward pass reads, however many tokens it is given."""
    body_weights: int
    """Weights that every token is multiplied with, the head's left out."""
    head_weights: int
    kv_bytes: int
    """Keys and values of one position in one layer, at the precision of the runtime's cache."""
    attention_width: int
    """Attention heads × size of a head."""
    windows: tuple[int | None, ...]
    dtype: str
    """What activations are computed in."""
    integers: bool
    """Weights are integers, so that a runtime may multiply in 8 bits."""

    def step_bytes(self, requests: int, cached: int) -> int:
        """Bytes that a decoding step reads: the weights once, and each request's keys and values of `cached` positions.

        A position is 2 · layers · KV heads · head size numbers (Kwon et al., Efficient Memory Management for Large
        Language Model Serving with PagedAttention, SOSP 2023, section 3; fewer KV heads than query heads: Ainslie et
        al., GQA, EMNLP 2023).
        """
        return self.weight_bytes + requests * self.kv_bytes * self._attended(cached)

    def step_operations(self, requests: int, cached: int) -> int:
        """Operations of a decoding step: 2 for each weight of a product; attention to `cached` positions and itself.

        Attention multiplies each query with a key and each of its weights with a value, a multiplication and an
        addition for each number: 4 · heads · head size for a position in a layer. A third of Chowdhery et al., PaLM,
        2022, appendix B, whose 6N + 12LHQT count the backward pass too.
        """
        products = 2 * (self.body_weights + self.head_weights)
        return requests * (products + 4 * self.attention_width * self._attended(cached + 1))

    def prefill_operations(self, requests: int, length: int) -> int:
        """The same for prompts of `length` tokens, where the head is needed for the last token alone, and a token
        attends to those before it and itself."""
        attended = sum(_sum_up_to(length, window) for window in self.windows)
        products = 2 * (self.body_weights * length + self.head_weights)
        return requests * (products + 4 * self.attention_width * attended)

    def _attended(self, positions: int) -> int:
        """Positions that a token attends to, summed over layers."""
        return sum(positions if window is None else min(positions, window) for window in self.windows)


def work_of(candidate: Candidate) -> Work | None:
    """The work of a candidate's tokens; None where it cannot be said: experts of which a token meets a few, or keys and
    values that are kept in another form."""
    config = checkpoints.read_config(Path(candidate.checkpoint.path))
    if candidate.dtype not in ITEMSIZE or not _is_plain(config):
        return None
    try:
        shape = model_shape(config, candidate.checkpoint.dtype)
    except (AttributeError, KeyError, TypeError, ValueError):  # no decoder that the plan knows
        return None
    kind = runtimes.get(candidate.runtime)
    streamed = kind.streamed_bytes
    head = shape.head[0] * shape.head[1]
    return Work(
        weight_bytes=streamed(candidate, shape) if streamed else candidate.weight_bytes,
        body_weights=shape.product_weights - head,
        head_weights=head,
        kv_bytes=shape.kv_bytes(ITEMSIZE[candidate.dtype]) // shape.layers,
        attention_width=shape.heads * shape.head_dim,
        windows=shape.windows,
        dtype=candidate.dtype,
        integers=candidate.checkpoint.format == "compressed-tensors" and not kind.unpacks,
    )


def _is_plain(config: dict[str, Any]) -> bool:
    sections = (config, config.get("text_config") or {})
    return not any("expert" in key or key == "kv_lora_rank" for section in sections for key in section)


def _sum_up_to(length: int, window: int | None) -> int:
    """1 + 2 + … + `length`, no term above `window`."""
    rising = length if window is None else min(length, window)
    return rising * (rising + 1) // 2 + (length - rising) * rising
