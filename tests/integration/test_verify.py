"""What a quantize step proves of the checkpoint that it wrote, and that it sees each kind of damage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pennyweight import checkpoints
from pennyweight.errors import StageError
from pennyweight.quantization import verify
from pennyweight.quantization.packed import read_quantized
from pennyweight.recipe import Quantize
from pennyweight.records import Rounding
from pennyweight.steps import StepContext, quantize

STEP = Quantize(scheme="w4a16", group_size=32)


def made(base: Path, folder: Path, step: Quantize = STEP) -> Rounding:
    folder.mkdir()
    return quantize.run(checkpoints.describe(base, "test"), step, StepContext("cpu", 0), folder)


@pytest.fixture
def checkpoint(tiny_model: Path, tmp_path: Path) -> Path:
    made(tiny_model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def change(folder: Path, name: str, value: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), name: value}, path, metadata={"format": "pt"})


@pytest.mark.usefixtures("fresh_process")
def test_a_fresh_process_predicts_what_was_made(tiny_model: Path, tmp_path: Path) -> None:
    found = made(tiny_model, tmp_path / "checkpoint")
    assert found.reload_difference < 1e-4
    assert found.layers == {"4 bits, symmetric, groups of 32": 14}


@pytest.mark.usefixtures("fresh_process")
def test_a_fresh_process_that_fails_says_why(tiny_model: Path, checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    (checkpoint / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(StageError, match=r"cannot load the checkpoint: .*unheard-of"):
        verify.check_reload(checkpoint, model)


def test_weights_that_are_not_those_that_were_made_are_found(tiny_model: Path, checkpoint: Path) -> None:
    scale = "model.layers.0.mlp.up_proj.weight_scale"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert verify.check_reload(checkpoint, model) < 1e-4
    change(checkpoint, scale, load_file(checkpoint / "model.safetensors")[scale] * 1.5)
    with pytest.raises(StageError, match="predicts something else"):
        verify.check_reload(checkpoint, model)


def test_scales_and_channels_that_died_are_found(tiny_model: Path, checkpoint: Path) -> None:
    verify.check_layers(tiny_model, read_quantized(checkpoint))
    name = "model.layers.1.self_attn.o_proj"
    tensors = load_file(checkpoint / "model.safetensors")
    packed, scales = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
    middle = packed.clone()
    middle[5] = -0x77777778  # eight integers of 8 in each word: zero everywhere
    change(checkpoint, f"{name}.weight_packed", middle)
    with pytest.raises(StageError, match=r"o_proj: 1 of 128 output channels"):
        verify.check_layers(tiny_model, read_quantized(checkpoint))
    change(checkpoint, f"{name}.weight_packed", packed)
    scales[3, 1] = torch.nan
    change(checkpoint, f"{name}.weight_scale", scales)
    with pytest.raises(StageError, match="o_proj has scales"):
        verify.check_layers(tiny_model, read_quantized(checkpoint))


def test_other_bytes_than_were_predicted_are_found(checkpoint: Path) -> None:
    bytes_written = checkpoints.describe(checkpoint, "x").weight_bytes
    verify.check_bytes(checkpoint, bytes_written)
    with pytest.raises(StageError, match="were predicted"):
        verify.check_bytes(checkpoint, bytes_written + 2)


def test_a_step_that_quantizes_nothing_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    nothing = STEP.model_copy(update={"ignore": ["re:.*"]})
    with pytest.raises(StageError, match="nothing is left to quantize"):
        made(tiny_model, tmp_path / "checkpoint", nothing)
    with pytest.raises(StageError, match="quantized no layer"):
        verify.check_layers(tiny_model, {})
