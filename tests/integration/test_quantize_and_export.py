"""Quantized checkpoints, and the proof that their integers are what the exported ONNX file computes with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import quantized
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pennyweight import checkpoints, runtimes
from pennyweight.errors import StageError
from pennyweight.quantization.grid import QuantizedLinear
from pennyweight.quantization.packed import read_quantized
from pennyweight.records import Candidate, Checkpoint
from pennyweight.runtimes import onnx_integers, onnxruntime

WINDOWS = np.random.default_rng(0).integers(0, 512, (8, 32))


def make(base: Path, folder: Path, **settings: object) -> Checkpoint:
    windows = WINDOWS if "calibrate" in settings else None
    return checkpoints.describe(quantized.make(base, folder, windows, **settings), "test")


def exported(checkpoint: Checkpoint, folder: Path) -> Path:
    files = folder / "files"
    files.mkdir(parents=True)
    onnxruntime.export(checkpoint, "cpu", files)
    return files


def candidate(checkpoint: Checkpoint, path: Path, runtime: str) -> Candidate:
    return Candidate(
        id="x@y", variant="x", runtime=runtime, checkpoint=checkpoint, path=str(path), digest="", bytes=0,
        weight_bytes=0, dtype="float32",
    )  # fmt: skip


def onnx_weights(files: Path) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """(integers (out, in) centred on 0, scales (out, groups), bits) of each MatMulNBits node, read from its definition:
    B holds N rows of blocks of `block_size` integers, low bits first; without zero points 2^(bits−1) stands for 0."""
    model = onnx.load(files / "model.onnx")
    tensors = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            at = {item.name: item.i for item in node.attribute}
            blob = tensors[node.input[1]].reshape(at["N"], -1)
            wide = blob if at["bits"] == 8 else np.stack([blob & 0xF, blob >> 4], -1).reshape(at["N"], -1)
            assert len(node.input) == 3
            centred = wide[:, : at["K"]].astype(int) - 2 ** (at["bits"] - 1)
            found[node.name] = (centred, tensors[node.input[2]].reshape(at["N"], -1), at["bits"])
    return found


@pytest.fixture(scope="module")
def gptq(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("gptq") / "checkpoint"
    return make(tiny_model, folder, method="gptq", calibrate="text", head="w8a16")


@pytest.fixture(scope="module")
def gptq_onnx(gptq: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(gptq, tmp_path_factory.mktemp("gptq-onnx"))


def test_integers_and_scales_in_the_onnx_file_are_those_of_the_checkpoint(gptq: Checkpoint, gptq_onnx: Path) -> None:
    stored = read_quantized(Path(gptq.path))
    found = onnx_weights(gptq_onnx)
    for layer in range(2):
        prefix, node = f"model.layers.{layer}", f"/model/layers.{layer}"
        groups = {
            f"{node}/attn/qkv_proj/MatMulNBits": [f"{prefix}.self_attn.{part}_proj" for part in "qkv"],
            f"{node}/attn/o_proj/MatMulNBits": [f"{prefix}.self_attn.o_proj"],
            **{f"{node}/mlp/{part}_proj/MatMulNBits": [f"{prefix}.mlp.{part}_proj"] for part in ("gate", "up", "down")},
        }
        for name, parts in groups.items():
            integers, scales, bits = found.pop(name)
            assert bits == 4
            np.testing.assert_array_equal(integers, np.concatenate([stored[p].integers.numpy() for p in parts]) - 8.0)
            np.testing.assert_array_equal(scales, np.concatenate([stored[p].scales.numpy() for p in parts]))
    integers, scales, bits = found.pop("/lm_head/MatMulNBits")
    assert bits == 8
    np.testing.assert_array_equal(integers, stored["lm_head"].integers.numpy() - 128.0)
    np.testing.assert_array_equal(scales, stored["lm_head"].scales.numpy())
    assert not found  # nothing else is quantized


def test_what_transformers_computes_with_is_integer_times_scale(gptq: Checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(gptq.path, dtype=torch.float32)
    model(torch.zeros(1, 1, dtype=torch.long))  # the first pass unpacks the integers
    layer = read_quantized(Path(gptq.path))["model.layers.1.mlp.down_proj"]
    scales = layer.scales.repeat_interleave(layer.group_size, dim=1)
    expected = (layer.integers.float() - 8) * scales
    inputs = torch.eye(256)
    torch.testing.assert_close(model.model.layers[1].mlp.down_proj(inputs).T, expected, rtol=2e-3, atol=1e-5)


def test_exported_file_predicts_what_its_checkpoint_predicts(gptq: Checkpoint, gptq_onnx: Path) -> None:
    assert divergence(gptq, gptq_onnx) <= onnxruntime_tolerance()


def divergence(checkpoint: Checkpoint, files: Path) -> float:
    """Mean KL(checkpoint in transformers ‖ exported file), nats per token."""
    ours = runtimes.get("onnxruntime").load(candidate(checkpoint, files, "onnxruntime"), "cpu").logits(WINDOWS)
    theirs = runtimes.get("transformers").load(candidate(checkpoint, Path(checkpoint.path), "transformers"), "cpu")
    a, b = torch.log_softmax(theirs.logits(WINDOWS).float(), -1), torch.log_softmax(ours.float(), -1)
    kl = (a.exp() * (a - b)).sum(-1).mean().item()
    assert kl >= 0
    return kl


def float_model(path: str | Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def onnxruntime_tolerance() -> float:
    from pennyweight.stages import PARITY_TOLERANCE

    return PARITY_TOLERANCE


def test_right_padding_changes_nothing(gptq: Checkpoint, gptq_onnx: Path) -> None:
    session = runtimes.get("onnxruntime").load(candidate(gptq, gptq_onnx, "onnxruntime"), "cpu")
    alone = session.logits(WINDOWS[:1, :20]).clone()
    padded = session.logits(WINDOWS[:1]).clone()
    torch.testing.assert_close(padded[:, :20], alone, rtol=1e-4, atol=1e-4)


def test_both_runtimes_generate_the_greedy_continuation(tiny_model: Path, tmp_path: Path) -> None:
    base = checkpoints.describe(tiny_model, "test")
    files = exported(base, tmp_path)
    prompts = WINDOWS[:2, :12]
    waves = [
        runtimes.get(name).load(candidate(base, path, name), "cpu").generate(prompts, 6)
        for name, path in (("onnxruntime", files), ("transformers", tiny_model))
    ]
    for wave in waves:
        assert wave.tokens.shape == (2, 6)
        assert len(wave.steps) == 5
        assert wave.ttft > 0
    np.testing.assert_array_equal(waves[0].tokens, waves[1].tokens)


def test_an_unquantized_export_has_no_quantized_tensor(tiny_model: Path, tmp_path: Path) -> None:
    files = exported(checkpoints.describe(tiny_model, "test"), tmp_path)
    assert onnx_integers.read_integers(files) == {}


def test_layers_left_alone_stay_as_they_are_in_both_files(tiny_model: Path, tmp_path: Path) -> None:
    ignored = ["re:.*layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    checkpoint = make(tiny_model, tmp_path / "checkpoint", ignore=ignored)
    stored = load_file(Path(checkpoint.path) / "model.safetensors")
    original = load_file(tiny_model / "model.safetensors")
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        torch.testing.assert_close(stored[f"{name}.weight"], original[f"{name}.weight"], rtol=0, atol=0)
    found = onnx_weights(exported(checkpoint, tmp_path))
    assert len(found) == 12  # seven linears in each of two layers, less two
    assert not any("layers.0/mlp/down_proj" in name or "layers.1/attn/q_proj" in name for name in found)


def test_asymmetric_zero_points_reach_the_file(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = make(tiny_model, tmp_path / "checkpoint", symmetric=False)
    zeros = onnx_integers.read_integers(exported(checkpoint, tmp_path))["layers.0.attn.o_proj"][2]
    expected = read_quantized(Path(checkpoint.path))["model.layers.0.self_attn.o_proj"].zeros.numpy()
    np.testing.assert_array_equal(zeros, expected)
    assert len(np.unique(zeros)) > 1


@pytest.mark.parametrize(
    "settings",
    [
        {"embedding": "w8a16"},
        {"embedding": "w4a16", "symmetric": False},
        {"embedding": "w8a16", "head": "w4a16"},
    ],
    ids=["tied", "tied-asymmetric", "untied"],
)
def test_a_quantized_embedding_is_read_as_integers(
    settings: dict[str, object], tiny_model: Path, tmp_path: Path
) -> None:
    checkpoint = make(tiny_model, tmp_path / "checkpoint", **settings)
    files = exported(checkpoint, tmp_path)
    found = onnx_integers.read_integers(files)
    layer = read_quantized(Path(checkpoint.path))["model.embed_tokens"]
    for values, expected in zip(found["embed_tokens"], (layer.integers, layer.scales, layer.zeros)):
        np.testing.assert_array_equal(values, expected.numpy())
    model = onnx.load(files / "model.onnx", load_external_data=False)
    assert not any(tensor.name == "model.embed_tokens.weight" for tensor in model.graph.initializer)
    if "head" not in settings:
        np.testing.assert_array_equal(found["lm_head"][0], found["embed_tokens"][0])
        stored = [t for t in model.graph.initializer if np.prod(t.dims) * (8 // layer.bits) == layer.integers.numel()]
        assert len(stored) == 1  # once for both
    assert divergence(checkpoint, files) <= onnxruntime_tolerance()
    prompts = WINDOWS[:2, :12]
    wave = runtimes.get("onnxruntime").load(candidate(checkpoint, files, "onnxruntime"), "cpu").generate(prompts, 4)
    assert wave.tokens.shape == (2, 4)


def test_three_bits_keep_their_values_in_four(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = make(tiny_model, tmp_path / "checkpoint", scheme="w3a16")
    found = onnx_weights(exported(checkpoint, tmp_path))
    integers, scales, bits = found["/model/layers.1/mlp/down_proj/MatMulNBits"]
    layer = read_quantized(Path(checkpoint.path))["model.layers.1.mlp.down_proj"]
    assert bits == 4
    np.testing.assert_array_equal(integers, layer.integers.numpy() - 4.0)
    np.testing.assert_array_equal(scales, layer.scales.numpy())


def test_rounding_is_to_the_nearest_integer_of_the_group(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = make(tiny_model, tmp_path / "checkpoint", scheme="w8a16")
    layer = read_quantized(Path(checkpoint.path))["model.layers.0.mlp.up_proj"]
    weight = load_file(tiny_model / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float()
    scales = layer.scales.repeat_interleave(32, dim=1)
    distance = (weight - (layer.integers.float() - 128) * scales).abs() / scales
    assert distance.max() <= 0.55  # half a step, and what bfloat16 arithmetic adds


def test_gptq_loses_less_than_rounding_on_the_text_it_saw(tiny_model: Path, tmp_path: Path, gptq: Checkpoint) -> None:
    rtn = make(tiny_model, tmp_path / "rtn", head="w8a16")
    base, *others = (
        torch.log_softmax(float_model(path)(torch.from_numpy(WINDOWS)).logits, -1)
        for path in (tiny_model, rtn.path, gptq.path)
    )  # fmt: skip
    kl_rtn, kl_gptq = ((base.exp() * (base - other)).sum(-1).mean().item() for other in others)
    assert kl_gptq < kl_rtn


def test_quantizing_twice_gives_the_same_bytes(tiny_model: Path, tmp_path: Path, gptq: Checkpoint) -> None:
    again = make(tiny_model, tmp_path / "again", method="gptq", calibrate="text", head="w8a16")
    assert again.digest == gptq.digest


def test_an_integer_that_changed_on_the_way_is_found(gptq: Checkpoint, gptq_onnx: Path) -> None:
    layers = read_quantized(Path(gptq.path))
    onnx_integers.check_integers(gptq_onnx, layers)
    name = "model.layers.1.mlp.up_proj"
    changed = layers[name].integers.clone()
    changed[3, 5] ^= 1
    tampered = layers | {name: QuantizedLinear(changed, layers[name].scales, layers[name].zeros, 4)}
    with pytest.raises(StageError, match=r"up_proj.*not those of the checkpoint"):
        onnx_integers.check_integers(gptq_onnx, tampered)
    with pytest.raises(StageError, match="quantizes other layers"):
        onnx_integers.check_integers(gptq_onnx, {key: value for key, value in layers.items() if key != name})
