"""A variant's model may be of another shape than the base: the plan goes by its own."""

from __future__ import annotations

from typing import Any

import pytest
from test_plan import CONFIG, calm, problems, recipe, step

from pennyweight.plan import make_plan, shapes, sizes
from pennyweight.plan.shapes import Shapes, Start, config_after
from pennyweight.plan.sizes import model_shape
from pennyweight.recipe import From, Quantize, Recover
from pennyweight.store import Store

__all__ = ["calm"]

QUANTIZE = {"quantize": {"scheme": "w4a16", "group_size": 32}}
RECOVER = {"recover": {"text": "wiki", "length": 32, "hidden": 0.1}}
ONE_LAYER = CONFIG | {"num_hidden_layers": 1}


@pytest.fixture
def cutting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every quantize step takes a layer away too."""

    def cut(config: dict[str, Any], step: Any) -> dict[str, Any]:
        if step.kind != "quantize":
            return config
        if config["num_hidden_layers"] == 1:
            raise ValueError("no layer is left")
        return config | {"num_hidden_layers": config["num_hidden_layers"] - 1}

    monkeypatch.setattr(shapes, "config_after", cut)


@pytest.mark.parametrize("kind", [From(base="small"), Quantize(scheme="w8a16"), Recover(text="wiki")])
def test_steps_that_keep_the_config(kind: Any) -> None:
    assert config_after(CONFIG, kind) == CONFIG


def test_a_shape_before_and_after_each_step(cutting: None) -> None:
    found = Shapes(recipe({"a": [QUANTIZE, RECOVER]}))
    assert found.of("a") is None
    found.add("base", Start(CONFIG, "bfloat16"))
    assert [found.of("a", done).layers for done in (0, 1, 2)] == [2, 1, 1]
    assert (found.of("a").layers, found.of("base").layers, found.of_base("base").layers) == (1, 2, 2)


def test_every_estimate_of_a_variant_goes_by_its_own_shape(calm: Store, cutting: None) -> None:
    """A smaller variant is estimated as the same variant of a base that small."""
    made = make_plan(recipe({"a": [QUANTIZE, RECOVER]}), calm)
    small = model_shape(ONE_LAYER, "bfloat16")
    assert made.problems == []
    assert made.weight_bytes("quantize", "a") == sizes.packed_bytes(small, step())
    assert made.weight_bytes("recover", "a") == sizes.packed_bytes(small, step())
    assert made.weight_bytes("export", "a@onnxruntime") == sizes.onnx_bytes(small, step(), "cpu")
    assert made.weight_bytes("source", "base") == sizes.dense_bytes(model_shape(CONFIG, "bfloat16"))


def test_times_and_memory_of_a_smaller_variant(calm: Store, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    names = [("evaluate", "a@onnxruntime"), ("recover", "a"), ("benchmark", "all candidates")]
    whole = make_plan(recipe({"a": [QUANTIZE, RECOVER]}), calm)
    request.getfixturevalue("cutting")
    cut = make_plan(recipe({"a": [QUANTIZE, RECOVER]}), calm)
    for stage, subject in names:
        assert cut.expected_seconds(stage, subject) < whole.expected_seconds(stage, subject), stage
    memory = [
        {stage.stage: stage.peak_memory_bytes for stage in made.stages if stage.subject == "a"} for made in (cut, whole)
    ]
    assert memory[0]["quantize"] < memory[1]["quantize"]


def test_a_step_that_cannot_be_applied_is_named(calm: Store, cutting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from pennyweight import sources

    monkeypatch.setattr(sources, "base_config", lambda base, store: ONE_LAYER)
    made = make_plan(recipe({"a": [QUANTIZE], "b": [QUANTIZE, RECOVER]}), calm)
    assert problems(made) == [
        ("variants.a.0.quantize", "no layer is left"),
        ("variants.b.0.quantize", "no layer is left"),
    ]
    assert made.weight_bytes("quantize", "a") is None


def test_blocks_that_cannot_be_made_narrower_are_found_before_any_work(
    calm: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pennyweight import sources

    kinds = {
        "phi3": ({"pad_token_id": 0, "eos_token_id": 0}, "gate_up_proj, down_proj, and no feed-forward net of 160"),
        "mixtral": ({"num_local_experts": 2}, "has experts"),
    }
    narrower = {"prune": {"ffn": 0.5, "text": "wiki", "length": 32}}
    steps = {"a": [narrower], "b": [{"prune": {"drop": [1]}}], "c": [{"prune": {"drop": [1]}}, narrower]}
    for kind, (changes, words) in kinds.items():
        config = CONFIG | {"model_type": kind} | changes
        monkeypatch.setattr(sources, "base_config", lambda base, store, config=config: config)
        gate = [{"metric": "perplexity", "relative_within": 0.1}]
        made = make_plan(recipe(steps, gate=gate), calm)
        assert [path for path, _ in problems(made)] == ["variants.a.0.prune", "variants.c.1.prune"]
        assert all(words in message and "leave `ffn` out" in message for _, message in problems(made))
        assert made.weight_bytes("prune", "b") and made.weight_bytes("prune", "a") is None


def test_hidden_states_of_another_width_cannot_be_compared(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2}
    monkeypatch.setattr(shapes, "config_after", lambda config, step: config | narrow)
    made = make_plan(recipe({"a": [QUANTIZE, RECOVER]}), calm)
    assert problems(made) == [
        (
            "variants.a.1.recover.hidden",
            "compares hidden states, which have 64 numbers here and 96 in the base",
        )
    ]
    plain = {"recover": {"text": "wiki", "length": 32}}
    assert make_plan(recipe({"a": [QUANTIZE, plain]}), calm).problems == []
