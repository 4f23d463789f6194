"""Bases of two sizes compete in one run, and the one that was made from the smaller is registered as such."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from command import pennyweight
from test_flow import latest

from pennyweight import stages
from pennyweight.errors import StageError
from pennyweight.progress import Progress
from pennyweight.recipe import Recipe
from pennyweight.store import Store

INT8 = {"quantize": {"scheme": "w8a16", "group_size": 32}}
FROM = {"from": {"base": "small"}}
BROKEN = {"from": {"base": "broken"}}
RECOVER = {"recover": {"text": "calibration-text", "steps": 4, "batch": 2, "length": 32, "held_out": 2}}


def competing(text: str, small: Path, variants: dict[str, list[Any]], **bases: str) -> dict[str, Any]:
    body = yaml.safe_load(text)
    body["bases"] = {"small": {"uri": f"file:{small}", "license": "Apache-2.0"}, **bases}
    body["base"] = {"uri": body["base"], "license": "MIT"}
    body["variants"] = variants
    return body


@pytest.fixture(scope="module")
def finished(
    tiny_recipe_text: str, tiny_small: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bases")
    broken = shutil.copytree(tiny_small, folder / "broken")
    (broken / "model.safetensors").unlink()
    variants = {"small": [FROM], "healed": [FROM, INT8, RECOVER], "broken": [BROKEN, INT8]}
    body = competing(tiny_recipe_text, tiny_small, variants, broken=f"file:{broken}")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    done = pennyweight("run", "tiny.yaml", cwd=folder, store=folder / "store")
    assert done.returncode == 0, done.stderr + done.stdout
    return folder, latest(folder)


def test_the_smaller_base_competes(finished: tuple[Path, dict[str, Any]]) -> None:
    found = {result["variant"]: result for result in finished[1]["candidates"]}
    parameters = {name: result["checkpoint"]["parameters"] for name, result in found.items() if result["checkpoint"]}
    assert parameters["small"] == parameters["healed"] < parameters["base"]
    small = found["small"]
    divergence, task = small["verdict"]["conditions"]
    assert (divergence["status"], task["status"], small["verdict"]["status"]) == ("info", "pass", "pass")
    assert small["quality"]["metrics"]["kl_mean"]["value"] > 0.01  # it is another model, and need not imitate
    assert small["cost"]["points"][0]["saving_against"] == "base@transformers"


def test_a_variant_of_the_smaller_base_heals_towards_it(finished: tuple[Path, dict[str, Any]]) -> None:
    """Rounded to 8 bits it is near its own base, and far from the recipe's."""
    healed = next(result for result in finished[1]["candidates"] if result["variant"] == "healed")
    assert healed["checkpoint"]["healing"]["kl_before"] < 0.01
    assert healed["quality"]["metrics"]["kl_mean"]["value"] > 0.1


def test_a_base_that_cannot_be_used_is_the_error_of_its_variants(finished: tuple[Path, dict[str, Any]]) -> None:
    broken = next(result for result in finished[1]["candidates"] if result["variant"] == "broken")
    assert broken["verdict"]["status"] == "error"
    assert "broken has no .safetensors weights" in broken["verdict"]["reasons"][0]
    assert finished[1]["status"] == "partial"


def test_the_winner_is_registered_with_its_own_origin_and_licence(
    finished: tuple[Path, dict[str, Any]], tiny_small: Path, tiny_model: Path
) -> None:
    folder, record = finished
    assert record["winner"] in ("small@onnxruntime", "healed@onnxruntime")
    assert record["registered"]["model"] == "tiny"
    (text,) = {path.read_text() for path in folder.rglob("MODEL_CARD.md")}
    assert f"| base | file:{tiny_small} |" in text
    assert "| licence of the base | Apache-2.0 |" in text
    assert f"| compared with | {tiny_model} |" in text
    (bill,) = {path.read_text() for path in folder.rglob("mlbom.cdx.json")}
    (ancestor,) = json.loads(bill)["metadata"]["component"]["pedigree"]["ancestors"]
    assert ancestor["name"] == f"file:{tiny_small}"
    assert f"from small, file:{tiny_small}" in (folder / "runs/latest/report.html").read_text()


def test_another_vocabulary_is_refused_before_the_run(tiny_recipe_text: str, tiny_small: Path, tmp_path: Path) -> None:
    other = with_other_vocabulary(tiny_small, tmp_path)
    body = competing(tiny_recipe_text, other, {"small": [FROM]})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    done = pennyweight("run", "tiny.yaml", cwd=tmp_path, store=tmp_path / "store")
    assert done.returncode == 2
    assert "bases.small: its vocabulary is not the base's" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_vocabulary_found_after_the_download_is_the_error_of_the_base(
    tiny_recipe_text: str, tiny_small: Path, tmp_path: Path
) -> None:
    other = with_other_vocabulary(tiny_small, tmp_path)
    recipe = Recipe.model_validate(competing(tiny_recipe_text, other, {"small": [FROM]}))
    plan: Any = SimpleNamespace(expected_seconds=lambda stage, subject: None)
    run = stages.Run(recipe, Store(tmp_path / "store"), Progress(io.StringIO()), plan, "cpu")
    bases = stages.fetch_bases(run, stages.fetch_base(run))
    assert bases.start_of(recipe, "base") == bases.found["base"]
    with pytest.raises(StageError, match="base small: its vocabulary is not the base's"):
        bases.start_of(recipe, "small")


def with_other_vocabulary(model: Path, folder: Path) -> Path:
    """A copy of a model that numbers two tokens the other way round."""
    other = shutil.copytree(model, folder / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    return other
