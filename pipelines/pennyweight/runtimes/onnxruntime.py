"""The `onnxruntime` runtime: exports through onnxruntime-genai's builder, scores through plain onnxruntime.

The checkpoint's own integers reach the ONNX file; every export is checked for that before it is used.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight import checkpoints, machine
from pennyweight.errors import StageError
from pennyweight.formats import gptq
from pennyweight.quantization import packed
from pennyweight.quantization.grid import QuantizedLinear
from pennyweight.records import Candidate, Checkpoint
from pennyweight.runtimes import Limits, RuntimeKind, onnx_embedding
from pennyweight.runtimes.onnx_integers import MODEL, check_integers, drop_symmetric_zero_points
from pennyweight.runtimes.waves import Choose, Waves

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch

    from pennyweight.plan.sizes import ModelShape

DATA = "model.onnx.data"
CONFIG = "genai_config.json"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
#: Nodes that the builder would quantize unasked.
HEAD_AND_EMBEDDING = ("/lm_head/MatMul", "/model/embed_tokens/Gather")
#: Operators that read rows of their tables: those of the tokens, or of their positions.
LOOKUPS = ("Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding")


def compute_dtype(checkpoint: Checkpoint, device: str) -> str:
    return "float16" if device == "cuda" else "float32"


def export(checkpoint: Checkpoint, device: str, files: Path) -> None:
    """Write the ONNX model and the generation config to `files`.

    Raises StageError where the builder fails, or where a tensor of the file is not what the checkpoint says.
    """
    import onnx

    scratch = files.parent / "scratch"
    scratch.mkdir()
    source, layers = Path(checkpoint.path), {}
    if checkpoint.format == "compressed-tensors":
        layers = {name: _in_whole_bytes(layer) for name, layer in packed.read_quantized(source).items()}
        source = _readable(source, layers, scratch / "gptq")
    _build(source, layers, device, scratch, files)
    if layers:
        model = onnx.load(files / MODEL)
        drop_symmetric_zero_points(model)
        if EMBEDDING in layers:
            onnx_embedding.quantize(model, layers[EMBEDDING], tied=layers.get(HEAD) is layers[EMBEDDING])
        (files / DATA).unlink()
        onnx.save_model(model, files / MODEL, save_as_external_data=True, location=DATA, size_threshold=1024)
    _forget_where_it_was_built(files)
    check_integers(files, layers)
    _remove(scratch)


def _in_whole_bytes(layer: QuantizedLinear) -> QuantizedLinear:
    """3-bit integers as 4-bit ones of the same values: onnxruntime has no others between 2 and 4."""
    if layer.bits != 3:
        return layer
    return QuantizedLinear(layer.integers + 4, layer.scales, layer.zeros + 4, 4)


def _readable(source: Path, layers: dict[str, QuantizedLinear], target: Path) -> Path:
    """The checkpoint as the builder reads it: in GPTQ's layout, the embedding in floating point.

    A head that shares the embedding's integers is added to `layers`.
    """
    import torch

    dense = {}
    if EMBEDDING in layers:
        dense[f"{EMBEDDING}.weight"] = layers[EMBEDDING].dequantize()
        if checkpoints.read_config(source).get("tie_word_embeddings"):
            layers[HEAD] = layers[EMBEDDING]
    linears = {name: layer for name, layer in layers.items() if name != EMBEDDING}
    # In float32 the builder gets back the integers that it is given; it masks the carry of a zero of 0.
    gptq.write(source, target, linears, torch.float32, "gptq", dense)
    return target


def _build(source: Path, layers: dict[str, QuantizedLinear], device: str, scratch: Path, files: Path) -> None:
    bits = max((layer.bits for name, layer in layers.items() if name not in (HEAD, EMBEDDING)), default=None)
    plain = "fp16" if device == "cuda" else "fp32"
    fusable = _attention_is_uniform(layers)
    job = {
        "source": str(source),
        "target": str(files),
        "precision": f"int{bits}" if bits else plain,
        "provider": device,
        "cache": str(scratch / "cache"),
        "options": [
            f"nodes_to_exclude={','.join(HEAD_AND_EMBEDDING)}",
            *([] if fusable else ["fuse_qkv=false"]),
            *(["shared_embeddings=false"] if EMBEDDING in layers else []),
        ],
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


def _forget_where_it_was_built(files: Path) -> None:
    """The builder signs its file with the git commit of the folder it is called in; the same checkpoint must give the
    same bytes everywhere."""
    import onnx

    model = onnx.load(files / MODEL, load_external_data=False)
    model.producer_version = model.producer_version.partition("+")[0]
    onnx.save_model(model, files / MODEL)


def sizes(files: Path) -> tuple[int, int]:
    """Bytes of the model's files, and of the tensors larger than 1 KiB, which are kept beside the graph."""
    import onnx

    model = onnx.load(files / MODEL, load_external_data=False)
    return sum((files / name).stat().st_size for name in (MODEL, DATA)), sum(_lengths(model).values())


