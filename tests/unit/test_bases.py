"""Several bases in one recipe: what may be written, what the plan says of each, and what goes with a winner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_plan import CONFIG, calm, problems, recipe, step
from test_tracking import make_run

from pennyweight import sources
from pennyweight.errors import SourceError
from pennyweight.plan import constants, make_plan, sizes
from pennyweight.plan.sizes import model_shape
from pennyweight.recipe import Recipe
from pennyweight.records import RecipeRef, RunRecord
from pennyweight.report import making
from pennyweight.sources import vocabulary
from pennyweight.store import Store
from pennyweight.tracking import bom, card, naming

__all__ = ["calm"]

QUANTIZE = {"quantize": {"scheme": "w4a16", "group_size": 32}}
RECOVER = {"recover": {"text": "wiki", "length": 32}}
FROM = {"from": {"base": "small"}}
SMALL = CONFIG | {"num_hidden_layers": 1}
GATE = [{"metric": "kl_mean", "max": 0.1}, {"metric": "perplexity", "relative_within": 0.1}]


def competing(steps: dict[str, list[dict[str, Any]]], **settings: Any) -> Recipe:
    return recipe(steps, **({"bases": {"small": "hf:me/small@main"}, "gate": GATE} | settings))


@pytest.fixture
def two(calm: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The config of the small base has one layer."""
    monkeypatch.setattr(sources, "base_config", lambda base, store: SMALL if "small" in base.uri else CONFIG)
    return calm


# --- what may be written ----------------------------------------------------------------------------------------------


def test_a_recipe_of_two_bases_is_read_and_written() -> None:
    made = competing({"int4": [QUANTIZE], "small": [FROM], "small-int4": [FROM, QUANTIZE]})
    assert [made.start_of(variant) for variant in ("base", *made.variants)] == ["base", "base", "small", "small"]
    assert [made.imitates_base(variant) for variant in made.variants] == [True, False, False]
    assert list(made.all_bases) == ["base", "small"]
    assert made.dump()["variants"]["small"] == [{"from": {"base": "small"}}]
    assert Recipe.model_validate(made.dump()) == made


