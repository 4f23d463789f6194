"""The `onnxruntime` runtime: exports through onnxruntime-genai's builder, scores through plain onnxruntime.

The checkpoint's own integers reach the ONNX file; every export is checked for that before it is used.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight import machine
from pennyweight.errors import StageError
from pennyweight.formats import gptq
from pennyweight.quantization.grid import QuantizedLinear
from pennyweight.records import Candidate, Checkpoint
from pennyweight.runtimes import Generation, RuntimeKind

if TYPE_CHECKING:
    import numpy as np
    import torch

MODEL = "model.onnx"
DATA = "model.onnx.data"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
#: Projections that the builder merges into one matrix, in this order along the output.
FUSED = {"attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
#: Nodes that the builder would quantize unasked.
HEAD_AND_EMBEDDING = ("/lm_head/MatMul", "/model/embed_tokens/Gather")


def compute_dtype(checkpoint: Checkpoint, device: str) -> str:
    return "float16" if device == "cuda" else "float32"


def export(checkpoint: Checkpoint, device: str, files: Path) -> None:
    """Write the ONNX model and the generation config to `files`.

    Raises StageError where the builder fails, or where a tensor of the file is not what the checkpoint says.
    """
    import torch

    scratch = files.parent / "scratch"
    scratch.mkdir()
    source, layers = Path(checkpoint.path), {}
    if checkpoint.format == "compressed-tensors":
        source = scratch / "gptq"
        # In float32 the builder gets back the integers that it is given; it masks the carry of a zero of 0.
        layers = gptq.write(Path(checkpoint.path), source, torch.float32, "gptq")
    _build(source, layers, device, scratch, files)
    if layers:
        _drop_symmetric_zero_points(files)
    _forget_where_it_was_built(files)
    check_integers(files, layers)
    _remove(scratch)


def _build(source: Path, layers: dict[str, QuantizedLinear], device: str, scratch: Path, files: Path) -> None:
    bits = max((layer.bits for name, layer in layers.items() if name != "lm_head"), default=None)
    plain = "fp16" if device == "cuda" else "fp32"
    fusable = _attention_is_uniform(layers)
    job = {
        "source": str(source),
        "target": str(files),
        "precision": f"int{bits}" if bits else plain,
        "provider": device,
        "cache": str(scratch / "cache"),
        "options": [f"nodes_to_exclude={','.join(HEAD_AND_EMBEDDING)}", *([] if fusable else ["fuse_qkv=false"])],
    }
    job_path = scratch / "job.json"
    job_path.write_text(json.dumps(job))
    command = [sys.executable, "-m", "pennyweight.runtimes.onnx_builder", str(job_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n")  # to the run's log
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise StageError(
            f"onnxruntime-genai could not export {source.name}: {lines[-1] if lines else 'no output'}",
            "the whole output is in the run's log; its model builder may not know this architecture",
        )


def _attention_is_uniform(layers: dict[str, QuantizedLinear]) -> bool:
    """Whether q, k and v of every layer are quantized alike, so that they can be merged."""
    kinds: dict[str, set[tuple[int, int]]] = {}
    counts: dict[str, int] = {}
    for name, layer in layers.items():
        prefix, _, suffix = name.rpartition(".")
        if suffix in ("q_proj", "k_proj", "v_proj"):
            kinds.setdefault(prefix, set()).add((layer.bits, layer.group_size))
            counts[prefix] = counts.get(prefix, 0) + 1
    return all(len(kind) == 1 for kind in kinds.values()) and set(counts.values()) <= {3}


def _drop_symmetric_zero_points(files: Path) -> None:
    """Remove zero points that say what MatMulNBits assumes without them, 2^(bits−1): smaller, and faster to read."""
    import onnx

    model = onnx.load(files / MODEL)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    dropped = set()
    for node in model.graph.node:
        if node.op_type != "MatMulNBits" or len(node.input) <= 3:
            continue
        if (_zero_points(node, values) == 2 ** (_attribute(node, "bits") - 1)).all():
            dropped.add(node.input[3])
            del node.input[3:]
    if not dropped:
        return
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in dropped]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    (files / DATA).unlink()
    onnx.save_model(model, files / MODEL, save_as_external_data=True, location=DATA, size_threshold=1024)


def _forget_where_it_was_built(files: Path) -> None:
    """The builder signs its file with the git commit of the folder it is called in; the same checkpoint must give the
    same bytes everywhere."""
    import onnx

    model = onnx.load(files / MODEL, load_external_data=False)
    model.producer_version = model.producer_version.partition("+")[0]
    onnx.save_model(model, files / MODEL)


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

    Names are `layers.0.attn.qkv_proj`, …, `lm_head`.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load(files / MODEL)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized", "DequantizeLinear"):
            continue
        name = node.name.strip("/").rsplit("/", 1)[0].replace("/", ".").removeprefix("model.")
        if node.op_type != "MatMulNBits":
            found[name] = (np.empty(0), np.empty(0), np.empty(0))
            continue
        bits, rows, columns = (_attribute(node, key) for key in ("bits", "N", "K"))
        groups = -(-columns // _attribute(node, "block_size"))
        blob = numpy_helper.to_array(values[node.input[1]]).reshape(rows, -1)
        scales = numpy_helper.to_array(values[node.input[2]]).reshape(rows, groups)
        if len(node.input) > 3 and node.input[3]:
            zeros = _zero_points(node, values)
        else:
            zeros = np.full((rows, groups), 2 ** (bits - 1), np.uint8)
        found[name] = (_nibbles(blob, bits)[:, :columns], scales, zeros)
    return found


def _zero_points(node: Any, values: dict[str, Any]) -> np.ndarray:
    """uint8 (out, groups). A row of an odd number of 4-bit groups is padded to whole bytes."""
    from onnx import numpy_helper

    bits, rows, columns = (_attribute(node, key) for key in ("bits", "N", "K"))
    groups = -(-columns // _attribute(node, "block_size"))
    return _nibbles(numpy_helper.to_array(values[node.input[3]]).reshape(rows, -1), bits)[:, :groups]


def sizes(files: Path) -> tuple[int, int]:
    """Bytes of the model's files, and of the tensors larger than 1 KiB, which are kept beside the graph."""
    import onnx

    model = onnx.load(files / MODEL, load_external_data=False)
    lengths = [
        int(entry.value)
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "length" and int(entry.value) > 1024
    ]
    return sum((files / name).stat().st_size for name in (MODEL, DATA)), sum(lengths)


