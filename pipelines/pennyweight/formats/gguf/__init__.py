"""GGUF: one file with weights, sizes and tokenizer, which llama.cpp, OpenVINO GenAI and transformers read.

Quantized layers keep their integers (see `blocks`); norms and biases are float32, other matrices float16. Of bfloat16
that rounds only what lies below 2⁻¹⁴, by less than 2⁻²⁵.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.checkpoints import read_config, read_tensors
from pennyweight.errors import StageError
from pennyweight.formats.exported import Exported
from pennyweight.formats.gguf import architecture, blocks, engines, vocabulary
from pennyweight.formats.source import integer_layers
from pennyweight.quantization import packed

if TYPE_CHECKING:
    import numpy as np
    import torch

#: GGUF's tensor type → its name of a file that mostly has it.
FILE_TYPES = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q4_0": "MOSTLY_Q4_0",
    "Q4_1": "MOSTLY_Q4_1",
    "Q8_0": "MOSTLY_Q8_0",
}


@dataclass(frozen=True)
class Tensor:
    type: str
    data: np.ndarray
    """Values, or bytes (rows, bytes of a row)."""
    change: float = 0.0
    """Largest |Δw| of a quantized layer, in quantization steps."""
    rounding: float = 0.0
    """Largest |Δw| of a matrix that is not quantized."""


def write(source: Path, target: Path) -> Exported:
    """Write a plain or compressed-tensors checkpoint to the file `target`.

    Raises StageError for an architecture, a tokenizer or a layer that GGUF cannot express.
    """
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    kind = architecture.of(config)
    layers = integer_layers(source)
    tensors = _tensors(source, config, kind, layers)
    writer = gguf.GGUFWriter(target, kind.name)
    architecture.add_metadata(writer, kind, config)
    types = Counter(tensor.type for tensor in tensors.values())
    matrices = Counter(tensor.type for tensor in tensors.values() if tensor.data.ndim > 1)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[matrices.most_common(1)[0][0]]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    split = vocabulary.add(writer, source, config.vocab_size)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.data, raw_dtype=gguf.GGMLQuantizationType[tensor.type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Exported(
        path=str(target),
        format="gguf",
        bytes=target.stat().st_size,
        tensors=dict(types),
        quantized=len(layers),
        largest_change=max(tensor.change for tensor in tensors.values()),
        largest_rounding=max(tensor.rounding for tensor in tensors.values()),
        unfit=engines.unfit(kind.name, set(types), split, architecture.rope_is_scaled(config)),
        notes=engines.notes(split),
    )


def _tensors(source: Path, config: Any, kind: architecture.Architecture, layers: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors by their names in the file. Raises StageError for one that GGUF has no name for."""
    names = architecture.tensor_names(kind, config.num_hidden_layers)
    tied = read_config(source).get("tie_word_embeddings", config.tie_word_embeddings)
    found: dict[str, Tensor] = {}

    def put(name: str, make: Any) -> None:
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise StageError(f"GGUF's {kind.name} has no tensor for {name}")
        found[known] = make()

    for name, layer in layers.items():
        order = architecture.row_order(kind, config, f"{name}.weight")
        ordered = layer if order is None else layer.rows(order)
        put(f"{name}.weight", lambda name=name, ordered=ordered: _quantized(name, ordered))
    for name, values in read_tensors(source).items():
        if name.endswith((*packed.PARTS, ".inv_freq")) or (tied and name == "lm_head.weight"):
            continue
        order = architecture.row_order(kind, config, name)
        ordered = values if order is None else values[order]
        offset = kind.norm_offset if name.endswith("norm.weight") else 0.0
        put(name, lambda ordered=ordered, offset=offset: _plain(ordered, offset))
    factors = architecture.rope_factors(config)
    if factors is not None:
        found["rope_freqs.weight"] = Tensor("F32", factors.numpy())
    return found


def _quantized(name: str, layer: Any) -> Tensor:
    packed_layer = blocks.from_layer(name, layer)
    return Tensor(packed_layer.type, packed_layer.data, packed_layer.change)


def _plain(values: torch.Tensor, offset: float) -> Tensor:
    """float32 for a vector; float16 for a matrix, unless that would round float32 or is out of range."""
    import torch

    if values.ndim == 1:
        return Tensor("F32", values.float().add(offset).numpy())
    halves = values.half()
    rounding = (halves.float() - values.float()).abs().max().item()
    if rounding == 0 or (values.dtype == torch.bfloat16 and math.isfinite(rounding)):
        return Tensor("F16", halves.numpy(), rounding=rounding)
    if values.dtype == torch.bfloat16:
        return Tensor("BF16", values.contiguous().view(torch.uint8).numpy())
    return Tensor("F32", values.float().numpy())
