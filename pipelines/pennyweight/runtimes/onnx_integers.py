"""The integers of an exported ONNX file: read from its operators' definitions, and compared with the checkpoint's.

`MatMulNBits` and `GatherBlockQuantized` are operators of onnxruntime's com.microsoft domain.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.errors import StageError
from pennyweight.quantization.grid import QuantizedLinear

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto

MODEL = "model.onnx"
#: Projections that the builder merges into one matrix, in this order along the output.
FUSED = {"attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}


def check_integers(files: Path, layers: dict[str, QuantizedLinear]) -> None:
    """Raise StageError unless the file's integers, scales and zero points are the checkpoint's, and nothing else is
    quantized."""
    found = read_integers(files)
    expected = _as_exported(layers, set(found))
    if set(found) != set(expected):
        odd = sorted(set(found) ^ set(expected))
        raise StageError(f"the exported file quantizes other layers than the checkpoint does: {', '.join(odd[:5])}")
    for name, (integers, scales, zeros) in found.items():
        want = expected[name]
        same = (integers == want.integers.numpy()).all() and (zeros == want.zeros.numpy()).all()
        if not same or not (scales == want.scales.numpy().astype(scales.dtype)).all():
            raise StageError(f"{name}: the exported integers or scales are not those of the checkpoint")


def read_integers(files: Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(integers (out, in), scales (out, groups), zeros (out, groups)) of every quantized tensor of an exported file.

    Names are `layers.0.attn.qkv_proj`, …, `lm_head`, `embed_tokens`.
    """
    import numpy as np
    import onnx

    model = onnx.load(files / MODEL)
    values = tensors_of(model)
    found = {}
    for node in model.graph.node:
        name = node.name.strip("/").rsplit("/", 1)[0].replace("/", ".").removeprefix("model.")
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            found[name] = _integers_of(node, values)
        elif node.op_type == "DequantizeLinear":
            found[name] = (np.empty(0), np.empty(0), np.empty(0))
    return found


def drop_symmetric_zero_points(model: ModelProto) -> None:
    """Remove zero points that say what MatMulNBits assumes without them, 2^(bits−1): smaller, and faster to read."""
    values = tensors_of(model)
    dropped = set()
    for node in model.graph.node:
        if node.op_type != "MatMulNBits" or len(node.input) <= 3:
            continue
        if (_integers_of(node, values)[2] == 2 ** (_attribute(node, "bits") - 1)).all():
            dropped.add(node.input[3])
            del node.input[3:]
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in dropped]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def tensors_of(model: ModelProto) -> dict[str, Any]:
    """Constant tensors by name, also by that of a `Reshape` of them."""
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    reshaped = [node for node in model.graph.node if node.op_type == "Reshape" and node.input[0] in values]
    return values | {node.output[0]: values[node.input[0]] for node in reshaped}


def _integers_of(node: Any, values: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row is padded to whole blocks, and its zero points to whole bytes."""
    import numpy as np
    from onnx import numpy_helper

    inputs = list(node.input)
    del inputs[1 if node.op_type == "GatherBlockQuantized" else 0]  # what is multiplied, or the tokens
    blob, scales = (numpy_helper.to_array(values[name]) for name in inputs[:2])
    bits, block_size = _attribute(node, "bits"), _attribute(node, "block_size")
    if node.op_type == "MatMulNBits":
        rows, columns = _attribute(node, "N"), _attribute(node, "K")
    else:
        rows, columns = len(blob), blob.size // len(blob) * 8 // bits
    groups = -(-columns // block_size)
    zeros = np.full((rows, groups), 2 ** (bits - 1), np.uint8)
    if len(inputs) > 2 and inputs[2]:
        zeros = _unpack(numpy_helper.to_array(values[inputs[2]]).reshape(rows, -1), bits)[:, :groups]
    return _unpack(blob.reshape(rows, -1), bits)[:, :columns], scales.reshape(rows, groups), zeros


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 integers from bytes (rows, bytes), low bits first."""
    import numpy as np

    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def _as_exported(layers: dict[str, QuantizedLinear], names: set[str]) -> dict[str, QuantizedLinear]:
    """The checkpoint's layers under the exported file's names, merged where the file merged them."""
    import torch

    short = {name.removeprefix("model.").replace("self_attn.", "attn."): layer for name, layer in layers.items()}
    for name in names:
        prefix, _, block = name.rpartition(".attn.")
        parts = [f"{prefix}.attn.{part.removeprefix('self_attn.')}" for part in FUSED.get(f"attn.{block}", ())]
        if parts and all(part in short for part in parts):
            merged = [short.pop(part) for part in parts]
            short[name] = QuantizedLinear(
                torch.cat([part.integers for part in merged]),
                torch.cat([part.scales for part in merged]),
                torch.cat([part.zeros for part in merged]),
                merged[0].bits,
            )
    return short


def _attribute(node: Any, name: str) -> int:
    return next(attribute.i for attribute in node.attribute if attribute.name == name)
