"""Files that a checkpoint is exported to, its integers, scales and zeros unchanged. One module a format."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pennyweight import checkpoints
from pennyweight.errors import StageError, UsageError, did_you_mean
from pennyweight.formats.exported import Exported
from pennyweight.formats.source import integer_layers, locate

if TYPE_CHECKING:
    from pennyweight.quantization.grid import QuantizedLinear


def export(source: str, kind: str, target: Path) -> Exported:
    """Write a checkpoint to `target` in one of `FORMATS`; it is there whole afterwards, or not at all.

    `source` is a checkpoint's folder, or `RUN[:CANDIDATE]`, the winner by default. Raises UsageError for a call that
    cannot work, StageError where the format cannot hold the checkpoint.
    """
    if kind not in FORMATS:
        raise UsageError(f"unknown format {kind!r}", did_you_mean(kind, list(FORMATS)))
    if target.exists():
        raise UsageError(f"{target} exists", "name another path, or remove it")
    if kind == "gguf" and target.suffix != ".gguf":
        raise UsageError(f"{target} does not end in .gguf", "engines know a GGUF file by its name")
    folder = locate(source)
    if kind != "compressed-tensors" and (folder / checkpoints.ADAPTER).is_dir():
        raise StageError(
            f"{folder} has a LoRA adapter beside its integers, which {kind} files cannot hold",
            "export it to compressed-tensors, or heal with low_rank, which is merged into the integers",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as scratch:
        made = Path(scratch) / "made"
        written = FORMATS[kind](folder, made)
        made.rename(target)
    return written.model_copy(update={"path": str(target)})


def _gguf(source: Path, target: Path) -> Exported:
    from pennyweight.formats import gguf

    return gguf.write(source, target)


def _gptq(source: Path, target: Path) -> Exported:
    from pennyweight.formats import gptq

    return _of_folder("gptq", source, target, gptq.export(source, target))


def _compressed_tensors(source: Path, target: Path) -> Exported:
    """The checkpoint itself."""
    layers = integer_layers(source)
    if not layers:
        raise StageError(f"{source} is not quantized", "a plain checkpoint is exported to gguf or onnx")
    shutil.copytree(source, target)
    return _of_folder("compressed-tensors", source, target, layers)


def _onnx(source: Path, target: Path) -> Exported:
    from pennyweight import machine, runtimes

    device = machine.resolve_device("auto")
    layers = integer_layers(source)
    target.mkdir()
    runtime, checkpoint = runtimes.get("onnxruntime"), checkpoints.describe(source, str(source))
    runtime.export(checkpoint, device, target)
    change = _change_in(runtime.compute_dtype(checkpoint, device), layers)
    return _of_folder("onnx", source, target, layers).model_copy(update={"largest_change": change})


def _change_in(dtype: str, layers: dict[str, QuantizedLinear]) -> float:
    """Bound on |Δw| in quantization steps when scales are rounded to `dtype`."""
    import torch

    def change(layer: QuantizedLinear) -> float:
        rounded = layer.scales.to(getattr(torch, dtype)).float()
        return ((rounded / layer.scales - 1).abs().max() * (2**layer.bits - 1)).item()

    return max((change(layer) for layer in layers.values()), default=0.0)


def _of_folder(kind: str, source: Path, target: Path, layers: dict[str, QuantizedLinear]) -> Exported:
    from pennyweight.quantization import packed

    kinds = Counter(str(layer) for layer in layers.values())
    for tensor in checkpoints.read_headers(source):
        if not tensor.name.endswith(packed.PARTS):
            kinds[checkpoints.DTYPES.get(tensor.dtype, tensor.dtype)] += 1
    return Exported(
        path=str(target),
        format=kind,
        bytes=sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        tensors=dict(kinds),
        quantized=len(layers),
        largest_change=0.0,
    )


FORMATS: dict[str, Callable[[Path, Path], Exported]] = {
    "gguf": _gguf,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
    "onnx": _onnx,
}
