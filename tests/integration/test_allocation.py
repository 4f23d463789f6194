"""Quantized embeddings, and bits given layer by layer: what reaches the checkpoint, and what that predicts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pennyweight import checkpoints
from pennyweight.quantization.packed import read_quantized
from pennyweight.quantization.unpacked import load_model
from pennyweight.recipe import Quantize
from pennyweight.records import Checkpoint
from pennyweight.steps import StepContext, quantize

WINDOWS = np.random.default_rng(0).integers(0, 512, (16, 32))
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def make(base: Path, folder: Path, **settings: object) -> Checkpoint:
    """A quantized checkpoint of the tiny model. The step itself checks its bytes, and reloads it in a fresh process."""
    step = Quantize(**{"scheme": "w4a16", "group_size": 32, **settings})
    folder.mkdir()
    context = StepContext(device="cpu", seed=0, calibration=WINDOWS if step.calibrate else None)
    rounding = quantize.run(checkpoints.describe(base, "test"), step, context, folder)
    return checkpoints.describe(folder, "test").model_copy(update={"rounding": rounding})


@pytest.fixture(scope="module")
def untied_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.tie_word_embeddings = False
    torch.manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("scheme", "bits"), [("w8a16", 8), ("w3a16", 3)])
def test_a_tied_head_shares_the_embeddings_integers_which_are_stored_once(
    tiny_model: Path, tmp_path: Path, scheme: str, bits: int
) -> None:
    made = make(tiny_model, tmp_path / "made", embedding=scheme)
    stored = load_file(Path(made.path) / "model.safetensors")
    assert f"{EMBEDDING}.weight_packed" in stored
    assert not [name for name in stored if name.startswith(HEAD) or name == f"{EMBEDDING}.weight"]
    assert json.loads((Path(made.path) / "config.json").read_text())["tie_word_embeddings"] is True
    layer = read_quantized(Path(made.path))[EMBEDDING]
    assert (layer.bits, layer.group_size) == (bits, 32)
    model = load_model(Path(made.path), torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    torch.testing.assert_close(model.get_input_embeddings().weight.data, layer.dequantize(), rtol=0, atol=0)
    original = load_file(tiny_model / "model.safetensors")[f"{EMBEDDING}.weight"].float()
    assert ((layer.dequantize() - original).abs() <= 0.55 * layer.scales.repeat_interleave(32, dim=1)).all()


def test_a_tied_head_with_a_scheme_of_its_own_is_stored_beside_the_embedding(tiny_model: Path, tmp_path: Path) -> None:
    layers = read_quantized(Path(make(tiny_model, tmp_path / "made", embedding="w4a16", head="w8a16").path))
    assert (layers[EMBEDDING].bits, layers[HEAD].bits) == (4, 8)


def test_an_untied_head_stays_as_it_is(untied_model: Path, tmp_path: Path) -> None:
    made = make(untied_model, tmp_path / "made", embedding="w4a16")
    stored, original = load_file(Path(made.path) / "model.safetensors"), load_file(untied_model / "model.safetensors")
    torch.testing.assert_close(stored[f"{HEAD}.weight"], original[f"{HEAD}.weight"], rtol=0, atol=0)
    assert read_quantized(Path(made.path)).keys() >= {EMBEDDING}


def test_calibration_sees_what_the_quantized_embedding_hands_on(tiny_model: Path, tmp_path: Path) -> None:
    gptq = {"method": "gptq", "calibrate": "text"}
    alone = read_quantized(Path(make(tiny_model, tmp_path / "alone", **gptq).path))
    after = read_quantized(Path(make(tiny_model, tmp_path / "after", embedding="w3a16", **gptq).path))
    name = "model.layers.0.self_attn.q_proj"
    assert (alone[name].integers != after[name].integers).any()