def quantized_tensors(files: Path) -> int:
    import onnx

    model = onnx.load(files / MODEL, load_external_data=False)
    return sum(node.op_type == "MatMulNBits" for node in model.graph.node)


def _nibbles(packed: np.ndarray, bits: int) -> np.ndarray:
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


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


class OnnxSession:
    """Scores through an `InferenceSession`, generates through onnxruntime-genai; each is loaded when first used."""

    def __init__(self, candidate: Candidate, device: str):
        self._folder = Path(candidate.path)
        self._device = device
        self._scorer: Any = None
        self._generator: Any = None
        self._buffer: np.ndarray | None = None
        self.context: int | None = self._config()["context_length"]

    def logits(self, ids: np.ndarray) -> torch.Tensor:
        import numpy as np
        import onnxruntime as ort
        import torch

        scorer = self._load_scorer()
        batch, length = ids.shape
        shape = (batch, length, self._vocabulary)
        # One output buffer for all calls: a fresh one each time costs more in page faults than its arithmetic.
        size = int(np.prod(shape))
        if self._buffer is None or self._buffer.size < size:
            self._buffer = np.empty(size, self._dtype)
        output = self._buffer[:size].reshape(shape)
        binding = scorer.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids, np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((batch, length), np.int64))
        empty = np.empty((batch, self._kv_heads, 0, self._head_size), self._dtype)
        for name in self._past_names:
            binding.bind_cpu_input(name, empty)
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(output))
        scorer.run_with_iobinding(binding)
        if self._device != "cpu":
            binding.synchronize_outputs()
        return torch.from_numpy(output)

    def generate(self, ids: np.ndarray, new_tokens: int, stop: bool = False) -> Generation:
        import numpy as np
        import onnxruntime_genai as og

        model = self._load_generator()
        requests, length = ids.shape
        total = length + new_tokens
        start = time.perf_counter()
        params = og.GeneratorParams(model)
        shortest = 0 if stop else total
        params.set_search_options(max_length=total, min_length=shortest, batch_size=requests, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(np.ascontiguousarray(ids, np.int32))
        generator.generate_next_token()
        ttft = time.perf_counter() - start
        steps: list[float] = []
        for _ in range(new_tokens - 1):
            if stop and generator.is_done():
                break
            begin = time.perf_counter()
            generator.generate_next_token()
            steps.append(time.perf_counter() - begin)
        tokens = np.stack([generator.get_sequence(row)[length:] for row in range(requests)])
        return Generation(ttft, steps, tokens.astype(np.int64))

    def _config(self) -> dict[str, Any]:
        return json.loads((self._folder / "genai_config.json").read_text())["model"]

    def close(self) -> None:
        import gc

        self._scorer = self._generator = self._buffer = None
        gc.collect()

    def _load_scorer(self) -> Any:
        import numpy as np
        import onnxruntime as ort

        if self._scorer is None:
            options = ort.SessionOptions()
            options.intra_op_num_threads = machine.threads()
            options.log_severity_level = 3
            self._scorer = ort.InferenceSession(self._folder / MODEL, options, providers=[PROVIDERS[self._device]])
            inputs = {item.name: item for item in self._scorer.get_inputs()}
            self._past_names = [name for name in inputs if name.startswith("past_key_values.")]
            _, self._kv_heads, _, self._head_size = inputs[self._past_names[0]].shape
            self._dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[inputs[self._past_names[0]].type]
            decoder = self._config()
            self._kv_heads = decoder["decoder"]["num_key_value_heads"]
            self._head_size = decoder["decoder"]["head_size"]
            self._vocabulary = decoder["vocab_size"]
        return self._scorer

    def _load_generator(self) -> Any:
        import onnxruntime_genai as og

        if self._generator is None:
            og.disable_telemetry_events()
            self._generator = og.Model(str(self._folder))
        return self._generator


RUNTIME = RuntimeKind(
    version=2,
    libraries=("onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda"),
    export=export,
    load=OnnxSession,
    compute_dtype=compute_dtype,
    sizes=sizes,
    quantized_tensors=quantized_tensors,
)