@pytest.mark.parametrize(
    ("steps", "settings", "said"),
    [
        ([{"from": {"base": "smal"}}], {}, "`bases` has no 'smal'; did you mean 'small'?"),
        ([{"from": {"base": "base"}}], {}, "`bases` has no 'base'"),
        ([FROM], {"bases": {}}, "the recipe has no `bases`"),
        ([QUANTIZE], {}, "bases.small: no variant starts from it"),
        ([FROM, FROM], {}, "step 2 of 2, from, must come first, and once"),
        ([QUANTIZE, FROM], {}, "step 2 of 2, from, must come first, and once"),
        ([FROM], {"bases": {"small": "x", "base": "y"}}, "'base' is the name of the recipe's own base"),
        ([FROM], {"gate": [{"metric": "kl_mean", "max": 0.1}]}, "nothing in it judges 'a'"),
    ],
)
def test_what_makes_no_sense(steps: list[dict[str, Any]], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        competing({"a": steps}, **settings)


def test_divergence_may_judge_every_variant() -> None:
    gate = [{"metric": "kl_mean", "max": 0.1, "for_every_variant": True}]
    assert competing({"a": [FROM]}, gate=gate).gate[0].for_every_variant


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([RECOVER], "step 1 of 1, recover, heals quantized weights: put a quantize step before it"),
        ([RECOVER, QUANTIZE], "step 1 of 2, recover, heals"),
        ([QUANTIZE, QUANTIZE], "step 2 of 2, quantize, would round weights that are quantized already"),
        ([QUANTIZE, RECOVER, QUANTIZE], "step 3 of 3, quantize, would round"),
    ],
)
def test_an_order_that_makes_no_sense_names_the_step(steps: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        recipe({"fine": [QUANTIZE, RECOVER, RECOVER], "a": steps})
    assert [error["loc"] for error in caught.value.errors()] == [("variants", "a")]


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_each_base_is_planned_for(two: Store) -> None:
    made = make_plan(competing({"int4": [QUANTIZE], "small": [FROM], "small-int4": [FROM, QUANTIZE]}), two)
    whole, small = model_shape(CONFIG, "bfloat16"), model_shape(SMALL, "bfloat16")
    assert made.problems == []
    fetched = {stage.subject: stage.download_bytes for stage in made.stages if stage.stage == "source"}
    assert fetched == {"base": sizes.dense_bytes(whole), "small": sizes.dense_bytes(small)}
    assert made.weight_bytes("quantize", "int4") == sizes.packed_bytes(whole, step())
    assert made.weight_bytes("quantize", "small-int4") == sizes.packed_bytes(small, step())
    assert made.weight_bytes("export", "small@onnxruntime") == sizes.onnx_bytes(small, None, "cpu")
    assert made.weight_bytes("export", "base@onnxruntime") == sizes.onnx_bytes(whole, None, "cpu")
    assert not [stage for stage in made.stages if stage.stage == "from"]


def test_a_variant_heals_towards_its_own_base(two: Store) -> None:
    """Forward and backward through the small student, forward through the small teacher."""
    step_tokens, steps = 4 * 32, 20
    healing = {"recover": {"text": "wiki", "length": 32, "steps": steps, "check_every": 1000, "held_out": 8}}
    made = make_plan(competing({"a": [FROM, QUANTIZE, healing], "b": [QUANTIZE, healing]}), two)
    looks = 2 * 8 * 32 * 4
    speed = 200e9 * constants.TRAINING_EFFICIENCY["bfloat16"]
    weights = [model_shape(config, "bfloat16").product_weights for config in (CONFIG, SMALL)]
    apart = made.expected_seconds("recover", "b") - made.expected_seconds("recover", "a")
    products = (weights[0] - weights[1]) * (8 * step_tokens * steps + looks)
    dense = [sizes.dense_bytes(model_shape(config, "bfloat16")) for config in (CONFIG, SMALL)]
    loading = 3 * (dense[0] - dense[1]) * constants.SECONDS_PER_GB["load"] / 1e9
    assert apart == pytest.approx(products / speed + loading)


def test_a_base_that_is_quantized_or_has_other_tokens(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    found = CONFIG | {"quantization_config": {"quant_method": "awq"}}
    monkeypatch.setattr(sources, "base_config", lambda base, store: found if "small" in base.uri else CONFIG)
    made = make_plan(competing({"a": [FROM]}), calm)
    assert problems(made) == [("bases.small", "the base is quantized already, in awq format")]
    other = CONFIG | {"vocab_size": 192}
    monkeypatch.setattr(sources, "base_config", lambda base, store: other if "small" in base.uri else CONFIG)
    (problem,) = make_plan(competing({"a": [FROM]}), calm).problems
    assert (problem.path, problem.message) == ("bases.small", "it predicts 192 tokens, and the base 160")


def test_a_base_without_a_tokenizer(calm: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "base_config", lambda base, store: SMALL if "small" in base.uri else CONFIG)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "whole").mkdir()
    monkeypatch.setattr(sources, "local_folder", lambda base: tmp_path / ("small" if "small" in base.uri else "whole"))
    (problem,) = make_plan(competing({"a": [FROM]}), calm).problems
    assert problem.path == "bases.small"
    assert problem.message == f"{tmp_path / 'small'} has no tokenizer that can be read"
    assert "tokenizer.json" in problem.hint


def test_a_base_that_cannot_be_asked_leaves_its_variants_unknown(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(base: Any, store: Any) -> dict[str, Any]:
        if "small" in base.uri:
            raise SourceError("the hub does not answer")
        return CONFIG

    monkeypatch.setattr(sources, "base_config", config)
    made = make_plan(competing({"int4": [QUANTIZE], "a": [FROM, QUANTIZE]}), calm)
    assert made.problems == []
    assert made.notes[1] == "sizes, memory and times are unknown until the config of bases.small can be read"
    assert made.weight_bytes("quantize", "int4") is not None
    assert made.weight_bytes("quantize", "a") is None
    assert made.expected_seconds("benchmark", "all candidates") is None


def test_windows_fit_the_shortest_of_the_bases(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    short = CONFIG | {"max_position_embeddings": 16}
    monkeypatch.setattr(sources, "base_config", lambda base, store: short if "small" in base.uri else CONFIG)
    said = problems(make_plan(competing({"a": [FROM]}), calm))
    assert ("evaluate", "divergence windows of 32 tokens; base small knows 16 positions") in said


def test_vocabularies_of_local_folders_are_compared(calm: Store, tmp_path: Path) -> None:
    for name, words in (("one", "a b c"), ("two", "a c b"), ("three", "a b c")):
        (tmp_path / name).mkdir()
        write_tokenizer(tmp_path / name, words.split())
    bases = {"small": f"file:{tmp_path}/two"}
    (problem,) = make_plan(competing({"a": [FROM]}, base=f"file:{tmp_path}/one", bases=bases), calm).problems
    assert problem.path == "bases.small"
    assert "'b' is number 2 here and number 1 there" in problem.message
    bases = {"small": f"file:{tmp_path}/three"}
    assert make_plan(competing({"a": [FROM]}, base=f"file:{tmp_path}/one", bases=bases), calm).problems == []


# --- vocabularies -----------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path, words: list[str], added: tuple[str, ...] = (), unigram: bool = False) -> None:
    vocab: Any = [[word, -1.0] for word in words] if unigram else {word: at for at, word in enumerate(words)}
    more = [{"id": len(words) + at, "content": word} for at, word in enumerate(added)]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": more}))
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(words) + len(added)}))


