"""A quantized embedding in an exported ONNX file.

The model builder writes an embedding as a `Gather` of floats. Here it becomes a `GatherBlockQuantized` of the
checkpoint's own integers (an operator of onnxruntime's com.microsoft domain), which a tied head shares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pennyweight.errors import StageError
from pennyweight.quantization.grid import QuantizedLinear

if TYPE_CHECKING:
    import numpy as np
    import onnx

NODE = "/model/embed_tokens/GatherBlockQuantized"
HEAD = "/lm_head/MatMulNBits"


def quantize(model: onnx.ModelProto, layer: QuantizedLinear, tied: bool) -> None:
    """Let the embedding read `layer`'s integers, those of the head where they are `tied`, in place.

    Raises StageError where the file has no such embedding or head.
    """
    from onnx import helper

    graph = model.graph
    gather = _only(graph, lambda node: node.op_type == "Gather" and node.name.startswith("/model/embed_tokens/"))
    dense, ids = gather.input
    if tied:
        head = _only(graph, lambda node: node.name == HEAD)
        values, nodes = _shared(graph, list(head.input[1:]), len(layer.integers))
    else:
        values, nodes = _own(graph, layer), []
    quantized = helper.make_node(
        "GatherBlockQuantized",
        [values[0], ids, *values[1:]],
        list(gather.output),
        NODE,
        domain="com.microsoft",
        bits=layer.bits,
        block_size=layer.group_size,
        gather_axis=0,
        quantize_axis=1,
    )
    at = list(graph.node).index(gather)
    graph.node.remove(gather)
    for node in (quantized, *reversed(nodes)):
        graph.node.insert(at, node)
    graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name == dense))


def _shared(graph: Any, inputs: list[str], rows: int) -> tuple[list[str], list[Any]]:
    """The head's tensors as matrices of one row a token, and the nodes that make them so."""
    import numpy as np
    from onnx import helper, numpy_helper

    shape = "/model/embed_tokens/shape"
    graph.initializer.append(numpy_helper.from_array(np.array([rows, -1]), shape))
    names = [f"{name}/rows" for name in inputs]
    nodes = [
        helper.make_node("Reshape", [name, shape], [matrix], f"/model/embed_tokens/Reshape_{number}")
        for number, (name, matrix) in enumerate(zip(inputs, names))
    ]
    return names, nodes


def _own(graph: Any, layer: QuantizedLinear) -> list[str]:
    from onnx import numpy_helper

    tensors = {"qweight": _bytes(layer.integers.numpy(), layer.bits), "scales": layer.scales.numpy()}
    if not layer.symmetric:
        tensors["qzeros"] = _bytes(layer.zeros.numpy(), layer.bits)
    named = {f"model.embed_tokens.{part}": values for part, values in tensors.items()}
    graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in named.items())
    return list(named)


def _bytes(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 (rows, bytes): two 4-bit integers a byte, the first in its low half."""
    import numpy as np

    if bits == 8:
        return values
    even = np.pad(values, ((0, 0), (0, values.shape[1] % 2)))
    return even[:, ::2] | even[:, 1::2] << 4


def _only(graph: Any, wanted: Any) -> Any:
    found = [node for node in graph.node if wanted(node)]
    if len(found) != 1:
        raise StageError("the exported file has no embedding that can be quantized", "leave out `embedding`")
    return found[0]
