"""Describing a checkpoint folder from its config and its safetensors headers, without loading a tensor.

Safetensors layout: 8 bytes with the header's length N (little endian), N bytes of JSON, then the tensors' bytes
(https://huggingface.co/docs/safetensors, section Format).
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.errors import SourceError
from pennyweight.records import Checkpoint
from pennyweight.store import folder_digest

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
#: Folder of a checkpoint that holds its LoRA adapter.
ADAPTER = "adapter"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

#: A safetensors dtype's name in torch.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}

#: Tensors that describe other tensors, or that a model computes for itself.
_AUXILIARY = ("_scale", "_zero_point", "_shape", "_g_idx", ".inv_freq")
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Tensor:
    """One tensor's place in a safetensors file. `offset` counts from the start of the file; `bytes` is its payload."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    bytes: int

    def read_integers(self) -> tuple[int, ...]:
        """The values of a small integer tensor, such as a `weight_shape`."""
        code = {"I64": "q", "I32": "i"}.get(self.dtype)
        if code is None:
            raise SourceError(f"{self.file}: {self.name} is {self.dtype}, expected integers")
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            return struct.unpack(f"<{math.prod(self.shape)}{code}", stream.read(self.bytes))


def describe(folder: Path, origin: str) -> Checkpoint:
    """What a checkpoint folder holds. `origin` is recorded as given.

    `parameters` counts a packed integer tensor by the shape that it unpacks to, and a tied embedding once. An adapter
    counts in everything. Raises
    SourceError for a folder without config.json or safetensors weights, with pickled weights, or with a broken file.
    """
    config = read_config(folder)
    files = weight_files(folder) + sorted((folder / ADAPTER).glob("*.safetensors"))
    tensors = [tensor for file in files for tensor in read_header(file)]
    quantization = quantization_config(folder)
    packed = bool(quantization) and quantization.get("quant_method") == "compressed-tensors"
    return Checkpoint(
        path=str(folder),
        digest=folder_digest(folder),
        bytes=sum(file.stat().st_size for file in files),
        weight_bytes=sum(tensor.bytes for tensor in tensors),
        format="compressed-tensors" if packed else "safetensors",
        dtype=_dtype(tensors, config),
        parameters=_parameters(tensors, config),
        origin=origin,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises SourceError when there is none, or when it is not a JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(
            f"{folder} is not a checkpoint: it has no config.json",
            "name a folder that transformers' save_pretrained wrote, or a .gguf file",
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise SourceError(f"{path} is not a JSON object")
    return config


def quantization_config(folder: Path) -> dict[str, Any] | None:
    """How the checkpoint is quantized, as its config.json says; None where it is not."""
    return quantization_of(read_config(folder))


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization section of a model's config, also under its former name or inside `text_config`."""
    for section in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if section.get(key):
                return section[key]
    return None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load: those that the index names, else all. Raises SourceError."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"{index} cannot be read: {error!r}") from None
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise SourceError(f"{folder} is incomplete: {INDEX} names {', '.join(missing)}", "fetch the model again")
        return [folder / name for name in names]
    if files := sorted(folder.glob("*.safetensors")):
        return files
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES):
        raise SourceError(
            f"{folder} holds pickled weights ({', '.join(pickles[:3])}), which can run code when they are loaded",
            "convert them to safetensors, or take a revision of the model that has them",
        )
    raise SourceError(f"{folder} has no .safetensors weights", "name a folder that transformers' save_pretrained wrote")


def read_header(file: Path) -> list[Tensor]:
    """All tensors of a safetensors file, without their payload. Raises SourceError for a broken or cut file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _MAX_HEADER):
            raise SourceError(f"{file} is not a safetensors file, or was cut short")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = [_tensor(name, body, file, 8 + length) for name, body in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"{file} has a broken safetensors header: {error!r}") from None
    end = max((tensor.offset + tensor.bytes for tensor in tensors), default=8 + length)
    if end != size:
        raise SourceError(
            f"{file} is {size} bytes, its header says {end}", "it was cut short or changed: fetch it again"
        )
    return tensors


def read_headers(folder: Path) -> list[Tensor]:
    """All tensors of a checkpoint, without their payload. Raises SourceError."""
    return [tensor for file in weight_files(folder) for tensor in read_header(file)]


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors checkpoint, by name."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def _tensor(name: str, body: dict[str, Any], file: Path, data_start: int) -> Tensor:
    begin, end = body["data_offsets"]
    return Tensor(name, body["dtype"], tuple(body["shape"]), file, data_start + begin, end - begin)


def _parameters(tensors: list[Tensor], config: dict[str, Any]) -> int:
    unpacked = {t.name: math.prod(t.read_integers()) for t in tensors if t.name.endswith(".weight_shape")}
    embeddings = {t.shape for t in tensors if t.name.endswith(("embed_tokens.weight", "wte.weight"))}
    tied_heads = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    count = 0
    for tensor in tensors:
        if tensor.name.endswith(".weight_packed"):
            shape_name = tensor.name.removesuffix("packed") + "shape"
            if shape_name not in unpacked:
                raise SourceError(f"{tensor.file}: {tensor.name} has no weight_shape beside it")
            count += unpacked[shape_name]
        elif not tensor.name.endswith(_AUXILIARY) and not (tensor.name in tied_heads and tensor.shape in embeddings):
            count += math.prod(tensor.shape)
    return count


def _dtype(tensors: list[Tensor], config: dict[str, Any]) -> str:
    """The floating dtype that most parameters are in, quantized ones and scales left out; the config's where there is
    none."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype in DTYPES and not tensor.dtype.startswith("F8") and not tensor.name.endswith(_AUXILIARY):
            sizes[DTYPES[tensor.dtype]] += math.prod(tensor.shape)
    if sizes:
        return max(sorted(sizes), key=sizes.__getitem__)
    return str(config.get("dtype") or config.get("torch_dtype") or "unknown")
