"""After a run: levers of the winner's engine, and what its candidates cost as they serve."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from command import pennyweight
from test_flow import latest

from pennyweight.benchmark import levers
from pennyweight.recipe import Benchmark
from pennyweight.records import Candidate

NAME = "int8@openvino"
LEVERS = ["small_cache", "prefix_caching", "prompt_lookup", "small_steps", "draft"]


@pytest.fixture(scope="module")
def here(tiny_recipe_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of candidates that OpenVINO serves. Whether one of them is surely cheaper hangs on
    what else the machine does."""
    folder = tmp_path_factory.mktemp("cost")
    recipe = yaml.safe_load(tiny_recipe_text)
    rounding = {"scheme": "w8a16", "group_size": 32, "head": "w8a16"}
    recipe |= {
        "variants": {"int8": [{"quantize": rounding}], "int4": [{"quantize": {**rounding, "scheme": "w4a16"}}]},
        "runtimes": {"base": ["transformers"], "variants": ["openvino"]},
        "gate": [{"metric": "kl_mean", "max": 0.1}],
        "register": None,
    }
    recipe["benchmark"] |= {"slo": {"ttft_p95_ms": 5000}, "levers": LEVERS, "draft": "int4", "decide_rounds": 3}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    done = pennyweight("run", "tiny.yaml", cwd=folder, store=folder / "store")
    assert done.returncode in (0, 1, 3), done.stderr
    return folder


def test_a_winner_has_its_levers_tried(here: Path) -> None:
    record = latest(here)
    assert [lever["lever"] for lever in record["levers"]] == (LEVERS if record["winner"] else [])
    shown = "Levers of the winner" in (here / "runs/latest/report.html").read_text()
    assert shown == bool(record["winner"])


def test_openvino_has_every_lever(here: Path) -> None:
    record = latest(here)
    int8, draft = (
        Candidate.model_validate(result["candidate"]) for result in record["candidates"] if result["variant"] != "base"
    )
    settings = Benchmark.model_validate(record["recipe"]["resolved"]["benchmark"])
    prompts = np.random.default_rng(0).integers(1, 512, (2, 16))
    tried = levers.measure(int8, settings, prompts, "cpu", lambda detail, done: None, draft)
    assert [lever.lever for lever in tried] == LEVERS
    for lever in tried:
        assert lever.saving is not None, lever.reason
        assert lever.kept == (lever.saving.low > 0)


def test_the_card_of_a_run_is_measured_once(here: Path) -> None:
    command = ["cost", f"runs/latest:{NAME}", "--users", "2", "--api", "0.5:1.5", "--json"]
    done = pennyweight(*command, cwd=here, store=here / "store")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found["candidate"] == NAME
    assert found["users"] in (1, 2)
    assert found["knee"]["concurrency"] == found["users"]
    mixes = [(mix["input_tokens"], mix["output_tokens"]) for mix in found["card"]["mixes"]]
    assert mixes == [(16, 8), (32, 2), (4, 16), (16, 16)]
    assert found["card"]["usd_per_1m_output"]["value"] > 0
    assert found["break_even"]["capacity"] > 0
    again = pennyweight(*command, cwd=here, store=here / "store")
    assert json.loads(again.stdout) == [found]
    table = pennyweight("cost", f"runs/latest:{NAME}", "--users", "2", cwd=here, store=here / "store")
    assert f"{NAME} in openvino (continuous batching)" in table.stdout
    assert "a million output tokens" in table.stdout
    assert "As it serves" in (here / "runs/latest/report.html").read_text()
    kept = json.loads((here / "runs/latest/cost/serving.json").read_text())
    assert [item["candidate"] for item in kept["candidates"]] == [NAME]
    logged = metrics_of(here, NAME)
    assert logged["usd_per_1m_output_tokens"] == found["card"]["usd_per_1m_output"]["value"]
    assert logged["knee_users"] == found["users"]


def metrics_of(here: Path, candidate: str) -> dict[str, float]:
    """What MLflow has of the candidate's run."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{here / 'mlflow/local/mlflow.db'}")
    tracking = latest(here)["tracking"]
    experiment = client.get_experiment_by_name(tracking["experiment"])
    condition = f"tags.`pennyweight.candidate` = '{candidate}' and tags.`mlflow.parentRunId` = '{tracking['run_id']}'"
    (run,) = client.search_runs([experiment.experiment_id], condition)
    return run.data.metrics


def test_an_slo_that_nothing_meets_says_how_far_off(here: Path, tmp_path: Path) -> None:
    record = json.loads((here / "runs/latest/run.json").read_text())
    record["recipe"]["resolved"]["benchmark"]["slo"] = {"ttft_p95_ms": 0.001, "tpot_p95_ms": None}
    record["run_dir"] = str(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(record))
    done = pennyweight("cost", f"{tmp_path}:{NAME}", "--users", "1", cwd=here, store=here / "store")
    assert done.returncode == 0, done.stderr
    assert "no load meets ttft_p95_ms 0.001; one user alone gets a TTFT of" in done.stdout


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"levers": ["prefix_cache"]}, "prefix_caching"),
        ({"levers": ["draft"]}, "need each other"),
        ({"levers": ["draft"], "draft": "int5"}, "no variant is called 'int5'"),
        ({"levers": ["prefix_caching", "prefix_caching"]}, "twice"),
        (
            {"levers": [], "draft": None, "workload": {"input_tokens": 8, "output_tokens": 4, "shared_prefix": 8}},
            "prefix",
        ),
    ],
)
def test_levers_that_make_no_sense_are_refused(here: Path, change: dict, says: str) -> None:
    recipe = yaml.safe_load((here / "tiny.yaml").read_text())
    recipe["benchmark"] |= {"draft": None} | change
    (here / "wrong.yaml").write_text(yaml.safe_dump(recipe))
    done = pennyweight("validate", "wrong.yaml", cwd=here, store=here / "store")
    assert (done.returncode, says in done.stderr) == (2, True), done.stderr
