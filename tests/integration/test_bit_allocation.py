"""Quantized embeddings, and bits given layer by layer: what reaches the checkpoint, and what that predicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pennyweight import checkpoints
from pennyweight.errors import StageError
from pennyweight.plan.sizes import model_shape, packed_bytes
from pennyweight.quantization import decoder, methods, packed
from pennyweight.quantization.allocation import allocate
from pennyweight.quantization.grid import Grid, QuantizedLinear
from pennyweight.quantization.packed import read_quantized
from pennyweight.quantization.unpacked import load_model
from pennyweight.recipe import Quantize
from pennyweight.records import Allocation, Checkpoint
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
    written(tiny_model, tmp_path, embedding="w4a16", head="w8a16")
    layers = read_quantized(tmp_path)
    assert (layers[EMBEDDING].bits, layers[HEAD].bits) == (4, 8)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False


def test_an_untied_head_stays_as_it_is(untied_model: Path, tmp_path: Path) -> None:
    written(untied_model, tmp_path, embedding="w4a16")
    stored, original = load_file(tmp_path / "model.safetensors"), load_file(untied_model / "model.safetensors")
    torch.testing.assert_close(stored[f"{HEAD}.weight"], original[f"{HEAD}.weight"], rtol=0, atol=0)
    model = load_model(tmp_path, torch.float32)
    layer = read_quantized(tmp_path)[EMBEDDING]
    torch.testing.assert_close(model.get_input_embeddings().weight.data, layer.dequantize(), rtol=0, atol=0)
    assert not decoder.is_tied(model)


def test_calibration_sees_what_the_quantized_embedding_hands_on(tiny_model: Path, tmp_path: Path) -> None:
    gptq = {"method": "gptq", "calibrate": "text"}
    alone = written(tiny_model, tmp_path / "alone", **gptq)
    after = written(tiny_model, tmp_path / "after", embedding="w3a16", **gptq)
    name = "model.layers.0.self_attn.q_proj"
    assert (alone[name].integers != after[name].integers).any()


def written(base: Path, folder: Path, **settings: object) -> dict[str, QuantizedLinear]:
    """A quantized checkpoint, its bytes as predicted, and not loaded again by another process."""
    step = Quantize(**{"scheme": "w4a16", "group_size": 32, **settings})
    folder.mkdir(exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().requires_grad_(False)
    grids = quantize.layer_grids(model, step)
    if step.head != "none":
        decoder.untie(model)
    windows = torch.from_numpy(WINDOWS) if step.calibrate else None
    solving = methods.Settings(step.method, step.scale_search, step.dampening, torch.bfloat16)
    layers = methods.quantize(model, grids, solving, windows, lambda *_: None)
    packed.write(base, folder, model, layers)
    shape = model_shape(checkpoints.read_config(base), "bfloat16")
    assert sum(tensor.bytes for tensor in checkpoints.read_headers(folder)) == packed_bytes(shape, step)
    return layers


def auto(budget: dict[str, float], **settings: object) -> dict[str, object]:
    calibrate = {"source": "text", "samples": 16, "length": 32}
    search = {"windows": 8, "held_out": 4, "trials": 10}
    sizes = {"choices": [3, 4, 8, 16], "group_sizes": [32, 64]}
    return {"scheme": "auto", "budget": budget, "calibrate": calibrate, "search": search, **sizes, **settings}


def test_an_allocation_fills_its_budget_and_beats_every_uniform_choice(tiny_model: Path, tmp_path: Path) -> None:
    made = make(tiny_model, tmp_path / "made", **auto({"bits_per_weight": 7.0}))
    assert made.rounding and (found := made.rounding.allocation)
    assert 0.98 * found.budget < found.bytes == made.weight_bytes <= found.budget
    assert found.uniform_kl.keys() == {f"{bits} bits, groups of {size}" for bits in (3, 4) for size in (32, 64)}
    assert found.measured_kl < min(found.uniform_kl.values())
    stored = read_quantized(Path(made.path))
    written = {name: f"{layer.bits} bits, groups of {layer.group_size}" for name, layer in stored.items()}
    assert written == {name: kind for name, kind in found.layers.items() if kind != "as it was"}
    assert len(set(written.values())) > 1
    for at in (0, 1):  # layers that read one input are rounded alike
        assert len({found.layers[f"model.layers.{at}.self_attn.{letter}_proj"] for letter in "qkv"}) == 1
    model = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)  # transformers' own loader
    model(torch.zeros(1, 1, dtype=torch.long))
    for name, layer in stored.items():
        torch.testing.assert_close(model.get_submodule(name).weight.data, layer.dequantize(), rtol=1e-2, atol=1e-5)


def test_a_tied_embedding_is_allocated_too(tiny_model: Path, tmp_path: Path) -> None:
    made = make(tiny_model, tmp_path / "made", **auto({"ratio": 0.3}, embedding="auto"))
    assert made.rounding and (found := made.rounding.allocation)
    assert found.bytes == made.weight_bytes <= found.budget
    assert found.layers[EMBEDDING] != "as it was"
    assert read_quantized(Path(made.path)).keys() == found.layers.keys()


def test_a_tied_head_that_gets_no_integers_stays_tied(tiny_model: Path) -> None:
    model, _, found = allocated(tiny_model, head="auto", choices=[8, 16], budget={"bits_per_weight": 11.4})
    assert found.layers[HEAD] == "as it was"
    assert decoder.is_tied(model)


def test_the_same_seed_gives_the_same_allocation_and_leaves_the_model_as_it_was(tiny_model: Path) -> None:
    model, grids, found = allocated(tiny_model, budget={"bits_per_weight": 6.0})
    _, again, _ = allocated(tiny_model, budget={"bits_per_weight": 6.0})
    assert again == grids
    original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for name in grids:
        torch.testing.assert_close(
            model.get_submodule(name).weight, original.get_submodule(name).weight, rtol=0, atol=0
        )
    assert found.trials <= 10


def test_gptq_solves_what_was_allocated(tiny_model: Path) -> None:
    step = Quantize(**auto({"bits_per_weight": 6.0}, method="gptq"))
    model, grids, _ = allocated(tiny_model, method="gptq", budget={"bits_per_weight": 6.0})
    settings = methods.Settings("gptq", step.scale_search, step.dampening, torch.bfloat16)
    solved = methods.quantize(model, grids, settings, torch.from_numpy(WINDOWS[:12]), lambda *_: None)
    assert {name: (layer.bits, layer.group_size) for name, layer in solved.items()} == {
        name: (grid.bits, grid.group_size) for name, grid in grids.items()
    }


def test_a_budget_that_nothing_fits_is_refused(tiny_model: Path) -> None:
    with pytest.raises(StageError, match="is the least"):
        allocated(tiny_model, budget={"bytes": 1000})


def allocated(base: Path, budget: dict[str, float], **settings: object) -> tuple[Any, dict[str, Grid], Allocation]:
    """(the model, its grids, the record), without writing a checkpoint."""
    step = Quantize(**{**auto(budget), **settings})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().requires_grad_(False)
    shape = model_shape(checkpoints.read_config(base), "bfloat16")
    windows = torch.from_numpy(WINDOWS)
    return model, *allocate(model, shape, step, windows, torch.bfloat16, 0, lambda *_: None)
