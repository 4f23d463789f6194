"""Healing on a tiny random model: the integers stay, the divergence falls, and the candidate is exported as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command import pennyweight
from test_flow import latest

from pennyweight import checkpoints, formats, machine, runtimes
from pennyweight.errors import StageError
from pennyweight.quantization.packed import read_quantized
from pennyweight.recipe import Quantize, Recover
from pennyweight.records import Candidate, Checkpoint
from pennyweight.runtimes import Session
from pennyweight.steps import StepContext, recover
from pennyweight.steps import quantize as quantize_step

#: Of rank 4, in bfloat16, over two blocks' gate and up and down, q and o, k and v.
ADAPTER_BYTES = 4 * 2 * 2 * (3 * (128 + 256) + 2 * (128 + 128) + 2 * (128 + 64))
STEP = Recover(text="any", steps=60, batch=8, length=32, learning_rate=0.005, held_out=8, check_every=20)


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Checkpoint:
    return checkpoints.describe(tiny_model, "tiny")


@pytest.fixture(scope="module")
def rounded(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("rounded")
    step = Quantize(scheme="w4a16", group_size=32, head="w8a16")
    quantize_step.run(base, step, StepContext("cpu", 0), folder)
    return checkpoints.describe(folder, "rounded")


def context(base: Checkpoint, step: Recover = STEP) -> StepContext:
    windows = np.random.default_rng(0).integers(1, 512, (step.calibrate.samples, step.length))
    return StepContext("cpu", 0, windows, base)


@pytest.fixture(scope="module")
def healed(base: Checkpoint, rounded: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    folder = tmp_path_factory.mktemp("healed")
    return folder, recover.run(rounded, STEP, context(base), folder)


def test_divergence_falls_on_text_that_was_not_learnt_on(healed: tuple[Path, object]) -> None:
    _, healing = healed
    assert healing.kl_after < 0.92 * healing.kl_before  # a random model has little to find again
    assert [step for step, _ in healing.curve] == [0, 20, 40, 60]
    assert healing.tokens == 60 * 8 * 32


def test_integers_formats_and_sizes_stay(rounded: Checkpoint, healed: tuple[Path, object]) -> None:
    folder, healing = healed
    before, after = (checkpoints.read_tensors(Path(path)) for path in (rounded.path, folder))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith((".weight_scale", "norm.weight")) for name in changed)
    assert not any(name.startswith("lm_head") for name in changed)
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert checkpoints.describe(folder, "x").bytes == rounded.bytes
    layers = read_quantized(Path(rounded.path))
    body = sum(layer.scales.numel() for name, layer in layers.items() if name != "lm_head")
    assert healing.trained == body + 5 * 128  # two norms a layer and the last


def test_what_transformers_loads_is_what_was_healed(
    base: Checkpoint, rounded: Checkpoint, healed: tuple[Path, object]
) -> None:
    """The held-out divergence of the written checkpoint, loaded by transformers itself."""
    from transformers import AutoModelForCausalLM

    folder, healing = healed
    windows = torch.from_numpy(context(base).calibration[: STEP.held_out])

    def predict(path: str | Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            return torch.log_softmax(model(windows).logits, -1)

    expected, before, after = predict(base.path), predict(rounded.path), predict(folder)
    kl_before, kl_after = ((expected.exp() * (expected - found)).sum(-1).mean().item() for found in (before, after))
    assert kl_before == pytest.approx(healing.kl_before, rel=0.1)
    assert kl_after == pytest.approx(healing.kl_after, rel=0.1)


def test_healing_twice_gives_the_same_bytes(
    base: Checkpoint, rounded: Checkpoint, healed: tuple[Path, object], tmp_path: Path
) -> None:
    recover.run(rounded, STEP, context(base), tmp_path)
    assert checkpoints.describe(tmp_path, "x").digest == checkpoints.describe(healed[0], "x").digest


@pytest.mark.skipif(not machine.has_cpp_compiler(), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_passes_learn_the_same(
    base: Checkpoint, rounded: Checkpoint, healed: tuple[Path, object], tmp_path: Path
) -> None:
    step = STEP.model_copy(update={"compile": True})
    done = recover.run(rounded, step, context(base, step), tmp_path)
    eager = healed[1]
    assert [at for at, _ in done.curve] == [at for at, _ in eager.curve]
    for (_, ours), (_, theirs) in zip(done.curve, eager.curve):
        assert ours == pytest.approx(theirs, rel=0.01)


def test_a_compiler_that_fails_is_named(
    base: Checkpoint, rounded: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def heal(*_: object) -> None:
        raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no g++"), None)

    monkeypatch.setattr("pennyweight.healing.train.heal", heal)
    step = STEP.model_copy(update={"compile": True})
    with pytest.raises(StageError, match="compile failed") as caught:
        recover.run(rounded, step, context(base, step), tmp_path)
    assert caught.value.hint == "leave `compile` out"


def test_only_quantized_checkpoints_can_be_healed(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="nothing in this one is quantized"):
        recover.run(base, STEP, context(base), tmp_path)


def test_a_loss_that_is_not_finite_stops(base: Checkpoint, rounded: Checkpoint, tmp_path: Path) -> None:
    wild = STEP.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(StageError, match="the loss is") as caught:
        recover.run(rounded, wild, context(base), tmp_path)
    assert "step" in caught.value.message


@pytest.mark.parametrize("way", ["rounding", "low_rank"])
def test_integers_move_only_where_the_recipe_says_so(
    base: Checkpoint, rounded: Checkpoint, tmp_path: Path, way: str
) -> None:
    step = STEP.model_copy(update={"train": ["scales", way], "steps": 20, "check_every": 4, "learning_rate": 0.004})
    healing = recover.run(rounded, step, context(base, step), tmp_path)
    before, after = (read_quantized(Path(path)) for path in (rounded.path, tmp_path))
    moves = {
        name: after[name].integers.int() - layer.integers.int() for name, layer in before.items() if name != "lm_head"
    }
    assert healing.moved == sum(int((move != 0).sum()) for move in moves.values()) > 0
    assert torch.equal(before["lm_head"].integers, after["lm_head"].integers)
    if way == "rounding":
        assert max(int(move.abs().max()) for move in moves.values()) == 1
    assert checkpoints.describe(tmp_path, "x").weight_bytes == rounded.weight_bytes
    assert healing.kl_after < healing.kl_before


def test_an_adapter_is_kept_beside_the_integers(base: Checkpoint, rounded: Checkpoint, tmp_path: Path) -> None:
    step = STEP.model_copy(update={"train": ["norms", "adapter"], "rank": 4, "steps": 20})
    folder = tmp_path / "healed"
    folder.mkdir()
    healing = recover.run(rounded, step, context(base, step), folder)
    before, after = (checkpoints.read_tensors(Path(path)) for path in (rounded.path, folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("norm.weight")}
    made = checkpoints.describe(folder, "x")
    assert made.weight_bytes == rounded.weight_bytes + ADAPTER_BYTES
    assert healing.kl_after < healing.kl_before
    windows = context(base, step).calibration[: step.held_out]
    expected, found = (torch.log_softmax(loaded(checkpoint).logits(windows).float(), -1) for checkpoint in (base, made))
    kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
    assert kl == pytest.approx(healing.kl_after, rel=0.02)
    with pytest.raises(StageError, match="has a LoRA adapter beside its integers, which gguf files cannot hold"):
        formats.export(str(folder), "gguf", tmp_path / "model.gguf")
    formats.export(str(folder), "compressed-tensors", tmp_path / "out")
    assert checkpoints.describe(tmp_path / "out", "x").digest == made.digest


def loaded(checkpoint: Checkpoint) -> Session:
    """The checkpoint in the transformers runtime."""
    candidate = Candidate(
        id="x", variant="x", runtime="transformers", checkpoint=checkpoint, path=checkpoint.path, dtype="float32",
        digest=checkpoint.digest, bytes=checkpoint.bytes, weight_bytes=checkpoint.weight_bytes,
    )  # fmt: skip
    return runtimes.get("transformers").load(candidate, "cpu")


def test_it_stops_when_the_first_limit_is_reached(base: Checkpoint, rounded: Checkpoint, tmp_path: Path) -> None:
    by_tokens = STEP.model_copy(update={"steps": 50, "tokens": 3 * 8 * 32})
    found = recover.run(rounded, by_tokens, context(base, by_tokens), tmp_path)
    assert (found.ended_by, found.steps, found.tokens) == ("tokens", 3, 768)
    by_time = STEP.model_copy(update={"steps": None, "minutes": 0.01, "windows": 16})
    found = recover.run(rounded, by_time, context(base, by_time), tmp_path)
    assert found.ended_by == "minutes"
    assert found.steps >= 1


def test_it_stops_when_nothing_gets_better_and_keeps_the_best(
    base: Checkpoint, rounded: Checkpoint, tmp_path: Path
) -> None:
    wild = STEP.model_copy(update={"learning_rate": 0.9, "check_every": 2, "patience": 2})
    found = recover.run(rounded, wild, context(base, wild), tmp_path)
    assert found.ended_by == "patience"
    assert found.steps < 60
    assert found.kl_after == min(kl for _, kl in found.curve) <= found.kl_before


def test_a_healed_variant_goes_through_the_whole_flow(tiny_recipe_text: str, tmp_path: Path) -> None:
    recipe = yaml.safe_load(tiny_recipe_text)
    rounding = {"quantize": {"scheme": "w4a16", "group_size": 32}}
    healing = {"text": "calibration-text", "steps": 20, "batch": 4, "length": 16, "held_out": 4, "learning_rate": 0.005}
    recipe["variants"] = {"int4": [rounding], "int4-healed": [rounding, {"recover": healing}]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    done = pennyweight("run", "tiny.yaml", cwd=tmp_path, store=tmp_path / "store")
    assert done.returncode in (0, 1), done.stderr
    found = {result["variant"]: result for result in latest(tmp_path)["candidates"]}
    kl = {name: result["quality"]["metrics"]["kl_mean"]["value"] for name, result in found.items()}
    assert kl["int4-healed"] < kl["int4"]
    assert found["int4-healed"]["candidate"]["weight_bytes"] == found["int4"]["candidate"]["weight_bytes"]
    assert found["int4-healed"]["checkpoint"]["healing"]["steps"] == 20
    exported = pennyweight(
        "export", "runs/latest:int4-healed@onnxruntime", "--format", "gguf", "--to", "healed.gguf",
        cwd=tmp_path, store=tmp_path / "store",
    )  # fmt: skip
    assert exported.returncode == 0, exported.stderr
    assert "14 Q4_0" in exported.stdout
    recipe["variants"] = {"healed": [{"recover": healing}]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    refused = pennyweight("run", "tiny.yaml", cwd=tmp_path, store=tmp_path / "store")
    assert refused.returncode == 2
    assert "put a quantize step before it" in refused.stderr


def test_what_was_quantized_need_not_be_the_base(base: Checkpoint, tiny_model: Path, tmp_path: Path) -> None:
    """The base without its second layer is quantized, and learns what the whole base predicts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    del model.model.layers[1:]
    model.config.num_hidden_layers, model.config.layer_types = 1, None
    for name in ("cut", "rounded", "healed"):
        (tmp_path / name).mkdir()
    model.save_pretrained(tmp_path / "cut")
    cut = checkpoints.describe(tmp_path / "cut", "cut")
    quantize_step.run(cut, Quantize(scheme="w4a16", group_size=32), StepContext("cpu", 0), tmp_path / "rounded")
    rounded = checkpoints.describe(tmp_path / "rounded", "rounded")
    step = STEP.model_copy(update={"train": ["scales", "norms", "rounding"], "hidden": 0.1, "steps": 20})
    done = recover.run(rounded, step, replace(context(base, step), rounded=cut), tmp_path / "healed")
    assert done.kl_after < done.kl_before
    assert done.moved > 0
    healed = checkpoints.describe(tmp_path / "healed", "x")
    assert (healed.parameters, healed.bytes) == (cut.parameters, rounded.bytes)
    assert healed.parameters < base.parameters
