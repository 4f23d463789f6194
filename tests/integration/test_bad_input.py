"""What users get wrong after the recipe has been read: one screen, the fix, the right exit code, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command import pennyweight
from test_flow import latest


def with_changes(text: str, folder: Path, **changes: object) -> Path:
    recipe = yaml.safe_load(text)
    for path, value in changes.items():
        node = recipe
        *parents, last = path.split("__")
        for part in parents:
            node = node[int(part) if part.isdigit() else part]
        node[last] = value
    target = folder / "tiny.yaml"
    target.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return target


def refused(folder: Path, *arguments: str, code: int, **environment: str) -> str:
    done = pennyweight(*arguments, cwd=folder, store=folder / "store", **environment)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 40
    return done.stderr


def test_group_size_that_does_not_divide_a_layer(tiny_recipe_text: str, tmp_path: Path) -> None:
    with_changes(tiny_recipe_text, tmp_path, variants__int8__0__quantize__group_size=48)
    message = refused(tmp_path, "run", "tiny.yaml", code=2)
    assert "48" in message
    assert "does not divide" in message
    assert not list((tmp_path / "store").glob("step/*"))  # found before any work


def test_base_that_is_not_there(tiny_recipe_text: str, tmp_path: Path) -> None:
    with_changes(tiny_recipe_text, tmp_path, base="file:/nowhere/model")
    assert "/nowhere/model" in refused(tmp_path, "run", "tiny.yaml", code=2)


def test_base_that_is_already_quantized(tiny_recipe_text: str, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_model, tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized/config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "quantized/config.json").write_text(json.dumps(config))
    with_changes(tiny_recipe_text, tmp_path, base=str(tmp_path / "quantized"))
    message = refused(tmp_path, "run", "tiny.yaml", code=2)
    assert "awq" in message
    assert "start from the model" in message


def test_calibration_on_the_evaluation_text(tiny_recipe_text: str, tmp_path: Path) -> None:
    with_changes(
        tiny_recipe_text,
        tmp_path,
        **{"variants__int4-gptq__0__quantize__calibrate__source": "held-out-text"},
        **{"variants__int4-gptq__0__quantize__calibrate__samples": 40},
    )
    done = pennyweight("run", "tiny.yaml", cwd=tmp_path, store=tmp_path / "store")
    assert done.returncode == 0, done.stderr  # the other variant has a winner
    record = latest(tmp_path)
    assert record["status"] == "partial"
    refused_one = next(result for result in record["candidates"] if result["variant"] == "int4-gptq")
    assert refused_one["verdict"]["status"] == "error"
    assert "int4-gptq learns from text that the evaluation uses" in refused_one["verdict"]["reasons"][0]
    assert "`variants.int4-gptq.0.quantize.calibrate`" in refused_one["verdict"]["reasons"][0]
    allowed = "variants.int4-gptq.0.quantize.calibrate.allow_overlap=true"
    done = pennyweight("run", "tiny.yaml", allowed, cwd=tmp_path, store=tmp_path / "store")
    record = latest(tmp_path)
    assert record["status"] == "passed", done.stderr
    assert any(note.startswith("Allowed by the recipe: int4-gptq learns from text") for note in record["notes"])


def test_a_task_whose_data_lie_on_a_hub_that_is_not_there(tiny_recipe_text: str, tmp_path: Path) -> None:
    with_changes(
        tiny_recipe_text,
        tmp_path,
        evaluate__tasks=[{"task": "hellaswag", "from": "lm-eval", "limit": 4}],
        gate=[{"task": "hellaswag", "metric": "acc", "non_inferior_within": 0.5}],
    )
    message = refused(tmp_path, "run", "tiny.yaml", code=4, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    assert "the data of lm-eval's task 'hellaswag' cannot be had" in message
    assert "evals/tasks" in message


def test_questions_longer_than_the_context(tiny_recipe_text: str, tmp_path: Path) -> None:
    rows = [{"question": "river stone " * 400, "options": "A. a\nB. b", "answer": "A. a"}] * 3
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = yaml.safe_load(tiny_recipe_text)["data"]
    with_changes(
        tiny_recipe_text,
        tmp_path,
        data={**data, "openbookqa": {"uri": f"file:{tmp_path}/long.jsonl", "questions": "lettered"}},
        evaluate__tasks=["openbookqa"],
    )
    message = refused(tmp_path, "run", "tiny.yaml", code=4)
    assert "the model knows 512 positions" in message


def test_calibration_data_that_are_empty(tiny_recipe_text: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with_changes(tiny_recipe_text, tmp_path, **{"data__calibration-text__uri": f"file:{tmp_path}/empty.jsonl"})
    message = refused(tmp_path, "run", "tiny.yaml", code=2)
    assert "empty.jsonl is empty" in message
    assert "data.calibration-text" in message


def test_hub_that_cannot_be_reached(tiny_recipe_text: str, tmp_path: Path) -> None:
    with_changes(tiny_recipe_text, tmp_path, base="hf:someone/model@0123456789abcdef0123456789abcdef01234567")
    message = refused(tmp_path, "run", "tiny.yaml", code=4, HF_ENDPOINT="http://127.0.0.1:9")
    assert "hub" in message.lower()


def test_store_that_cannot_be_written(tiny_recipe_text: str, tmp_path: Path) -> None:
    with_changes(tiny_recipe_text, tmp_path)
    (tmp_path / "store").write_text("a file, not a folder")
    message = refused(tmp_path, "run", "tiny.yaml", code=4)
    assert "PENNYWEIGHT_HOME" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rnu", "tiny.yaml"), "did you mean 'run'?"),
        (("run", "missing.yaml"), "No such file"),
        (("run", "tiny.yaml", "device"), "KEY=VALUE"),
        (("show", "nothing"), "cannot be read"),
    ],
)
def test_wrong_calls(tiny_recipe_text: str, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    with_changes(tiny_recipe_text, tmp_path)
    assert words in refused(tmp_path, *arguments, code=2)


def test_a_tracking_server_that_is_down_loses_nothing(tiny_recipe_text: str, tmp_path: Path) -> None:
    with_changes(tiny_recipe_text, tmp_path)
    message = refused(tmp_path, "run", "tiny.yaml", code=4, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert "report --log" in message
    record = latest(tmp_path)
    assert record["status"] == "passed"
    assert record["winner"]
    assert (tmp_path / "runs/latest/report.html").exists()
    logged = pennyweight("report", "--log", cwd=tmp_path, store=tmp_path / "store")
    assert logged.returncode == 0, logged.stderr
    assert latest(tmp_path)["registered"]["alias"] == "challenger"


def test_one_variant_that_fails_does_not_stop_the_others(tiny_recipe_text: str, tmp_path: Path) -> None:
    # A budget of calibration text that the data do not have is that variant's error.
    with_changes(tiny_recipe_text, tmp_path, **{"variants__int4-gptq__0__quantize__calibrate__samples": 10_000})
    done = pennyweight("run", "tiny.yaml", cwd=tmp_path, store=tmp_path / "store")
    assert done.returncode == 0, done.stderr
    record = latest(tmp_path)
    assert record["status"] == "partial"
    assert record["winner"] == "int8@onnxruntime"
    failed = next(result for result in record["candidates"] if result["variant"] == "int4-gptq")
    assert failed["verdict"]["status"] == "error"
    assert failed["verdict"]["reasons"][0].startswith("variants.int4-gptq.0.quantize.calibrate: the text gives ")
