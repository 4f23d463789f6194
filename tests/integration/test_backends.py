"""Schemes that other people's quantizers make: what they write, and what the `transformers` runtime makes of it.

What the runtime should compute is worked out here from the files alone, on a model that was never quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from pennyweight import checkpoints, runtimes
from pennyweight.errors import StageError
from pennyweight.formats import gptq
from pennyweight.plan.sizes import model_shape, packed_bytes
from pennyweight.quantization import decoder, methods, packed
from pennyweight.quantization.bytewise import read_bytewise
from pennyweight.quantization.packed import read_quantized
from pennyweight.recipe import Quantize
from pennyweight.records import Candidate
from pennyweight.steps import StepContext, quantize
from pennyweight.steps.backends import autoround, gptqmodel, llmcompressor

WINDOWS = np.random.default_rng(0).integers(0, 512, (8, 32))
PROBE = np.random.default_rng(1).integers(0, 512, (2, 24))


@pytest.fixture(scope="module")
def make(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint by llm-compressor, made once for each choice of settings."""
    made: dict[str, Path] = {}

    def build(**settings: Any) -> Path:
        step = Quantize(**settings)
        key = step.describe()
        if key not in made:
            made[key] = tmp_path_factory.mktemp("checkpoint")
            context = StepContext("cpu", 0, calibration=WINDOWS if step.calibrate else None)
            llmcompressor.run(checkpoints.describe(tiny_model, "test"), step, context, made[key])
        return made[key]

    return build


def round_to_nearest(base: Path, folder: Path, step: Quantize) -> Path:
    """A checkpoint by our own core."""
    folder.mkdir()
    model = decoder.load(checkpoints.describe(base, "test"), "cpu")
    grids = quantize.layer_grids(model, step)
    if step.head != "none":
        decoder.untie(model)
    settings = methods.Settings("rtn", step.scale_search, step.dampening, torch.bfloat16)
    packed.write(base, folder, model, methods.quantize(model, grids, settings, None, lambda *_: None))
    return folder


def load(folder: Path) -> runtimes.Session:
    """The `transformers` runtime, computing in float32."""
    candidate = Candidate(
        id="x@transformers", variant="x", runtime="transformers", checkpoint=checkpoints.describe(folder, "test"),
        path=str(folder), digest="", bytes=0, weight_bytes=0, dtype="float32",
    )  # fmt: skip
    return runtimes.get("transformers").load(candidate, "cpu")


def plain(base: Path, folder: Path) -> Any:
    """The base's architecture with the checkpoint's weights, none of its layers knowing of any quantization."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stored = load_file(folder / "model.safetensors")
    layers = {**read_bytewise(folder), **read_quantized(folder)}
    for name, parameter in model.named_parameters():
        layer = layers.get(name.removesuffix(".weight"))
        parameter.data.copy_(stored[name] if layer is None else layer.dequantize())
    return model


def to_int8(inputs: torch.Tensor) -> torch.Tensor:
    """Integers from −128 to 127, the largest value of each token at ±127.5."""
    scale = inputs.abs().amax(-1, keepdim=True) / 127.5
    return (inputs / scale).round().clamp(-128, 127) * scale


def to_float8(inputs: torch.Tensor) -> torch.Tensor:
    """The largest value of each token at ±448, the largest number of float8_e4m3fn."""
    scale = inputs.abs().amax(-1, keepdim=True) / 448
    return (inputs / scale).to(torch.float8_e4m3fn).float() * scale


@contextmanager
def rounded_inputs(model: Any, rounded: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Every linear layer but the head reads rounded inputs."""
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    handles = [m.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),)) for m in linears]
    yield
    for handle in handles:
        handle.remove()


def logits(model: Any, **keywords: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(PROBE), **keywords).logits


def kl(expected: torch.Tensor, found: torch.Tensor) -> float:
    a, b = torch.log_softmax(expected, -1), torch.log_softmax(found, -1)
    return (a.exp() * (a - b)).sum(-1).mean().item()


@pytest.mark.parametrize(
    ("settings", "rounded"),
    [
        ({"scheme": "w8a8"}, to_int8),
        ({"scheme": "w4a8", "group_size": 32}, to_int8),
        ({"scheme": "fp8"}, to_float8),
    ],
)
def test_activations_are_rounded_token_by_token_where_quality_is_judged(
    tiny_model: Path, make: Callable[..., Path], settings: dict[str, Any], rounded: Callable[..., torch.Tensor]
) -> None:
    folder = make(**settings)
    model = plain(tiny_model, folder)
    found, weights_only = load(folder).logits(PROBE), logits(model)
    with rounded_inputs(model, rounded):
        expected = logits(model)
    assert kl(expected, found) < 1e-7
    assert kl(weights_only, found) > 1e-4


TEXT = {"calibrate": {"source": "text"}}


@pytest.mark.parametrize(
    "settings",
    [
        {"scheme": "w8a8"},
        {"scheme": "w8a8", "method": "gptq", "ignore": ["re:.*k_proj"], **TEXT},
        {"scheme": "w8a8", "method": "smoothquant", **TEXT},
        {"scheme": "w4a8", "group_size": 32},
        {"scheme": "w4a8", "method": "gptq", "group_size": 64, **TEXT},
        {"scheme": "fp8"},
        {"scheme": "fp8", "kv_cache": "fp8", **TEXT},
        {"scheme": "w8a16", "group_size": 32, "backend": "llm-compressor", "kv_cache": "int8", **TEXT},
        {"scheme": "w3a16", "group_size": 32, "backend": "llm-compressor", "symmetric": False},
        {"scheme": "w4a16", "group_size": 32, "backend": "llm-compressor", "method": "awq", "head": "w8a16", **TEXT},
    ],
    ids=lambda settings: "-".join(str(value) for key, value in settings.items() if key not in ("calibrate", "ignore")),
)
def test_sizes_are_as_planned(tiny_model: Path, make: Callable[..., Path], settings: dict[str, Any]) -> None:
    shape = model_shape(checkpoints.read_config(tiny_model), "bfloat16")
    made = checkpoints.describe(make(**settings), "test")
    assert made.weight_bytes == packed_bytes(shape, Quantize(**settings))
    assert (made.format, made.dtype) == ("compressed-tensors", "bfloat16")


