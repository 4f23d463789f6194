"""The whole flow on a tiny random model, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest


def pennyweight(*arguments: str, cwd: Path, store: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pennyweight", *arguments]
    variables = {**os.environ, "PENNYWEIGHT_HOME": str(store), "MLFLOW_TRACKING_URI": "", **environment}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=600)


def kill_inside(stage: str, cwd: Path, store: Path) -> None:
    """Run the tiny recipe and kill its process group as soon as that stage has begun to write."""
    command = [sys.executable, "-m", "pennyweight", "run", "tiny.yaml"]
    variables = {**os.environ, "PENNYWEIGHT_HOME": str(store), "MLFLOW_TRACKING_URI": ""}
    process = subprocess.Popen(
        command, cwd=cwd, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not list((store / "tmp").glob(f"{stage}-*")):
        assert process.poll() is None, f"the run ended before its stage {stage} began"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def latest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs" / "latest" / "run.json").read_text())


def outcome(record: dict[str, Any]) -> dict[str, Any]:
    """What must be the same whenever the same recipe runs on the same machine: digests and quality, not times."""
    found = {}
    for result in record["candidates"]:
        metrics = {name: metric["value"] for name, metric in result["quality"]["metrics"].items()}
        found[result["id"]] = (result["candidate"]["digest"], result["quality"]["samples_digest"], metrics)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder in which the tiny recipe has run once, its store beside it."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = request.getfixturevalue("tiny_recipe_text")
    (folder / "tiny.yaml").write_text(recipe)
    done = pennyweight("run", "tiny.yaml", cwd=folder, store=folder / "store")
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


def test_a_run_ends_with_a_winner_in_the_registry_and_a_report(finished: Path) -> None:
    record = latest(finished)
    assert record["status"] == "passed"
    assert record["winner"] == "int8@onnxruntime"
    assert record["base"] == "base@transformers"
    assert record["registered"]["alias"] == "challenger"
    assert record["tracking"]["run_id"]
    verdicts = {result["id"]: result["verdict"]["status"] for result in record["candidates"]}
    assert verdicts["base@transformers"] == "base"
    assert verdicts["int8@onnxruntime"] == "pass"
    assert verdicts["int4-gptq@onnxruntime"] == "fail"
    html = (finished / "runs/latest/report.html").read_text()
    assert "int8@onnxruntime" in html
    assert record["registered"]["model"] in html


def test_cost_follows_from_the_times(finished: Path) -> None:
    for result in latest(finished)["candidates"]:
        for point in result["cost"]["points"]:
            assert point["usd_per_1m_tokens"] == pytest.approx(1.0 / 3600 / point["total_tokens_per_second"] * 1e6)


def test_base_does_not_differ_from_itself(finished: Path) -> None:
    base = next(result for result in latest(finished)["candidates"] if result["id"] == "base@transformers")
    metrics = {name: metric["value"] for name, metric in base["quality"]["metrics"].items()}
    assert metrics["kl_mean"] == 0
    assert metrics["top1_agreement"] == 1
    assert metrics["perplexity_ratio"] == 1


def test_exports_are_checked_against_their_checkpoint(finished: Path) -> None:
    for result in latest(finished)["candidates"]:
        if result["runtime"] == "onnxruntime":
            assert 0 <= result["candidate"]["parity"]["kl_mean"] <= result["candidate"]["parity"]["tolerance"]


def test_a_repeated_run_does_nothing_twice(finished: Path) -> None:
    before = latest(finished)
    done = pennyweight("run", "tiny.yaml", cwd=finished, store=finished / "store")
    assert done.returncode == 0, done.stderr
    after = latest(finished)
    assert all(stage["reused"] for stage in after["stages"] if stage["stage"] != "track")
    assert outcome(after) == outcome(before)
    assert after["registered"]["version"] == before["registered"]["version"]


def test_show_report_and_promote(finished: Path) -> None:
    shown = pennyweight("show", cwd=finished, store=finished / "store")
    assert shown.returncode == 0
    assert "winner: int8@onnxruntime" in shown.stdout
    promoted = pennyweight("promote", "tiny", cwd=finished, store=finished / "store")
    assert promoted.returncode == 0, promoted.stderr
    assert "champion" in promoted.stdout
    again = json.loads(pennyweight("show", "--json", cwd=finished, store=finished / "store").stdout)
    assert again["winner"] == "int8@onnxruntime"


@pytest.mark.parametrize("victim", ["step", "export", "reference", "evaluate", "benchmark"])
def test_a_killed_run_goes_on_where_it_was(finished: Path, tmp_path: Path, victim: str) -> None:
    """Kill -9 inside one kind of stage; the next run ends with the same digests and repeats that kind of stage only."""
    shutil.copy(finished / "tiny.yaml", tmp_path)
    shutil.copytree(finished / "store", tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / victim)
    kill_inside(victim, cwd=tmp_path, store=tmp_path / "store")
    assert latest_run(tmp_path) is None
    done = pennyweight("run", "tiny.yaml", cwd=tmp_path, store=tmp_path / "store")
    assert done.returncode in (0, 1), done.stderr
    assert outcome(latest(tmp_path)) == outcome(latest(finished))
    kinds = {stage["stage"] for stage in latest(tmp_path)["stages"] if not stage["reused"]}
    assert kinds == {"quantize" if victim == "step" else victim, "track"}


def latest_run(folder: Path) -> Path | None:
    """The newest finished run's folder."""
    link = folder / "runs" / "latest"
    return link.resolve() if link.exists() else None
