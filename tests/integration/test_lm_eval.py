"""The untouched base scores with us as under lm-eval's own command line: same prompts, same items, same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pennyweight import checkpoints, datasets, machine, runtimes, shipped
from pennyweight.evaluate import harness
from pennyweight.evaluate.estimates import value_of
from pennyweight.evaluate.evidence import Evidence, Row
from pennyweight.recipe import DataSource, load_recipe
from pennyweight.records import Candidate, Checkpoint
from pennyweight.sources import fetch_base
from pennyweight.store import Store
from pennyweight.suite import Suite

ITEMS = 41  # so that a share of them rarely ends before the last digit that lm-eval prints
BATCH = 8
METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class Both:
    """One checkpoint, scored twice on the same items."""

    ours: list[Row]
    samples: dict[str, list[dict[str, Any]]]
    """Task → what lm-eval logged of each item."""
    results: dict[str, Any]
    """lm-eval's results file."""
    printed: str
    """What its command line printed."""


def score_twice(checkpoint: Checkpoint, data: dict[str, Path], folder: Path) -> Both:
    """`data`: task of ours → JSONL of its questions."""
    suite = Suite.model_validate({"name": "both", "tasks": [*data], "batch_size": BATCH})
    rows = score(checkpoint, suite, data)
    items = {task: [row["doc_id"] for row in rows if row["task"] == task] for task in data}
    printed = lm_eval(checkpoint, data, items, folder)
    output = next((folder / "output").iterdir())  # a folder named after the model
    results = json.loads(next(output.glob("results_*.json")).read_text())
    samples = {}
    for task in data:
        lines = next(output.glob(f"samples_{task}_*.jsonl")).read_text().splitlines()
        samples[task] = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    return Both(rows, samples, results, printed)


def score(checkpoint: Checkpoint, suite: Suite, data: dict[str, Path]) -> list[Row]:
    from transformers import AutoTokenizer

    candidate = Candidate(
        id="base@transformers", variant="base", runtime="transformers", checkpoint=checkpoint, path=checkpoint.path,
        digest=checkpoint.digest, bytes=checkpoint.bytes, weight_bytes=checkpoint.weight_bytes, dtype="float32",
    )  # fmt: skip
    session = runtimes.get("transformers").load(candidate, "cpu")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    rows, _ = harness.run_tasks(session, tokenizer, suite, data, {task: slice(ITEMS) for task in data})
    session.close()
    return rows


def lm_eval(checkpoint: Checkpoint, data: dict[str, Path], items: dict[str, list[int]], folder: Path) -> str:
    """Run the command line on its own, offline, with nothing of ours but the task files. Returns what it printed."""
    (folder / "tasks").mkdir()
    for task, path in data.items():
        config = shipped.tasks()[task] | {"dataset_kwargs": {"data_files": {"test": str(path)}}}
        (folder / "tasks" / f"{task}.yaml").write_text(yaml.safe_dump(config))
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", str(BATCH)),
        *("--model_args", f"pretrained={checkpoint.path},dtype=float32", "--tasks", ",".join(data)),
        *("--include_path", str(folder / "tasks"), "--samples", json.dumps(items)),
        *("--log_samples", "--output_path", str(folder / "output")),
    ]
    variables = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "huggingface")}
    variables |= {"OMP_NUM_THREADS": str(machine.threads()), "COLUMNS": "200"}
    done = subprocess.run(command, env=os.environ | variables, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(printed: str) -> dict[tuple[str, str], str]:
    """(task, metric) → value, four digits less the zeros that a whole column ends in. A task is named once."""
    cells, task = {}, ""
    for line in printed.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and row[4] in METRICS:
            task = row[0] or task
            cells[task, row[4]] = row[6]
    return cells


def check_they_agree(both: Both, task: str, items: int) -> None:
    rows = [row for row in both.ours if row["task"] == task]
    samples = both.samples[task]
    assert [row["doc_hash"] for row in rows] == [sample["doc_hash"] for sample in samples]
    assert len(rows) == items
    for row, sample in zip(rows, samples):
        asked = [(argument["arg_0"], argument["arg_1"].strip()) for argument in sample["arguments"].values()]
        assert asked == [(row["prompt"], choice) for choice in row["choices"]]
        theirs = [float(likelihood) for likelihood, _ in sample["filtered_resps"]]
        assert row["loglikelihoods"] == pytest.approx(theirs, abs=1e-4, rel=0)
        assert [row[metric] for metric in METRICS] == [sample[metric] for metric in METRICS]
    for metric in METRICS:
        estimate = value_of(f"{task}/{metric}", Evidence(rows=rows))
        assert estimate is not None
        assert estimate.value == both.results["results"][task][f"{metric},none"]
        assert float(f"{estimate.value:.4f}") == float(table(both.printed)[task, metric])


def test_a_tiny_model_scores_as_under_lm_eval(tiny_model: Path, tmp_path: Path) -> None:
    """Few words, so that questions come again, and choices are one token or several."""
    words = ["river", "stone", "light", "garden", "walks", "under", "over", "near", "young", "green", "quiet"]
    rows = [
        {
            "question": f"The {words[i % 7]} {words[i % 5]} is",
            # One choice comes twice in some: the two must tie exactly, as they do in lm-eval.
            "choices": [words[i % 3], words[i % 3 + i % 8], f"{words[i % 4]} and {words[i % 6]} unheard-of"],
            "gold": i % 2,
        }
        for i in range(ITEMS)
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = score_twice(checkpoints.describe(tiny_model, "tiny"), {"openbookqa": questions}, tmp_path)
    check_they_agree(both, "openbookqa", ITEMS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """The embedded base on every shipped task."""
    folder = tmp_path_factory.mktemp("lm-eval")
    store = Store(folder / "store")
    checkpoint, _ = fetch_base(load_recipe("smollm2-135m-cpu").base, store)
    data = {}
    for task, config in shipped.tasks().items():
        name = config["metadata"]["data"]
        data[task], _ = datasets.fetch(name, DataSource.model_validate(shipped.sources()[name]), store)
    return score_twice(checkpoint, data, folder)


@pytest.mark.real
@pytest.mark.parametrize("task", sorted(shipped.tasks()))
def test_the_base_scores_as_under_lm_eval(base: Both, task: str) -> None:
    check_they_agree(base, task, ITEMS)