@pytest.mark.parametrize(("scheme", "symmetric"), [("w4a16", True), ("w3a16", False)])
def test_autoround_learns_the_rounding(tiny_model: Path, tmp_path: Path, scheme: str, symmetric: bool) -> None:
    settings = {"scheme": scheme, "group_size": 32, "symmetric": symmetric, "head": "w8a16", "ignore": ["re:.*k_proj"]}
    files = {"learnt": tmp_path, "rtn": round_to_nearest(tiny_model, tmp_path / "rtn", Quantize(**settings))}
    step = Quantize(**settings, method="autoround", iterations=10, **TEXT)
    context = StepContext("cpu", 0, calibration=WINDOWS)
    autoround.run(checkpoints.describe(tiny_model, "test"), step, context, tmp_path)
    layers = read_quantized(tmp_path)
    assert len(layers) == 13
    assert all(layer.symmetric == symmetric for name, layer in layers.items() if name != "lm_head")
    expected = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.from_numpy(WINDOWS)
    with torch.no_grad():
        loss = {name: kl(expected(ids).logits, plain(tiny_model, folder)(ids).logits) for name, folder in files.items()}
    assert loss["learnt"] < loss["rtn"]


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("scheme", ["w3a16", "w4a16", "w8a16"])
def test_integers_in_gptq_layout_come_back(tiny_model: Path, tmp_path: Path, scheme: str, version: Any) -> None:
    step = Quantize(scheme=scheme, group_size=32, symmetric=version == "gptq")
    ours, theirs = round_to_nearest(tiny_model, tmp_path / "ours", step), tmp_path / "theirs"
    gptq.write(ours, theirs, read_quantized(ours), torch.bfloat16, version)
    found, stored = gptqmodel.read_layout(theirs, version, torch.bfloat16), read_quantized(ours)
    assert found.keys() == stored.keys()
    for name, layer in stored.items():
        assert found[name].bits == layer.bits
        for part in ("integers", "scales", "zeros"):
            assert torch.equal(getattr(found[name], part), getattr(layer, part))


def test_groups_that_are_not_neighbours_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    ours = round_to_nearest(tiny_model, tmp_path / "ours", Quantize(scheme="w4a16", group_size=32))
    theirs = tmp_path / "theirs"
    gptq.write(ours, theirs, read_quantized(ours), torch.bfloat16, "gptq")
    tensors = load_file(theirs / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"].flip(0).contiguous()
    save_file(tensors, theirs / "model.safetensors")
    with pytest.raises(StageError, match=f"{name}: its groups are not made of neighbouring inputs"):
        gptqmodel.read_layout(theirs, "gptq", torch.bfloat16)


AUTOROUND = {"scheme": "w4a16", "method": "autoround", "group_size": 32, "iterations": 1, **TEXT}


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"scheme": "fp8"}, "float8, by channel, 8-bit activations"),
        (AUTOROUND, "4 bits, symmetric, groups of 32"),
    ],
    ids=["fp8", "autoround"],
)
def test_what_is_written_is_verified(tiny_model: Path, tmp_path: Path, settings: dict[str, Any], kind: str) -> None:
    step = Quantize(**settings)
    context = StepContext("cpu", 0, calibration=WINDOWS if step.calibrate else None)
    record = quantize.run(checkpoints.describe(tiny_model, "test"), step, context, tmp_path)
    assert record.backend == step.maker
    assert record.layers == {kind: 14}
    assert record.reload_difference < 1e-4


class RoundingCache(DynamicCache):
    """Keys and values as they come back from 8 bits, by the scales in the checkpoint."""

    def __init__(self, folder: Path, rounded: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self._stored = load_file(folder / "model.safetensors")
        self._rounded = rounded

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *rest: Any, **named: Any) -> Any:
        scales = [self._stored[f"model.layers.{layer}.self_attn.{name}_scale"].float() for name in "kv"]
        kept = [self._rounded(states / scale) * scale for states, scale in zip((keys, values), scales)]
        return super().update(*kept, layer, *rest, **named)


@pytest.mark.parametrize(
    ("kind", "rounded"),
    [
        ("int8", lambda states: states.round().clamp(-128, 127)),
        ("fp8", lambda states: states.clamp(-448, 448).to(torch.float8_e4m3fn).float()),
    ],
)
def test_the_kv_cache_is_rounded_where_quality_is_judged(
    tiny_model: Path, make: Callable[..., Path], kind: str, rounded: Callable[..., torch.Tensor]
) -> None:
    folder = make(scheme="w8a16", group_size=32, backend="llm-compressor", kv_cache=kind, **TEXT)
    model = plain(tiny_model, folder)
    session = load(folder)
    found = session.logits(PROBE)
    expected = logits(model, past_key_values=RoundingCache(folder, rounded), use_cache=True)
    assert kl(expected, found) < 1e-7
    assert kl(logits(model), found) > 1e-6
    wave = session.generate(PROBE[:, :12], 8, stop=True)
    continued = session.logits(np.concatenate([PROBE[:, :12], wave.tokens], axis=1))
    np.testing.assert_array_equal(continued[:, 11:-1].argmax(-1).numpy(), wave.tokens)
