"""Pruned variants through the whole flow: every runtime loads what is left, also once it is quantized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pennyweight import flow
from pennyweight.recipe import load_recipe
from pennyweight.report.page import render
from pennyweight.store import Store


@pytest.mark.parametrize("runtime", ["transformers", "onnxruntime", "openvino"])
def test_a_pruned_variant_goes_through_the_flow(
    runtime: str, tiny_recipe_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(tiny_recipe_text)
    taken = {"layers": 1, "ffn": 0.5, "kv_groups": 1, "text": "calibration-text", "samples": 16, "length": 32}
    quantized = {"scheme": "w8a16", "method": "rtn", "group_size": 32}
    recipe["variants"] = {"pruned": [{"prune": taken}], "pruned-int8": [{"prune": taken}, {"quantize": quantized}]}
    recipe["runtimes"] = {"base": ["transformers"], "variants": [runtime]}
    recipe["evaluate"]["tasks"], recipe["evaluate"]["generation"] = [], None
    recipe["gate"] = [{"metric": "perplexity", "relative_within": 0.5}]
    recipe.pop("register")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    record = flow.run(load_recipe(path), path, tmp_path / "runs", Store(tmp_path / "store"), lambda _: None)
    assert not [result.verdict for result in record.candidates if result.verdict.status == "error"]
    for result in record.candidates[1:]:
        made = result.checkpoint
        assert made and made.pruning
        config = json.loads((Path(made.path) / "config.json").read_text())
        sizes = ("num_hidden_layers", "intermediate_size", "num_key_value_heads", "num_attention_heads", "head_dim")
        assert [config[name] for name in sizes] == [1, 128, 1, 2, 32]
        assert made.pruning.layers == (2, 1) and made.pruning.kl
        assert made.rounding or result.variant == "pruned"
    page = render(record)
    assert "FFN channels: 256 → 128" in page and "What the layers cost" in page
