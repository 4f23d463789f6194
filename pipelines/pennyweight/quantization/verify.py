"""Proof that a quantized checkpoint is what was meant: its layers, its bytes, and what a fresh process makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.checkpoints import read_headers
from pennyweight.errors import StageError
from pennyweight.quantization import reload
from pennyweight.quantization.bytewise import ByteLinear
from pennyweight.quantization.grid import QuantizedLinear

if TYPE_CHECKING:
    import numpy as np

#: Tokens that the reloaded checkpoint is compared on.
PROBE_TOKENS = 64
#: KL in nats per token, written against reloaded, above which the checkpoint is refused. Low bits may differ between
#: processes; a wrong integer in one layer shows at ten times this.
RELOAD_TOLERANCE = 1e-3


def check_layers(source: Path, quantized: dict[str, QuantizedLinear] | dict[str, ByteLinear]) -> None:
    """Raise StageError if nothing was quantized, a scale is 0, a number is not finite, or a channel that did something
    in `source` does nothing any more."""
    import torch
    from safetensors import safe_open

    if not quantized:
        raise StageError("the step quantized no layer", "shorten `ignore`, or take another scheme")
    where = {tensor.name: tensor.file for tensor in read_headers(source)}
    for name, layer in quantized.items():
        if not (torch.isfinite(layer.scales).all() and (layer.scales != 0).all()):
            raise StageError(f"{name} has scales that are 0 or not finite", "the base may hold NaN or infinity")
        after = layer.dequantize()
        if not torch.isfinite(after).all():
            raise StageError(f"{name} has weights that are not finite", "the base may hold NaN or infinity")
        file = where.get(f"{name}.weight")
        if file is None:
            continue  # a head that was tied, whose weight lies under the embedding's name
        with safe_open(file, "pt") as tensors:
            before = tensors.get_tensor(f"{name}.weight")
        dead = (after == 0).all(1) & (before != 0).any(1)
        if dead.any():
            raise StageError(
                f"{name}: {int(dead.sum())} of {len(dead)} output channels were rounded to nothing",
                "smaller groups, more bits, or `ignore` this layer",
            )


def check_bytes(files: Path, expected: int) -> None:
    """Raise StageError unless the tensors written take exactly the bytes that were predicted."""
    written = sum(tensor.bytes for tensor in read_headers(files))
    if written != expected:
        raise StageError(f"the checkpoint's tensors take {written:,} bytes; {expected:,} were predicted")


def check_reload(files: Path, model: Any) -> float:
    """Load the checkpoint in a fresh process and compare its predictions with `model`'s.

    Returns the largest |Δ log p| over all probe positions and tokens, in nats. Raises StageError where it does not load
    there, or predicts something else.
    """
    import torch

    ids = _probe(model.config.get_text_config().vocab_size)
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.from_numpy(ids).to(model.device)).logits.cpu().float(), -1)
    logits = reload.predict_afresh(files, ids, str(model.dtype).removeprefix("torch."), model.device.type)
    found = torch.log_softmax(torch.from_numpy(logits), -1)
    kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
    if not kl <= RELOAD_TOLERANCE:
        raise StageError(f"the checkpoint predicts something else once it is loaded again: KL {kl:.4f} nats per token")
    return (expected - found).abs().max().item()


def _probe(vocabulary: int) -> np.ndarray:
    """Token ids (1, tokens) from all over the vocabulary."""
    import numpy as np

    return np.random.default_rng(0).integers(0, vocabulary, (1, PROBE_TOKENS))
