"""OpenVINO as a runtime, on a tiny random model: it serves the checkpoint's integers, and is judged as itself."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command import pennyweight
from quantized import make
from test_flow import latest

from pennyweight import checkpoints, runtimes
from pennyweight.errors import StageError
from pennyweight.records import Candidate
from pennyweight.runtimes import Session, openvino

IDS = np.random.default_rng(0).integers(1, 512, (4, 48))


def load(runtime: str, checkpoint: Path, files: Path) -> Session:
    described = checkpoints.describe(checkpoint, "test")
    candidate = Candidate(
        id="x", variant="x", runtime=runtime, checkpoint=described, path=str(files), digest="x", bytes=1,
        weight_bytes=1, dtype="float32",
    )  # fmt: skip
    return runtimes.get(runtime).load(candidate, "cpu")


def log_probabilities(session: Session) -> torch.Tensor:
    return torch.log_softmax(session.logits(IDS).float(), -1).clone()


@pytest.fixture(scope="module", params=["none", "w8a16", "w4a16"])
def checkpoint(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "none":
        return tiny_model
    return make(tiny_model, tmp_path_factory.mktemp("made") / "checkpoint", scheme=request.param, head="w8a16")


@pytest.fixture(scope="module")
def files(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    openvino.export(checkpoints.describe(checkpoint, "test"), "cpu", folder)
    return folder


def test_it_predicts_what_the_checkpoint_does(checkpoint: Path, files: Path) -> None:
    session = load("openvino", checkpoint, files)
    ours, theirs = log_probabilities(load("transformers", checkpoint, checkpoint)), log_probabilities(session)
    assert (ours.exp() * (ours - theirs)).sum(-1).mean().item() < 0.005
    assert torch.equal(theirs, log_probabilities(session))
    assert session.context == 512


def test_a_right_padded_row_predicts_as_alone(checkpoint: Path, files: Path) -> None:
    session = load("openvino", checkpoint, files)
    padded = np.array(IDS[:2])
    padded[0, 20:] = 0
    together, alone = session.logits(padded).clone(), session.logits(padded[:1, :20]).clone()
    assert (torch.log_softmax(together[0, :20], -1) - torch.log_softmax(alone[0], -1)).abs().max() < 0.05


def test_a_wave_has_a_time_for_each_token_and_ends_where_it_should(checkpoint: Path, files: Path) -> None:
    session = load("openvino", checkpoint, files)
    wave = session.generate(IDS[:, :8], 12)
    assert wave.tokens.shape == (4, 12)
    assert len(wave.steps) == 11
    assert wave.ttft > 0
    assert min(wave.steps) >= 0
    again = session.generate(IDS[:, :8], 12)
    assert np.array_equal(wave.tokens, again.tokens)
    assert session.generate(IDS[:, :8], 12, stop=True).tokens.shape[1] <= 12


def test_it_serves_what_is_judged(checkpoint: Path, files: Path) -> None:
    """The graph that scores keeps no keys and values, the engine that generates does."""
    session = load("openvino", checkpoint, files)
    ids = np.concatenate([IDS, session.generate(IDS, 40).tokens], 1)
    logprobs = torch.log_softmax(session.logits(ids).float(), -1)[:, IDS.shape[1] - 1 : -1]
    logprobs[..., session.ends()] = -torch.inf
    chosen = logprobs.gather(-1, torch.from_numpy(ids[:, IDS.shape[1] :, None]))[..., 0]
    below = logprobs.max(-1).values - chosen
    assert below.max() < 0.05


def test_what_checks_a_generator_keeps_no_kernels(
    checkpoint: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as are kept are not given back with the graph."""
    engine = importlib.import_module("openvino")
    asked: list[dict[str, Any]] = []

    class Core(engine.Core):
        def compile_model(self, graph: Any, device: str, properties: dict[str, Any]) -> Any:
            asked.append(properties)
            return super().compile_model(graph, device, properties)

    monkeypatch.setattr(engine, "Core", Core)
    session = load("openvino", checkpoint, files)
    session.logits(IDS[:1])
    session.forget_scorer()
    session.generate(IDS[:1, :8], 2)
    session.logits(IDS[:1])
    session.close()
    assert [properties.get("CPU_RUNTIME_CACHE_CAPACITY") for properties in asked] == [None, 0]


def test_bytes_are_those_of_the_file(files: Path) -> None:
    whole, tensors = openvino.sizes(files)
    assert whole == (files / "model.gguf").stat().st_size > tensors > 0


def test_a_checkpoint_that_it_would_misread_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    scaled = tmp_path / "scaled"
    scaled.mkdir()
    for path in tiny_model.iterdir():
        (scaled / path.name).write_bytes(path.read_bytes())
    config = json.loads((scaled / "config.json").read_text())
    config["rope_scaling"] = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }  # fmt: skip
    config["rope_parameters"] = config["rope_scaling"] | {"rope_theta": 10000.0}
    (scaled / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageError, match="would misread this checkpoint: it ignores RoPE's scaling"):
        openvino.export(checkpoints.describe(scaled, "x"), "cpu", tmp_path)


def test_a_candidate_goes_through_the_whole_flow(tiny_recipe_text: str, tmp_path: Path) -> None:
    recipe = yaml.safe_load(tiny_recipe_text)
    recipe["runtimes"] = {"base": ["transformers", "openvino"], "variants": ["openvino"]}
    recipe["gate"] = [{"metric": "kl_mean", "max": 1.0}]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    planned = pennyweight("plan", "tiny.yaml", "--json", cwd=tmp_path, store=tmp_path / "store")
    done = pennyweight("run", "tiny.yaml", cwd=tmp_path, store=tmp_path / "store")
    assert done.returncode in (0, 1), done.stderr
    found = {result["id"]: result for result in latest(tmp_path)["candidates"]}
    assert {result["verdict"]["status"] for result in found.values()} <= {"base", "pass", "fail", "inconclusive"}
    weights = {
        stage["subject"]: stage["weight_bytes"]
        for stage in json.loads(planned.stdout)["stages"]
        if stage["stage"] == "export"
    }
    for name in ("base@openvino", "int8@openvino", "int4-gptq@openvino"):
        assert found[name]["candidate"]["weight_bytes"] == weights[name]
        assert found[name]["candidate"]["parity"]["kl_mean"] < 0.01
        assert found[name]["cost"]["points"][0]["output_tokens_per_second"] > 0
