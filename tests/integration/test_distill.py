"""Distillation through processes: two that share a batch, one that is killed, and a recipe from end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from command import PATIENCE, pennyweight
from test_flow import latest

from pennyweight import checkpoints, installed
from pennyweight.distillation import train as training
from pennyweight.distillation import worker
from pennyweight.distillation.train import Work, train
from pennyweight.errors import StageError
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


def launched(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    variables = {**os.environ, "PENNYWEIGHT_HOME": str(folder / "store"), "MLFLOW_TRACKING_URI": ""}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=PATIENCE)


def test_launched_processes_learn_what_one_does(base: Checkpoint, pruned: Checkpoint, tmp_path: Path) -> None:
    alone = train(work(base, pruned, step(accumulate=2), tmp_path / "alone"))
    shared = work(base, pruned, step(accumulate=2), tmp_path / "shared")
    (tmp_path / "work.json").write_text(json.dumps(shared.dump()))
    (tmp_path / "run.py").write_text(
        "import json, os, sys\n"
        "from pennyweight.distillation import crew\n"
        "together = crew.join()\n"
        "assert 'RANK' not in os.environ\n"
        "if together.rank:\n"
        "    sys.exit(together.follow(print))\n"
        "from pennyweight.distillation.train import Work\n"
        "with together:\n"
        "    course = together.train(Work.load(json.load(open('work.json'))), print, print)\n"
        "print('CURVE', json.dumps([course.curve, course.losses]))\n"
    )
    done = launched(tmp_path, "run.py")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("CURVE")]
    for mine, theirs in zip((alone.curve, alone.losses), json.loads(line.removeprefix("CURVE"))):
        assert [at for at, _ in mine] == [at for at, _ in theirs]
        assert [value for _, value in mine] == pytest.approx([value for _, value in theirs], rel=2e-3)


def test_a_launched_recipe_that_cannot_be_shared_is_refused_once(tmp_path: Path, tiny_recipe_text: str) -> None:
    recipe = yaml.safe_load(tiny_recipe_text)
    recipe["variants"] = {"taught": [{"distill": {"text": "calibration-text", "ce": 0.1, "batch": 3}}]}
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(recipe))
    done = launched(tmp_path, "-m", "pennyweight", "run", "distill.yaml")
    assert done.returncode == 1  # the launcher's own
    assert "exitcode  : 2" in done.stderr
    assert done.stderr.count("variants.taught.0.distill.batch: 2 processes were launched") == 1


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


def test_one_of_two_processes_killed_is_said_and_gone_on_from(
    base: Checkpoint, pruned: Checkpoint, tmp_path: Path
) -> None:
    settings = step(steps=400, check_every=10, windows=40, patience=100, processes=2)
    broken = work(base, pruned, settings, tmp_path / "broken")
    told: list[float] = []

    def kill(detail: str, done: float) -> None:
        told.append(done)
        if len(told) == 15:
            workers = [each for each in psutil.Process().children(recursive=True) if each.environ().get("RANK") == "1"]
            workers[0].kill()

    with pytest.raises(StageError, match="one of the processes that train failed: process 1 was ended by signal 9"):
        worker.train_in_processes(broken, kill)
    assert not [each for each in psutil.Process().children(recursive=True) if "--with-parent" in each.cmdline()]
    again = replace(broken, settings=step(processes=2))
    assert worker.train_in_processes(again, lambda detail, done: None).steps == 6


def test_processes_do_not_outlive_the_run_that_started_them(
    base: Checkpoint, pruned: Checkpoint, tmp_path: Path
) -> None:
    begun = work(base, pruned, step(steps=100_000, windows=8, patience=100_000, processes=2), tmp_path / "begun")
    (tmp_path / "work.json").write_text(json.dumps(begun.dump()))
    code = (
        "import json; from pennyweight.distillation import train, worker; "
        "work = train.Work.load(json.load(open('work.json'))); "
        "worker.train_in_processes(work, lambda *said: print('on', flush=True))"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "on\n"
        left = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(left) >= 3  # torchrun and two workers
    _, alive = psutil.wait_procs(left, timeout=60)
    assert not alive


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_recipe_text: str) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    recipe = yaml.safe_load(tiny_recipe_text)
    learn = {
        "text": "calibration-text",
        "ce": 0.1,
        "steps": 4,
        "batch": 4,
        "length": 32,
        "held_out": 4,
        "check_every": 2,
    }
    cached = {**learn, "teacher": {"cache": "top_k", "k": 8}}
    quantize = {"quantize": {"scheme": "w8a16", "group_size": 32}}
    writes = [{"distill": {**learn, "ce": 0.0, "on_policy": {"prompt": 8}}}]
    recipe["variants"] = {
        "taught": [{"distill": cached}, quantize],
        "taught-faster": [
            {"prune": {"drop": [0]}},
            *(writes if installed.installed_version("trl") else []),
            {"distill": {**cached, "learning_rate": 0.001}},
        ],
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
        ({"teacher": {"cache": "top_k", "k": 600}, "ce": 0.1}, "512 tokens"),
        ({"answers": True, "ce": 0.1}, "plain text, without answers"),
        ({}, "nothing to learn, since student and teacher are both the base"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, tiny_recipe_text: str, changes: dict, words: str) -> None:
    recipe = yaml.safe_load(tiny_recipe_text)
    recipe["variants"] = {"taught": [{"distill": {"text": "calibration-text", **changes}}]}
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(recipe))
    plan = pennyweight("plan", "distill.yaml", cwd=tmp_path, store=tmp_path / "store")
    assert plan.returncode == 2
    assert words in plan.stdout + plan.stderr
