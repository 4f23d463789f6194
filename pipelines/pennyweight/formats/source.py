"""What is exported: a checkpoint, and its integers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pennyweight import checkpoints
from pennyweight.errors import StageError, UsageError

if TYPE_CHECKING:
    from pennyweight.quantization.grid import QuantizedLinear


def locate(source: str) -> Path:
    """The folder of a checkpoint: `source` itself, or that of the candidate `RUN[:CANDIDATE]`, the winner by default.

    Raises UsageError, SourceError.
    """
    path = Path(source)
    if path.is_dir() and not (path / "run.json").is_file():
        checkpoints.read_config(path)
        return path
    from pennyweight.compare import locate as locate_candidate

    _, result = locate_candidate(source)
    if result.checkpoint is None:
        raise UsageError(f"{result.id} has no checkpoint: {'; '.join(result.verdict.reasons)}")
    if not Path(result.checkpoint.path).is_dir():
        raise UsageError(
            f"the checkpoint of {result.id} is gone: there is no {result.checkpoint.path}",
            "run the recipe again; what is in the store is not computed twice",
        )
    return Path(result.checkpoint.path)


def integer_layers(folder: Path) -> dict[str, QuantizedLinear]:
    """A checkpoint's quantized layers by module name; none where it is plain.

    Raises StageError for one that is quantized to something else than groups of integers.
    """
    from pennyweight.quantization import packed

    quantization = checkpoints.quantization_config(folder)
    if quantization is None:
        return {}
    if quantization.get("quant_method") != "compressed-tensors" or quantization.get("format") != "pack-quantized":
        found = quantization.get("format") or quantization.get("quant_method")
        raise StageError(
            f"{folder} is quantized as {found}: its integers have no groups that other formats know",
            "export a w8a16, w4a16 or w3a16 checkpoint",
        )
    return packed.read_quantized(folder)
