"""Checkpoints in compressed-tensors' `pack-quantized` format, which transformers and vLLM load.

For each quantized layer (out, in) in groups of g:

    weight_packed      int32 (out, ⌈in·bits/32⌉)      integers along the input, low bits first, without gaps
    weight_scale       (out, in/g)                    in the checkpoint's dtype
    weight_zero_point  int32 (⌈out·bits/32⌉, in/g)    packed along the output; absent where symmetric
    weight_shape       int64 (2)
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.checkpoints import DTYPES, INDEX, quantization_of, read_headers, read_tensors
from pennyweight.errors import StageError
from pennyweight.quantization import decoder
from pennyweight.quantization.grid import QuantizedLinear

if TYPE_CHECKING:
    import torch

PACKED = ".weight_packed"
PARTS = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point")
BITS = range(1, 9)


def read_quantized(folder: Path) -> dict[str, QuantizedLinear]:
    """All quantized layers of a compressed-tensors checkpoint, by module name. Raises StageError for odd widths."""
    tensors = read_tensors(folder)
    config = quantization_of(json.loads((folder / "config.json").read_text())) or {}
    groups = (config.get("config_groups") or {}).values()
    declared = {(group.get("weights") or {}).get("num_bits") for group in groups}
    layers = {}
    for name in sorted(name.removesuffix(PACKED) for name in tensors if name.endswith(PACKED)):
        packed = tensors[f"{name}.weight_packed"]
        rows, columns = (int(size) for size in tensors[f"{name}.weight_shape"])
        bits = _bits(packed.shape[1], columns, declared, name)
        scales = tensors[f"{name}.weight_scale"].float()
        zero_point = tensors.get(f"{name}.weight_zero_point")
        layers[name] = QuantizedLinear(
            integers=unpack(packed, bits, (rows, columns)),
            scales=scales,
            zeros=_zeros(zero_point, scales, bits),
            bits=bits,
        )
    return layers


def layer_tensors(name: str, layer: QuantizedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors that hold one layer, by their names in the file. Zero points are left out where symmetric."""
    import torch

    tensors = {
        f"{name}.weight_packed": pack(layer.integers, layer.bits, dim=1),
        f"{name}.weight_scale": layer.scales.to(dtype),
        f"{name}.weight_shape": torch.tensor(layer.integers.shape, dtype=torch.int64),
    }
    if not layer.symmetric:
        tensors[f"{name}.weight_zero_point"] = pack(layer.zeros, layer.bits, dim=0)
    return {key: value.cpu().contiguous() for key, value in tensors.items()}


def pack(values: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """int32 words from uint8 integers (rows, columns), packed along `dim`, low bits first, padded with zeros.

    Where `dim` is 0, packing runs down the rows: (words, columns).
    """
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    # The library wants signed integers, and adds the offset back.
    centred = (values.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    return pack_to_int32(centred, bits, packed_dim=dim).contiguous()


def unpack(packed: torch.Tensor, bits: int, shape: tuple[int, int], dim: int = 1) -> torch.Tensor:
    """uint8 integers of `shape` from int32 words: the inverse of `pack`."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    centred = unpack_from_int32(packed, bits, torch.Size(shape), packed_dim=dim)
    return (centred.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8).contiguous()


def write(source: Path, target: Path, model: Any, layers: dict[str, QuantizedLinear]) -> None:
    """Write `model` with `layers` as integers to `target`; what else is in `source`, its tokenizer say, comes along.

    Tensors that are not quantized keep the dtypes that they have in `source`, and scales take that of their layer.
    """
    import torch

    dtypes = {t.name: getattr(torch, DTYPES[t.dtype]) for t in read_headers(source) if t.dtype in DTYPES}
    head, embedding = decoder.head_name(model), decoder.embedding_name(model)
    tensors = {name: value.to("cpu", dtypes.get(name, value.dtype)) for name, value in model.state_dict().items()}
    if decoder.is_tied(model):
        tensors.pop(f"{head}.weight", None)
    for name, layer in layers.items():
        tensors.pop(f"{name}.weight", None)
        known = f"{name}.weight" in dtypes
        tensors |= layer_tensors(name, layer, dtypes[f"{name}.weight" if known else f"{embedding}.weight"])
    ignore = [name for name in (*decoder.linears(model), head) if name not in layers]
    write_folder(source, target, tensors, quantization_config(layers, ignore), untied=head in layers)


def write_folder(
    source: Path, target: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any], untied: bool
) -> None:
    """Write tensors and a config to `target`; what else is in `source` but its weights comes along."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict({name: value.contiguous() for name, value in tensors.items()}, target)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", INDEX):
            shutil.copy(path, target)
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": quantization}
    if untied:
        config["tie_word_embeddings"] = False
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def quantization_config(layers: dict[str, QuantizedLinear], ignore: list[str]) -> dict[str, Any]:
    """What config.json says of the layers: one group for each kind of grid, as compressed-tensors spells it."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    kinds: dict[tuple[int, int, bool], list[str]] = defaultdict(list)
    for name, layer in layers.items():
        kinds[layer.bits, layer.group_size, layer.symmetric].append(name)
    groups = {}
    for number, ((bits, group_size, symmetric), names) in enumerate(kinds.items()):
        others = [name for other in kinds.values() if other is not names for name in other] + ignore
        weights = QuantizationArgs(
            num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group_size
        )
        groups[f"group_{number}"] = QuantizationScheme(
            targets=_targets(names, others), weights=weights, format="pack-quantized"
        )
    config = QuantizationConfig(
        config_groups=groups, format="pack-quantized", quantization_status="compressed", ignore=ignore
    )
    return config.model_dump(mode="json")


def _targets(names: list[str], others: list[str]) -> list[str]:
    """Patterns that match `names` and none of `others`: by the last part of the name where that tells them apart."""
    taken = {name.rpartition(".")[2] for name in others}
    suffixes = {name.rpartition(".")[2] for name in names}
    short = [rf"re:(.*\.)?{re.escape(suffix)}$" for suffix in sorted(suffixes - taken)]
    return short + sorted(name for name in names if name.rpartition(".")[2] in taken)


def _zeros(zero_point: torch.Tensor | None, scales: torch.Tensor, bits: int) -> torch.Tensor:
    import torch

    if zero_point is None:
        return torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
    return unpack(zero_point, bits, tuple(scales.shape), dim=0)


def _bits(words: int, columns: int, declared: set[int | None], name: str) -> int:
    for bits in sorted(width for width in declared if width in BITS):
        if words == -(-columns * bits // 32):
            return bits
    raise StageError(f"{name}: {words} words for {columns} inputs are of no width that config.json declares")
