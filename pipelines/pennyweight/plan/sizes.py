"""Shapes of a model's tensors, and the exact bytes of the checkpoints and exports made from them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pennyweight.recipe import ACTIVATIONS, PER_CHANNEL, Quantize, Recover, scheme_bits

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
#: The exported tensors that are counted are larger than this; scalars and tiny vectors stay inside the graph.
ONNX_SMALL_BYTES = 1024


@dataclass(frozen=True)
class ModelShape:
    """A decoder's tensors, as its config declares them."""

    linears: dict[str, tuple[int, int]]
    """Linear layers without the head: name → (out, in)."""
    others: dict[str, int]
    """Elements of every other tensor but the embedding and the head: norms, biases, buffers."""
    head: tuple[int, int]
    """(vocabulary, hidden size), the embedding's shape too."""
    head_name: str
    embedding_name: str
    tied: bool
    """The head is the embedding, transposed."""
    layers: int
    windows: tuple[int | None, ...]
    """How many positions each layer attends to; None: all before."""
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    context: int
    """Positions that the model knows."""
    intermediate: int
    dtype: str

    @property
    def hidden(self) -> int:
        return self.head[1]

    @property
    def parameters(self) -> int:
        """Elements of all tensors in a checkpoint, a tied head's once."""
        matrices = sum(rows * columns for rows, columns in self.linears.values())
        return matrices + sum(self.others.values()) + math.prod(self.head) * (1 if self.tied else 2)

    @property
    def product_weights(self) -> int:
        """Weights that every token is multiplied with: 2 floating-point operations each."""
        return sum(rows * columns for rows, columns in self.linears.values()) + math.prod(self.head)

    def kv_bytes(self, itemsize: int) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


def model_shape(config: dict[str, Any], dtype: str) -> ModelShape:
    """Shapes of the decoder that `config` declares; takes no memory for its weights.

    `dtype` is what its checkpoint is stored in. Raises ValueError for a model type that transformers does not know.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    body = {key: value for key, value in config.items() if key != "quantization_config"}
    parsed = AutoConfig.for_model(**body)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(parsed)
    head = model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    linears = {
        name: (module.out_features, module.in_features)
        for module, name in names.items()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    embedding = names[model.get_input_embeddings()]
    matrices = {f"{name}.weight" for name in (*linears, names[head], embedding)}
    text = parsed.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rotary = getattr(text, "partial_rotary_factor", None) or 1.0
    return ModelShape(
        linears=linears,
        others={name: value.numel() for name, value in model.state_dict().items() if name not in matrices},
        head=(head.out_features, head.in_features),
        head_name=names[head],
        embedding_name=embedding,
        tied=head.weight is model.get_input_embeddings().weight,
        layers=text.num_hidden_layers,
        windows=_windows(text),
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=head_dim,
        rotary_dim=int(head_dim * rotary),
        context=text.max_position_embeddings,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        dtype=dtype,
    )


def _windows(text: Any) -> tuple[int | None, ...]:
    """Layers that keep no keys and values, such as linear attention, attend to no position."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return (window,) * text.num_hidden_layers
    known = {"full_attention": None, "sliding_attention": window}
    return tuple(known.get(kind, 0) for kind in kinds)


def quantized_layers(shape: ModelShape, step: Quantize) -> dict[str, tuple[int, int, int]]:
    """Layers that a step quantizes: name → (out, in, bits). With scheme auto those that it may, the widest way."""

    def bits(scheme: str) -> int:
        return max(width for width in step.choices if width < 16) if scheme == "auto" else scheme_bits(scheme)

    chosen = {
        name: (*size, bits(step.scheme)) for name, size in shape.linears.items() if not is_ignored(name, step.ignore)
    }
    if step.head != "none":
        chosen[shape.head_name] = (*shape.head, bits(step.head))
    if step.embedding != "none":
        chosen[shape.embedding_name] = (*shape.head, bits(step.embedding))
    return chosen


def is_ignored(name: str, patterns: list[str]) -> bool:
    """compressed-tensors' rule: a module's full name, or `re:` and an expression that matches from its start.

    An expression that cannot be compiled matches nothing, and is reported as such.
    """
    return any(
        _expression(pattern).match(name) if pattern.startswith("re:") else pattern == name for pattern in patterns
    )


