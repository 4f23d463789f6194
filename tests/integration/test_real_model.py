"""The real 135M model with small budgets: what `plan` said is held against what `run` measured."""

from __future__ import annotations

import json
from typing import Any

import pytest
from command import pennyweight
from test_flow import latest

from pennyweight import shipped

SMALL = [
    "variants={int8: [{quantize: {scheme: w8a16, method: rtn, group_size: 64, head: w8a16}}]}",
    "runtimes={base: [transformers], variants: [onnxruntime]}",
    "evaluate={name: small, divergence: {text: xsum-documents, windows: 6, length: 256}, "
    "tasks: [{task: piqa, limit: 40}], batch_size: 8}",
    "gate=[{metric: kl_mean, max: 0.05}, {task: piqa, metric: acc_norm, non_inferior_within: 0.2}]",
    "benchmark.concurrency=[1]",
    "benchmark.slo=null",
]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the plan made before anything was downloaded, the record of the run)"""
    folder = tmp_path_factory.mktemp("real")
    recipe = str(shipped.recipes()["smollm2-135m-cpu"])
    planned = pennyweight("plan", recipe, "--json", *SMALL, cwd=folder, store=folder / "store")
    assert planned.returncode == 0, planned.stderr
    done = pennyweight("run", recipe, *SMALL, cwd=folder, store=folder / "store")
    assert done.returncode == 0, done.stderr
    return json.loads(planned.stdout), latest(folder)


pytestmark = pytest.mark.real


def test_eight_bits_keep_the_model_and_cost_less(real: tuple[dict[str, Any], dict[str, Any]]) -> None:
    _, record = real
    assert record["winner"] == "int8@onnxruntime"
    winner = next(result for result in record["candidates"] if result["id"] == record["winner"])
    assert winner["quality"]["metrics"]["kl_mean"]["value"] < 0.02
    assert winner["quality"]["metrics"]["top1_agreement"]["value"] > 0.9
    assert winner["cost"]["points"][0]["saving"]["low"] > 0


def test_the_base_is_the_model_it_should_be(real: tuple[dict[str, Any], dict[str, Any]]) -> None:
    _, record = real
    base = next(result for result in record["candidates"] if result["variant"] == "base")
    assert base["checkpoint"]["parameters"] == 134_515_008
    assert 15 < base["quality"]["metrics"]["perplexity"]["value"] < 45


def test_plan_told_sizes_exactly_memory_within_a_quarter_and_time_within_twice(
    real: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    plan, record = real
    planned = {(stage["stage"], stage["subject"]): stage["weight_bytes"] for stage in plan["stages"]}
    for result in record["candidates"]:
        where = ("source", "base") if result["variant"] == "base" else ("quantize", result["variant"])
        assert result["checkpoint"]["weight_bytes"] == planned[where]
        if result["runtime"] == "onnxruntime":
            assert result["candidate"]["weight_bytes"] == planned["export", result["id"]]
    peak = max(stage["peak_memory_bytes"] for stage in record["stages"])
    assert 0.75 <= plan["peak_memory_bytes"] / peak <= 1.25
    assert 0.5 <= plan["seconds"] / record["seconds"] <= 2.0
