"""Loading a checkpoint as a model, a packed embedding and an adapter included.

transformers loads packed linear layers itself. For an embedding it looks for the weight that packing took away (seen in
5.17), so such a checkpoint is unpacked here, and loaded like one that was never quantized.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.checkpoints import quantization_config, read_headers, read_tensors
from pennyweight.errors import StageError
from pennyweight.quantization import adapter, decoder
from pennyweight.quantization.packed import PACKED, PARTS, read_quantized

if TYPE_CHECKING:
    import torch

GENERATION = "generation_config.json"


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model that lies in `folder`, dense or packed, computing in `dtype`. Raises StageError for missing tensors."""
    from transformers import AutoModelForCausalLM

    if embedding_is_packed(folder):
        model = _load_unpacked(folder, dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    adapter.attach(model, folder)
    return model.eval()


def _load_unpacked(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(_plain_config(folder), dtype=dtype)
    tensors = {name: value for name, value in read_tensors(folder).items() if not name.endswith(PARTS)}
    tensors |= {f"{name}.weight": layer.dequantize() for name, layer in read_quantized(folder).items()}
    absent = set(model.load_state_dict(tensors, strict=False).missing_keys)
    if decoder.is_tied(model):
        absent.discard(f"{decoder.head_name(model)}.weight")
    if absent:
        raise StageError(f"{folder} is incomplete: it has no {min(absent)}")
    if (folder / GENERATION).is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    return model


def embedding_is_packed(folder: Path) -> bool:
    import torch
    from transformers import AutoModelForCausalLM

    if quantization_config(folder) is None:
        return False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_plain_config(folder))
    packed = f"{decoder.embedding_name(model)}{PACKED}"
    return any(tensor.name == packed for tensor in read_headers(folder))


def _plain_config(folder: Path) -> Any:
    """The model's config without what it says of the quantization."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    return config
