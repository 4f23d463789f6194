"""The whole flow on a tiny random model, through the command line."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import pennyweight

from pennyweight import load_recipe, promote, rollback, run
from pennyweight.errors import RecipeError, UsageError
from pennyweight.store import folder_digest

#: What of a candidate lies in the store.
PARTS = ("checkpoint", "candidate")


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


def test_a_saving_follows_from_its_rounds(finished: Path) -> None:
    for result in latest(finished)["candidates"]:
        for point in result["cost"]["points"]:
            logs = point["log_ratios"]
            if point["saving_against"] is None:
                assert logs == []
                continue
            assert len(logs) == point["rounds"]
            assert point["saving"]["value"] == pytest.approx(1 - math.exp(sum(logs) / len(logs)))


def test_base_does_not_differ_from_itself(finished: Path) -> None:
    base = next(result for result in latest(finished)["candidates"] if result["id"] == "base@transformers")
    metrics = {name: metric["value"] for name, metric in base["quality"]["metrics"].items()}
    assert metrics["kl_mean"] == 0
    assert metrics["top1_agreement"] == 1
    assert metrics["perplexity_ratio"] == 1


def test_every_source_of_evidence_is_measured_with_an_interval(finished: Path) -> None:
    result = next(result for result in latest(finished)["candidates"] if result["id"] == "int4-gptq@onnxruntime")
    metrics = result["quality"]["metrics"]
    names = ["kl_mean", "top1_agreement", "perplexity_ratio", "more-text/perplexity", "openbookqa/acc_norm"]
    for name in (*names, "generation/surprise", "generation/repetition"):
        found = metrics[name]
        assert found["low"] < found["value"] < found["high"] or found["value"] == 0, name
    assert {metrics[name]["n"] for name in ("openbookqa/acc", "generation/surprise")} == {20, 4}
    assert metrics["openbookqa/acc_norm"]["gained"] + metrics["openbookqa/acc_norm"]["lost"] <= 20
    conditions = result["verdict"]["conditions"]
    assert [condition["status"] for condition in conditions] == ["fail", "pass"]
    assert all(condition["needed"] and condition["detectable"] for condition in conditions)


@pytest.mark.parametrize("target", ["runs/latest", "tiny@challenger"])
def test_the_winner_is_measured_by_its_runs_name_and_by_its_registered_one(finished: Path, target: str) -> None:
    (finished / "words.txt").write_text("A young bird walks slowly over the old stone.\n\n" * 50)
    load = ("--workload", "12:4", "--concurrency", "2", "--requests", "6", "--text", "words.txt", "--json")
    done = pennyweight("bench", target, *load, cwd=finished, store=finished / "store")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["runtime"], report["target"]) == ("onnxruntime", target)
    assert report["loads"][0]["input_tokens"] == 12 * report["loads"][0]["requests"] > 0


def test_looks_go_on_until_the_gate_is_sure(finished: Path, tmp_path: Path) -> None:
    """20 questions cannot see a margin of 0.1; each look doubles them, of the undecided task alone."""
    shutil.copy(finished / "tiny.yaml", tmp_path)
    shutil.copytree(finished / "store", tmp_path / "store")
    changes = (
        "on_inconclusive=extend",
        "gate=[{metric: kl_mean, max: 0.01}, {task: openbookqa, metric: acc, non_inferior_within: 0.1}]",
    )
    done = pennyweight("run", "tiny.yaml", *changes, cwd=tmp_path, store=tmp_path / "store")
    assert done.returncode == 0, done.stderr
    record = latest(tmp_path)
    sure = next(result for result in record["candidates"] if result["id"] == "int8@onnxruntime")
    text, task = sure["verdict"]["conditions"]
    assert (text["status"], text["look"], task["status"]) == ("pass", 1, "pass")
    assert task["look"] > 1
    assert task["n"] == 20 * 2 ** (task["look"] - 1)
    assert sure["quality"]["metrics"]["openbookqa/acc"]["n"] == task["n"]
    assert sure["quality"]["metrics"]["generation/surprise"]["n"] == 4
    reference = (tmp_path / "runs/latest/samples/reference.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["task"] == "openbookqa" for line in reference) == task["n"]  # those of later looks too
    failed = next(result for result in record["candidates"] if result["id"] == "int4-gptq@onnxruntime")
    assert failed["quality"]["metrics"]["openbookqa/acc"]["n"] == 20  # its divergence had failed it already
    looked = [stage for stage in record["stages"] if "look" in stage["subject"] and not stage["reused"]]
    assert {stage["stage"] for stage in looked} == {"reference", "evaluate"}


def test_flips_and_comparisons(finished: Path, tmp_path: Path) -> None:
    store, names = finished / "store", ("int4-gptq@onnxruntime", "int8@onnxruntime")
    shown = pennyweight("show", "--candidate", names[0], "--task", "openbookqa", cwd=finished, store=store)
    assert shown.returncode == 0, shown.stderr
    assert "int4-gptq@onnxruntime (ours) against the base" in shown.stdout
    sides = [f"runs/latest:{name}" for name in names]
    compared = pennyweight("compare", *sides, "--json", "--junit", str(tmp_path / "j.xml"), cwd=finished, store=store)
    assert compared.returncode == 0, compared.stderr
    assert any("saving against theirs at 1" in name for name, *_ in json.loads(compared.stdout)["facts"])
    metric = next(item for item in json.loads(compared.stdout)["metrics"] if item["name"] == "openbookqa/acc_norm")
    right = []
    for name in names:
        rows = [json.loads(line) for line in (finished / f"runs/latest/samples/{name}.jsonl").open()]
        right.append({row["doc_id"]: row["acc_norm"] for row in rows if row["task"] == "openbookqa"})
    assert metric["gained"] == sum(right[0][item] > right[1][item] for item in right[0])
    assert metric["lost"] == sum(right[0][item] < right[1][item] for item in right[0])
    assert 'name="openbookqa/acc_norm"' in (tmp_path / "j.xml").read_text()
    unknown = pennyweight("show", "--task", "piqa", cwd=finished, store=store)
    assert (unknown.returncode, "no task 'piqa'" in unknown.stderr) == (2, True)


def test_exports_are_checked_against_their_checkpoint(finished: Path) -> None:
    for result in latest(finished)["candidates"]:
        if result["runtime"] == "onnxruntime":
            parity = result["candidate"]["parity"]
            assert 0 <= parity["kl_mean"] <= parity["tolerance"]
            assert 0 < parity["delta_mean"] <= parity["delta_max"]


def test_a_repeated_run_does_nothing_twice(finished: Path) -> None:
    before = latest(finished)
    done = pennyweight("run", "tiny.yaml", cwd=finished, store=finished / "store")
    assert done.returncode == 0, done.stderr
    after = latest(finished)
    assert all(stage["reused"] for stage in after["stages"] if stage["stage"] != "track")
    assert outcome(after) == outcome(before)
    assert after["registered"]["version"] == before["registered"]["version"]


def test_the_store_keeps_what_a_run_uses(finished: Path, tmp_path: Path) -> None:
    store = shutil.copytree(finished / "store", tmp_path / "store")

    def collect(cwd: Path) -> dict[str, Any]:
        done = pennyweight("store", "gc", "--older-than", "0", "--json", cwd=cwd, store=store)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert collect(tmp_path)["removed"] == 0
    shutil.rmtree(store / "uses")  # the store forgets the run; its record still names its checkpoints and candidates
    found = collect(finished)
    paths = [Path(result[part]["path"]) for result in latest(finished)["candidates"] for part in PARTS]
    here = finished / "store"  # the base lies in a folder of its own
    named = {path.relative_to(here) for path in paths if path.is_relative_to(here)}
    assert found["removed"] > 0
    assert found["kept"] == len(named)
    for path in named:
        assert folder_digest(store / path) == folder_digest(here / path)
    assert collect(tmp_path)["kept"] == 0


def test_show_report_and_promote(finished: Path) -> None:
    shown = pennyweight("show", cwd=finished, store=finished / "store")
    assert shown.returncode == 0
    assert "winner: int8@onnxruntime" in shown.stdout
    promoted = pennyweight("promote", "tiny", "--json", cwd=finished, store=finished / "store")
    assert promoted.returncode == 0, promoted.stderr
    trial = json.loads(promoted.stdout)["checks"]["trial"]
    assert trial["same_engine"]
    assert 0 <= trial["divergence"] < 1e-6
    assert trial["answer_tokens"] > 0
    history = pennyweight("history", "tiny", cwd=finished, store=finished / "store")
    assert "tiny: challenger is version 1, champion is version 1" in history.stdout
    back = pennyweight("rollback", "tiny", cwd=finished, store=finished / "store")
    assert (back.returncode, "no previous version to go back to" in back.stderr) == (2, True)
    again = json.loads(pennyweight("show", "--json", cwd=finished, store=finished / "store").stdout)
    assert again["winner"] == "int8@onnxruntime"


def test_a_recipe_is_run_and_its_winner_promoted(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a notebook does it."""
    monkeypatch.setenv("PENNYWEIGHT_HOME", str(finished / "store"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)

    said: list[str] = []
    record = run(load_recipe(finished / "tiny.yaml"), say=said.append)
    assert outcome(record.model_dump(mode="json")) == outcome(latest(finished))
    assert record.registered and record.registered.model == "tiny"
    assert Path(record.run_dir).parent == tmp_path / "runs"
    assert any("report" in line or "track" in line for line in said)
    done = promote("tiny", reason="the first")
    assert (done.version, done.changed) == (record.registered.version, True)
    with pytest.raises(UsageError, match="no previous version"):
        rollback("tiny")
    with pytest.raises(RecipeError, match="gate"):
        load_recipe(finished / "tiny.yaml", ["gate.0.metric=nonsense"])


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