def streamed_bytes(candidate: Candidate, shape: ModelShape) -> int:
    """All tensors but an embedding that is not the head too, and the tables of rotary positions."""
    import onnx

    model = onnx.load(Path(candidate.path) / MODEL, load_external_data=False)
    whole = {name for node in model.graph.node if node.op_type not in LOOKUPS for name in node.input}
    return sum(length for name, length in _lengths(model).items() if name in whole)


def _lengths(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of the tensors larger than 1 KiB, which are kept beside the graph."""
    return {
        tensor.name: int(entry.value)
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "length" and int(entry.value) > 1024
    }


def quantized_tensors(files: Path) -> int:
    import onnx

    model = onnx.load(files / MODEL, load_external_data=False)
    return sum(node.op_type in ("MatMulNBits", "GatherBlockQuantized") for node in model.graph.node)


def limits(candidate: Candidate) -> Limits:
    """onnxruntime computes the logits of all of a prompt's tokens, in float32."""
    model = _model_of(Path(candidate.path))
    decoder, itemsize = model["decoder"], {"float32": 4, "float16": 2}[candidate.dtype]
    keys = decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]
    return Limits(
        context=model["context_length"],
        vocabulary=model["vocab_size"],
        token_bytes=2 * keys * itemsize,
        prompt_bytes=4 * model["vocab_size"],
    )


def _model_of(folder: Path) -> dict[str, Any]:
    """What the generation config says of the model."""
    return json.loads((folder / CONFIG).read_text())["model"]


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


class OnnxSession(Waves):
    """Scores through an `InferenceSession`, generates through onnxruntime-genai; each is loaded when first used."""

    def __init__(self, candidate: Candidate, device: str):
        super().__init__()
        self._folder = Path(candidate.path)
        self._model = _model_of(self._folder)
        self._device = device
        self._scorer: Any = None
        self._generator: Any = None
        self._buffer: np.ndarray | None = None
        self.context: int | None = self._model["context_length"]

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

    def columns(
        self, ids: np.ndarray, new_tokens: int, stop: bool, choose: Choose | None = None
    ) -> Iterator[np.ndarray]:
        return self._columns_of(self._load_generator(), ids, new_tokens, stop, choose)

    def _columns_of(
        self, model: Any, ids: np.ndarray, new_tokens: int, stop: bool, choose: Choose | None
    ) -> Iterator[np.ndarray]:
        import numpy as np
        import onnxruntime_genai as og

        requests, length = ids.shape
        total = length + new_tokens
        params = og.GeneratorParams(model)
        shortest = 0 if stop else total
        params.set_search_options(max_length=total, min_length=shortest, batch_size=requests, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(np.ascontiguousarray(ids, np.int32))
        for _ in range(new_tokens):
            if choose is not None:
                _leave_only(choose(generator.get_logits()[:, -1]), generator)
            generator.generate_next_token()
            yield np.array(generator.get_next_tokens(), np.int64)
            if stop and generator.is_done():
                return

    def ends(self) -> list[int]:
        end = self._model["eos_token_id"]
        return [end] if isinstance(end, int) else list(end)

    def forget_scorer(self) -> None:
        import gc

        self._scorer = self._buffer = None
        gc.collect()

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
            self._dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[inputs[self._past_names[0]].type]
            decoder = self._model["decoder"]
            self._kv_heads, self._head_size = decoder["num_key_value_heads"], decoder["head_size"]
            self._vocabulary = self._model["vocab_size"]
        return self._scorer

    def _load_generator(self) -> Any:
        import onnxruntime_genai as og

        if self._generator is None:
            og.disable_telemetry_events()
            config = og.Config(str(self._folder))
            # Left alone it generates on one thread.
            options = {"intra_op_num_threads": machine.threads()}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._generator = og.Model(config)
        return self._generator


def _leave_only(tokens: np.ndarray, generator: Any) -> None:
    """Make a greedy generator take these tokens, (requests,), next."""
    import numpy as np

    logits = np.asarray(generator.get_logits())
    logits = np.full_like(logits, np.finfo(logits.dtype).min)
    logits[np.arange(len(tokens)), -1, tokens] = 0
    generator.set_logits(logits)


RUNTIME = RuntimeKind(
    version=2,
    libraries=("onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda"),
    export=export,
    load=OnnxSession,
    compute_dtype=compute_dtype,
    limits=limits,
    sizes=sizes,
    quantized_tensors=quantized_tensors,
    streamed_bytes=streamed_bytes,
)
