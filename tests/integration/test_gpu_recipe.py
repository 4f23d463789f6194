"""The GPU recipe, end to end on a CPU and a tiny random model: the same file, two values replaced."""

from __future__ import annotations

from pathlib import Path

from command import pennyweight
from test_flow import latest

from pennyweight import shipped


def test_gpu_recipe_runs_on_a_tiny_model(tiny_model: Path, tmp_path: Path) -> None:
    recipe = str(shipped.recipes()["llama-3.1-8b-gpu"])
    small = [
        "evaluate={name: small, divergence: {text: xsum-documents, windows: 4, length: 64}, "
        "tasks: [{task: piqa, limit: 20}, {task: openbookqa, limit: 20}, {task: commonsense_qa_cloze, limit: 20}], "
        "generation: {text: xsum-documents, prompts: 4, input_tokens: 8, output_tokens: 8}}",
        "variants.int4-gptq.0.quantize.calibrate={source: boolq-passages, samples: 8, length: 64}",
        "benchmark.workload={input_tokens: 16, output_tokens: 8}",
    ]
    done = pennyweight(
        "run", recipe, "--set", "device=cpu", f"base={tiny_model}", *small, cwd=tmp_path, store=tmp_path / "store"
    )
    record = latest(tmp_path)
    assert done.returncode in (0, 1, 3), done.stderr
    assert len(record["candidates"]) == 5
    assert all(result["verdict"]["status"] != "error" for result in record["candidates"])
    assert all(result["quality"]["metrics"] and result["cost"]["points"] for result in record["candidates"])


def test_gpu_recipe_validates_and_its_plan_says_what_this_machine_lacks(tmp_path: Path) -> None:
    recipe = str(shipped.recipes()["llama-3.1-8b-gpu"])
    assert pennyweight("validate", recipe, cwd=tmp_path, store=tmp_path / "store").returncode == 0
    planned = pennyweight("plan", recipe, cwd=tmp_path, store=tmp_path / "store", HF_HUB_OFFLINE="1")
    assert planned.returncode in (0, 2)
    assert "Traceback" not in planned.stderr
    assert planned.stdout
