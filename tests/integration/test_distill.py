"""Distillation through processes: two that share a batch, one that is killed, and a recipe from end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from command import pennyweight
from test_flow import latest

from pennyweight import checkpoints, installed
from pennyweight.distillation import train as training
from pennyweight.distillation import worker
from pennyweight.distillation.train import Work, train
from pennyweight.recipe import Distill
from pennyweight.records import Checkpoint


def step(**changes: object) -> Distill:
    usual = {"text": "any", "batch": 4, "length": 32, "held_out": 4, "check_every": 2, "learning_rate": 0.003}
    return Distill.model_validate({**usual, "steps": 6, **changes})


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Checkpoint:
    return checkpoints.describe(tiny_model, "tiny")


@pytest.fixture(scope="module")
def pruned(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Other weights of the same shape."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("pruned")
    model = AutoModelForCausalLM.from_pretrained(base.path)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return checkpoints.describe(folder, "pruned")


def work(base: Checkpoint, student: Checkpoint, settings: Distill, folder: Path) -> Work:
    folder.mkdir()
    windows = np.random.default_rng(0).integers(1, 512, (settings.calibrate.samples, settings.length))
    np.save(folder / "windows.npy", windows)
    return Work(base, student.path, "bfloat16", str(folder / "windows.npy"), settings, "cpu", str(folder))


def test_two_processes_learn_what_one_does(base: Checkpoint, pruned: Checkpoint, tmp_path: Path) -> None:
    told: list[float] = []
    alone = train(work(base, pruned, step(accumulate=2), tmp_path / "alone"))
    both = worker.train_in_processes(
        work(base, pruned, step(accumulate=2, processes=2), tmp_path / "both"), lambda detail, done: told.append(done)
    )
    assert [at for at, _ in both.curve] == [at for at, _ in alone.curve] == [0, 2, 4, 6]
    for mine, theirs in ((alone.curve, both.curve), (alone.losses, both.losses)):
        assert [value for _, value in mine] == pytest.approx([value for _, value in theirs], rel=2e-3)
    assert alone.curve[-1][1] < alone.curve[0][1]
    assert told[-1] == 1.0


def test_a_process_killed_outright_goes_on(base: Checkpoint, pruned: Checkpoint, tmp_path: Path) -> None:
    settings = step(steps=30, check_every=3)
    whole = train(work(base, pruned, settings, tmp_path / "whole"))
    broken = work(base, pruned, settings, tmp_path / "broken")
    (tmp_path / "work.json").write_text(json.dumps(broken.dump()))
    code = (
        "import sys; from pennyweight.distillation import train, worker; train.SAVE_SECONDS = 0.0; "
        f"sys.argv = ['', {str(tmp_path / 'work.json')!r}]; worker.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ}, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "broken").glob("state-*.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "broken" / training.COURSE).exists()
    again = train(broken)
    assert (again.curve, again.losses) == (whole.curve, whole.losses)
    kept = f"best-{whole.kept:08d}/model.safetensors"
    assert (tmp_path / "broken" / kept).read_bytes() == (tmp_path / "whole" / kept).read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_recipe_text: str) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    recipe = yaml.safe_load(tiny_recipe_text)
    learn = {"text": "calibration-text", "steps": 4, "batch": 4, "length": 32, "held_out": 4, "check_every": 2}
    cached = {**learn, "teacher": {"cache": "top_k", "k": 8}}
    quantize = {"quantize": {"scheme": "w8a16", "group_size": 32}}
    writes = [{"distill": {**learn, "on_policy": {"prompt": 8}}}] if installed.installed_version("trl") else []
    recipe["variants"] = {
        "taught": [{"distill": cached}, quantize],
        "taught-faster": [*writes, {"distill": {**cached, "learning_rate": 0.001}}],
    }
    recipe["register"] = None
    (folder / "distill.yaml").write_text(yaml.safe_dump(recipe))
    done = pennyweight("run", "distill.yaml", cwd=folder, store=folder / "store")
    assert done.returncode in (0, 1), done.stderr
    return folder


def test_a_recipe_distills_before_it_quantizes(finished: Path) -> None:
    record = latest(finished)
    made = {result["variant"]: result["checkpoint"] for result in record["candidates"]}
    assert made["taught"]["distillation"]["steps"] == 4
    assert made["taught"]["rounding"]["layers"]
    assert made["taught"]["distillation"]["cache_bytes_per_token"] == 8 * 2 + 9 * 2
    assert not made["taught"]["distillation"]["cache_reused"]
    assert made["taught-faster"]["distillation"]["cache_reused"]
    assert ("on policy" in made["taught-faster"]["origin"]) == bool(installed.installed_version("trl"))
    assert not list((finished / "store" / "work").iterdir())
    assert "distilled:" in next((finished / "runs" / "latest").glob("report.html")).read_text()


def test_the_plan_says_what_a_cache_takes(finished: Path) -> None:
    plan = pennyweight("plan", "distill.yaml", cwd=finished, store=finished / "store")
    assert plan.returncode == 0, plan.stderr
    assert "34 bytes a token" in plan.stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student": {"layers": 2}}, "would be no smaller"),
        ({"teacher": {"cache": "top_k", "k": 600}}, "512 tokens"),
        ({"answers": True}, "plain text, without answers"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, tiny_recipe_text: str, changes: dict, words: str) -> None:
    recipe = yaml.safe_load(tiny_recipe_text)
    recipe["variants"] = {"taught": [{"distill": {"text": "calibration-text", **changes}}]}
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(recipe))
    plan = pennyweight("plan", "distill.yaml", cwd=tmp_path, store=tmp_path / "store")
    assert plan.returncode == 2
    assert words in plan.stdout + plan.stderr
