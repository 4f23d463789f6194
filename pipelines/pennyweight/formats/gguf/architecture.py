"""What GGUF says of a decoder: its name, sizes and constants, what its tensors are called and how they are laid out.

Key and tensor names are those of the GGUF specification (ggml's docs/gguf.md) and of the `gguf` package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pennyweight.errors import StageError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter


@dataclass(frozen=True)
class Architecture:
    name: str
    """GGUF's name of it."""
    interleaved_rope: bool = False
    """Whether the pairs that RoPE turns lie side by side, where transformers has them half a head apart."""
    norm_offset: float = 0.0
    """What the model adds to its norms' weights, and GGUF has added already."""
    window_period: int = 0
    """All layers but each such one attend to a sliding window; 0: none does."""


#: transformers' model type → architecture.
ARCHITECTURES = {
    "llama": Architecture("llama", interleaved_rope=True),
    "mistral": Architecture("llama", interleaved_rope=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", norm_offset=1.0),
    "gemma2": Architecture("gemma2", norm_offset=1.0, window_period=2),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0, window_period=6),
}


def of(config: Any) -> Architecture:
    """The architecture of a transformers config. Raises StageError for one that is not known here."""
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise StageError(f"no GGUF export for models of type {config.model_type}", f"it knows {known}")
    return ARCHITECTURES[config.model_type]


def tensor_names(architecture: Architecture, layers: int) -> Any:
    """The `gguf` package's map from transformers' tensor names."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    return get_tensor_name_map(number, layers)


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def row_order(architecture: Architecture, config: Any, name: str) -> torch.Tensor | None:
    """The order in which GGUF has a projection's outputs, as indices; None where it has them as they are."""
    import torch

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or not architecture.interleaved_rope:
        return None
    rows = torch.arange(heads * head_size(config))
    return rows.view(heads, 2, -1).transpose(1, 2).flatten()


def add_metadata(writer: GGUFWriter, architecture: Architecture, config: Any) -> None:
    """Sizes and constants. Raises StageError for what the architecture cannot express in GGUF."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(architecture, config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if architecture.name == "llama":
        writer.add_rope_dimension_count(head_size(config))
    if architecture.window_period:
        _add_windows(writer, architecture, config)
    _add_rope(writer, architecture, config)


def rope_is_scaled(config: Any) -> bool:
    return _rope(config)["rope_type"] != "default"


def rope_factors(config: Any) -> torch.Tensor | None:
    """What each of RoPE's frequencies is divided by, float32 (head size / 2); None where by nothing.

    Llama 3.1's scaling, as its own model computes it.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = head_size(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / scaled


def _context(architecture: Architecture, config: Any) -> int:
    """Positions that a reader is right for: one without windows sees what the model sees up to the first window."""
    window = getattr(config, "sliding_window", None)
    slides = window and not architecture.window_period and getattr(config, "use_sliding_window", True)
    return min(config.max_position_embeddings, window) if slides else config.max_position_embeddings


def _add_windows(writer: GGUFWriter, architecture: Architecture, config: Any) -> None:
    period = architecture.window_period
    expected = [
        "full_attention" if (index + 1) % period == 0 else "sliding_attention"
        for index in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != expected:
        raise StageError(f"{architecture.name} in GGUF has full attention in layers {period}, {2 * period}, … alone")
    if config.query_pre_attn_scalar != head_size(config):
        raise StageError(f"{architecture.name} in GGUF scales attention by the head size, this model by another number")
    writer.add_sliding_window(config.sliding_window)
    if cap := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(cap)
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)


def _rope(config: Any) -> dict[str, Any]:
    """RoPE's parameters, those of full attention where there are two kinds."""
    parameters = config.rope_parameters
    return parameters.get("full_attention", parameters)


def _add_rope(writer: GGUFWriter, architecture: Architecture, config: Any) -> None:
    from gguf import RopeScalingType

    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if local := config.rope_parameters.get("sliding_attention"):
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] not in ("default", "llama3"):
        raise StageError(f"no GGUF export for RoPE of type {rope['rope_type']}", "it knows default, linear and llama3")