def _expression(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error:
        return re.compile("(?!)")


def dense_bytes(shape: ModelShape) -> int:
    """Tensor bytes of a checkpoint stored in one floating-point dtype."""
    return shape.parameters * ITEMSIZE[shape.dtype]


def packed_bytes(shape: ModelShape, step: Quantize) -> int:
    """Tensor bytes of a quantized checkpoint in compressed-tensors' formats.

    A tied head that is quantized is stored beside the embedding, which stays as it is; a quantized embedding is the
    tied head too, and is stored once. A quantized KV cache adds a scale for each layer's keys and one for its values.
    With scheme auto it is the most that the budget allows.
    """
    itemsize = ITEMSIZE[shape.dtype]
    total = dense_bytes(shape)
    if step.budget:
        return min(total, step.budget.allowed(shape.parameters, total))
    for name, (rows, columns, bits) in quantized_layers(shape, step).items():
        if not (name == shape.head_name and shape.tied):
            total -= rows * columns * itemsize
        total += layer_bytes(rows, columns, bits, step, itemsize)
    return total + (0 if step.kv_cache == "none" else 2 * shape.layers * itemsize)


def adapter_bytes(shape: ModelShape, quantized: Quantize, step: Recover) -> int:
    """Tensor bytes of the LoRA adapter that `step` adds to the blocks' quantized layers; 0 where it adds none."""
    if not step.keeps_adapter:
        return 0
    layers = [shape.linears[name] for name in quantized_layers(shape, quantized) if name in shape.linears]
    return ITEMSIZE[shape.dtype] * step.rank * sum(rows + columns for rows, columns in layers)


def layer_bytes(rows: int, columns: int, bits: int, step: Quantize, itemsize: int) -> int:
    """Bytes of one quantized layer (out, in), with scales of `itemsize` bytes for groups of g, or for each output.

    Where weights alone are rounded: weight_packed, int32 (out, ⌈in·bits/32⌉); weight_scale (out, in/g); weight_shape,
    2 × int64; and where asymmetric weight_zero_point, int32 (⌈out·bits/32⌉, in/g). Where activations are rounded too,
    weight_scale and a byte a weight.
    """
    groups = 1 if step.scheme in PER_CHANNEL else columns // step.group_size
    scales = itemsize * rows * groups
    if step.scheme in ACTIVATIONS:
        return rows * columns + scales
    zeros = 0 if step.symmetric else 4 * ceil_div(rows * bits, 32) * groups
    return 4 * rows * ceil_div(columns * bits, 32) + scales + 16 + zeros


def onnx_bytes(shape: ModelShape, step: Quantize | None, device: str) -> int:
    """Tensor bytes of an exported ONNX model: the sum over its graph's initializers larger than 1 KiB."""
    return sum(size for size in onnx_tensors(shape, step, device) if size > ONNX_SMALL_BYTES)


def gguf_bytes(shape: ModelShape, step: Quantize | None) -> int:
    """Tensor bytes of an exported GGUF file.

    32 weights are 18 bytes in Q4_0 (3 and 4 bits), 20 with zero points (Q4_1), 34 in Q8_0; other matrices are float16,
    or as they are where that would round them, and vectors float32. A tied head is stored once, unless it is quantized
    by a scheme of its own.
    """
    chosen = quantized_layers(shape, step) if step else {}
    matrices = {**shape.linears, shape.embedding_name: shape.head}
    if not shape.tied or shape.head_name in chosen:
        matrices[shape.head_name] = shape.head
    total = 4 * sum(count for name, count in shape.others.items() if not name.endswith(".inv_freq"))
    for name, (rows, columns) in matrices.items():
        if name not in chosen or step is None:
            total += rows * columns * (4 if shape.dtype == "float32" else 2)
        else:
            block = 34 if chosen[name][2] > 4 else 18 if step.symmetric else 20
            total += rows * columns // 32 * block
    return total


def onnx_tensors(shape: ModelShape, step: Quantize | None, device: str) -> Iterator[int]:
    """Bytes of each initializer that onnxruntime-genai's builder writes for a Llama-like decoder.

    What is not quantized is float32 on the CPU and float16 on CUDA; q, k and v are merged. A tied head is stored once,
    unless it is quantized by a scheme of its own, and shares a quantized embedding. For each quantized matrix (out, in)
    in groups of g there are uint8 integers (out, in/g, g·bits/8), scales (out · in/g), and if asymmetric uint8 zero
    points (out, ⌈in/g·bits/8⌉); 3 bits take four. The rotary embedding's cosines and sines are two tables (positions,
    rotary size / 2).
    """
    itemsize = 2 if device == "cuda" else 4
    chosen = quantized_layers(shape, step) if step else {}
    shared = shape.tied and shape.head_name not in chosen
    matrices = {**shape.linears, shape.embedding_name: shape.head}
    matrices |= {} if shared else {shape.head_name: shape.head}
    for name, parts in _merged(matrices, chosen).items():
        rows, columns = sum(matrices[part][0] for part in parts), matrices[name][1]
        if name not in chosen or step is None:
            yield rows * columns * itemsize
            continue
        bits, groups = max(4, chosen[name][2]), columns // step.group_size
        yield rows * columns * bits // 8
        yield rows * groups * itemsize
        if not step.symmetric:
            yield rows * ceil_div(groups * bits, 8)
    for parts in _merged(shape.others, chosen, ".bias").values():
        yield sum(shape.others[part] for part in parts) * itemsize
    yield from 2 * [shape.context * (shape.rotary_dim // 2) * itemsize]


def _merged(tensors: dict[str, Any], chosen: dict[str, Any], suffix: str = "") -> dict[str, list[str]]:
    """Exported tensor, named by its first part → its parts: q, k and v, unless some layer quantizes only a part."""
    kept = {name: [name] for name in tensors}
    stems = [name.removesuffix(f"q_proj{suffix}") for name in tensors if name.endswith(f".q_proj{suffix}")]
    attentions = [[f"{stem}{letter}_proj" for letter in "qkv"] for stem in stems]
    if any(len({part in chosen for part in parts}) > 1 for parts in attentions):
        return kept
    for parts in attentions:
        names = [f"{part}{suffix}" for part in parts]
        if all(name in tensors for name in names):
            kept[names[0]] = names
            del kept[names[1]], kept[names[2]]
    return kept


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