def test_a_vocabulary_is_its_tokens_and_their_numbers(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder, unigram in zip(folders, (False, True, False)):
        folder.mkdir()
        write_tokenizer(folder, ["x", "y"], ("<|end|>",), unigram)
    assert vocabulary.tokens(folders[0]) == {"x": 0, "y": 1, "<|end|>": 2}
    assert vocabulary.difference(folders[1], folders[0]) is None
    write_tokenizer(folders[2], ["x", "y"])
    said = vocabulary.difference(folders[2], folders[0])
    assert said.endswith("it has 2 tokens, and the base's 3; '<|end|>' is no token here and number 2 there")
    write_tokenizer(folders[2], ["x", "y"], ("<|end|>",))
    (folders[2] / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 64}}))
    assert vocabulary.difference(folders[2], folders[0]) == "it predicts 64 tokens, and the base 3"


@pytest.mark.parametrize("text", ["{", "{}", '{"model": {"vocab": 3}}'])
def test_a_tokenizer_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(SourceError, match="no tokenizer that can be read"):
        vocabulary.tokens(tmp_path)


# --- what goes with a winner ------------------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    """A run whose winner was made from the small base."""
    made = make_run(tmp_path)
    base, winner = made.candidates
    resolved = {
        **made.recipe.resolved,
        "base": {"uri": "hf:me/large@1", "license": "MIT"},
        "bases": {"small": {"uri": "hf:me/small@2", "license": "Apache-2.0", "sha256": "a" * 64}},
        "variants": {winner.variant: [FROM, QUANTIZE]},
    }
    checkpoint = winner.candidate.checkpoint.model_copy(update={"origin": "hf:me/small@2 → quantize w4a16 rtn"})
    candidate = winner.candidate.model_copy(update={"checkpoint": checkpoint})
    winner = winner.model_copy(update={"candidate": candidate, "checkpoint": checkpoint})
    return made.model_copy(
        update={
            "candidates": [base, winner],
            "recipe": RecipeRef(path="tiny.yaml", digest="e" * 64, resolved=resolved),
        }
    )


def test_the_card_names_the_base_that_it_was_made_from(record: RunRecord) -> None:
    lines = card.make_card(record, record.candidates[1]).splitlines()
    assert "| base | hf:me/small@2 |" in lines
    assert "| licence of the base | Apache-2.0 |" in lines
    assert "| compared with | hf:me/large@1 |" in lines
    assert "| steps | quantize w4a16 rtn |" in lines
    assert not any("does not predict what the base predicts" in line for line in lines)


def test_the_bill_names_the_base_that_it_was_made_from(record: RunRecord) -> None:
    made = bom.make_bom(record, record.candidates[1], {}, {})
    (ancestor,) = made["metadata"]["component"]["pedigree"]["ancestors"]
    assert ancestor["name"] == "hf:me/small@2"
    assert ancestor["purl"] == "pkg:huggingface/me/small@2"
    assert ancestor["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert ancestor["hashes"] == [{"alg": "SHA-256", "content": "a" * 64}]
    assert made["metadata"]["component"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]


def test_mlflow_and_the_report_name_the_bases(record: RunRecord) -> None:
    winner = record.candidates[1]
    assert naming.recipe_params(record)["bases"] == "small: hf:me/small@2"
    assert naming.recipe_params(record)["base"] == "hf:me/large@1"
    assert naming.candidate_params(record, winner)["base"] == "hf:me/small@2"
    assert naming.candidate_params(record, winner)["steps"].startswith("from base=small; quantize")
    assert naming.candidate_params(record, record.candidates[0])["base"] == "hf:me/large@1"
    assert "from small, hf:me/small@2" in str(making.table(record))
