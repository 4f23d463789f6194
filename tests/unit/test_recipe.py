from pathlib import Path
from typing import Any

import pytest
import yaml

from pennyweight import shipped
from pennyweight.errors import RecipeError, UsageError
from pennyweight.recipe import Recipe, load_recipe, load_suite, task_fault


def broken(tmp_path: Path, **changes: Any) -> str:
    """The message that the shipped recipe gives with some of its top-level keys replaced."""
    recipe = yaml.safe_load(shipped.recipe_path("smollm2-135m-cpu").read_text())
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes, sort_keys=False))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(shipped.recipes()))
def test_every_shipped_recipe_is_valid_and_complete(name: str) -> None:
    recipe = load_recipe(name)
    assert Recipe.model_validate(recipe.dump()) == recipe
    assert shipped.recipes()[name].read_text().startswith("# ")


@pytest.mark.parametrize("name", sorted(shipped.suites()))
def test_every_shipped_suite_is_valid(name: str) -> None:
    suite = load_suite(shipped.suites()[name])
    assert suite.name == name
    assert suite.metrics()


@pytest.mark.parametrize(
    ("suite", "words"),
    [
        ({"tasks": ["piqa", {"task": "piqa", "limit": 3}]}, "names piqa twice"),
        ({"tasks": ["piqaa"]}, "did you mean 'piqa'"),
        ({"tasks": ["hellaswag"]}, "needs `from: lm-eval`"),
        ({"perplexity": [{"text": "xsum-documents"}, {"text": "xsum-documents"}]}, "names xsum-documents twice"),
        ({"divergence": {"text": "piqa"}}, "'piqa' has no text"),
        ({}, "needs `divergence`, `perplexity`, `tasks` or `generation`"),
        ({"divergence": {"text": "xsum-documents"}, "seed": "x"}, "seed"),
    ],
)
def test_a_suite_is_checked_as_a_recipe_is(suite: dict, words: str, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"name": "mine", **suite}))
    with pytest.raises(RecipeError) as caught:
        load_suite(tmp_path / "suite.yaml")
    assert words in str(caught.value)


@pytest.mark.parametrize("name", list(shipped.suites()))
def test_shipped_suites_are_valid(name: str) -> None:
    assert load_suite(shipped.suites()[name]).metrics()


@pytest.mark.parametrize(
    ("text", "words"),
    [("task: [", "is not YAML"), ("dataset_path: json\n", "has no `task:`"), ("- a\n", "has no `task:`")],
)
def test_a_malformed_task_names_its_file(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evals" / "tasks").mkdir(parents=True)
    (tmp_path / "evals" / "tasks" / "mine.yaml").write_text(text)
    monkeypatch.setattr(shipped, "root", lambda: tmp_path)
    shipped.tasks.cache_clear()
    with pytest.raises(UsageError, match=words) as caught:
        shipped.tasks()
    assert "mine.yaml" in caught.value.message
    monkeypatch.undo()
    shipped.tasks.cache_clear()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"doc_to_target": None}, "has no `doc_to_target`"),
        ({"output_type": "loglikelihood_rolling"}, "gives no score a question"),
        ({"doc_to_choice": None}, "has no `doc_to_choice`"),
        ({"metric_list": [{"metric": "acc"}]}, "needs `metric` and `higher_is_better`"),
        ({"metadata": {}}, "names no data set"),
    ],
)
def test_faults_of_a_task(changes: dict, words: str) -> None:
    task = {key: value for key, value in (shipped.tasks()["piqa"] | changes).items() if value is not None}
    assert words in task_fault(task)
    assert task_fault(shipped.tasks()["piqa"]) is None


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ({"task": "piqa", "metric": "acc", "max": 0.5}, "more is better for acc"),
        ({"metric": "kl_mean", "min": 0.1}, "less is better for kl_mean"),
        ({"metric": "kl_mean", "relative_within": 0.1}, "measured from the base already"),
        ({"metric": "acc", "tasks": ["piqa", "nothing"], "non_inferior_within": 0.1}, "does not measure 'nothing/acc'"),
        ({"metric": "acc", "task": "piqa", "tasks": ["piqa"], "non_inferior_within": 0.1}, "both `task` and `tasks`"),
        ({"metric": "acc", "non_inferior_within": 0.1}, "add `task:`"),
        ({"task": "piqa", "metric": "acc"}, "needs exactly one of"),
    ],
)
def test_conditions_that_make_no_sense(condition: dict, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("smollm2-135m-cpu", [f"gate={yaml.safe_dump([condition], default_flow_style=True)}"])
    assert words in str(caught.value)


def test_resolved_recipe_embeds_what_it_names() -> None:
    dump = load_recipe("smollm2-135m-cpu").dump()
    assert dump["evaluate"]["tasks"][0] == {"task": "piqa", "limit": 150, "from": "pennyweight"}
    assert dump["benchmark"]["price"]["usd_per_hour"] == 0.08925
    assert dump["benchmark"]["workload"]["input_tokens"] == 64
    assert set(dump["data"]) == {"boolq-passages", "xsum-documents", "piqa", "openbookqa"}
    assert all(source["sha256"] for source in dump["data"].values())


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        ({"devise": "cpu"}, "devise", "did you mean 'device'?"),
        ({"seed": "zero"}, "seed", "valid integer (it is 'zero')"),
        ({"device": "gpu"}, "device", "unknown value 'gpu'"),
        ({"variants": {"a": []}}, "variants.a", "at least one step"),
        ({"variants": {}}, "variants", "empty"),
        ({"variants": {"a": [{"quantise": {"scheme": "w8a16"}}]}}, "variants.a.0", "did you mean 'quantize'?"),
        (
            {"variants": {"a": [{"quantize": {"scheme": "w4a17"}}]}},
            "variants.a.0.quantize.scheme",
            "did you mean 'w4a16'?",
        ),
        ({"variants": {"a": [{"quantize": {"scheme": "w4a16", "group_sise": 64}}]}}, "group_sise", "'group_size'"),
        (
            {"variants": {"a": [{"quantize": {"scheme": "w4a16", "method": "gptq"}}]}},
            "variants.a.0",
            "calibration text",
        ),
        ({"variants": {"a": [{"prune": {"layers": 1, "text": 5}}]}}, "variants.a.0.prune.text", "or a list of such"),
        ({"variants": {"a": [{"prune": {"layers": 1, "text": ["x", "x"]}}]}}, "variants.a.0.prune.text", "x twice"),
        (
            {"variants": {"a": [{"prune": {"layers": 1, "text": ["boolq-passages", "boolq"]}}]}},
            "variants.a.0.prune.text",
            "unknown data set 'boolq'",
        ),
        ({"variants": {"base": [{"quantize": {"scheme": "w4a16"}}]}}, "", "own name"),
        ({"runtimes": ["onnxruntim"]}, "runtimes.base.0", "did you mean 'onnxruntime'?"),
        ({"evaluate": "smoke-test"}, "evaluate", "unknown suite 'smoke-test'"),
        ({"evaluate": {"name": "x", "tasks": ["piqua"]}}, "evaluate.tasks.0.task", "did you mean 'piqa'?"),
        ({"gate": [{"metric": "kl_maen", "max": 1}]}, "gate.0", "did you mean 'kl_mean'?"),
        ({"gate": [{"metric": "acc", "task": "commonsense_qa_cloze", "min": 0.3}]}, "gate.0", "does not measure"),
        ({"gate": [{"metric": "kl_mean", "max": 1, "min": 0}]}, "gate.0", "exactly one of"),
        ({"gate": [{"metric": "kl_mean", "non_inferior_within": 0.1}]}, "gate.0", "add `task:`"),
        ({"base": "pypi:thing==1/x.gguf"}, "base", "pinned by its wheel's digest"),
        ({"base": "hf:owner/name"}, "base", "@REVISION"),
        ({"base": "s3:bucket/model"}, "base", "unknown kind of source 's3'"),
    ],
)
def test_mistakes_are_named_with_their_place_and_the_fix(
    tmp_path: Path, changes: dict[str, Any], path: str, words: str
) -> None:
    message = broken(tmp_path, **changes)
    assert path in message
    assert words in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"price": "aws/c7i.lage"}, "did you mean 'aws/c7i.large'?"),
        ({"workload": "chatt"}, "did you mean 'chat'?"),
        ({"decide_at": 2}, "is not measured"),
        ({"concurrency": [1, 1], "decide_at": 1}, "twice"),
        ({"rounds": 1}, "greater than or equal to 2"),
    ],
)
def test_mistakes_in_the_benchmark(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    settings = yaml.safe_load(shipped.recipe_path("smollm2-135m-cpu").read_text())["benchmark"]
    assert words in broken(tmp_path, benchmark=settings | changes)


def test_all_problems_come_together_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "name: bad\n"
        "base: file:model\n"
        "devise: cpu\n"
        "variants:\n"
        "  a: [{quantize: {scheme: w4a16}}]\n"
        "  a: [{quantize: {scheme: w4a16, group_size: big}}]\n"
        "runtimes: [onnx]\n"
        "evaluate: smoke\n"
        "gate: [{metric: kl_mean, max: 0.1}]\n"
        "benchmark: {workload: chat, concurrency: [1], decide_at: 1, price: aws/c7i.large}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    lines = {(problem.path, problem.line) for problem in caught.value.problems}
    assert ("variants.a", 6) in lines
    assert ("devise", 3) in lines
    assert ("runtimes.base.0", 7) in lines
    assert ("variants.a.0.quantize.group_size", 6) in lines


def test_what_is_not_yaml_or_not_there_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: [1")
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(path)
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "missing.yaml")
    path.write_text("- a\n- b\n")
    with pytest.raises(RecipeError, match="must be a mapping"):
        load_recipe(path)


def test_overrides_reach_into_the_recipe() -> None:
    overrides = ["device=cuda", "base=file:/x", "gate.0.max=0.5", "benchmark.concurrency=[1, 2]", "register=null"]
    recipe = load_recipe("smollm2-135m-cpu", overrides)
    assert (recipe.device, recipe.base.uri, recipe.gate[0].max) == ("cuda", "file:/x", 0.5)
    assert (recipe.benchmark.concurrency, recipe.register_as) == ([1, 2], None)


@pytest.mark.parametrize("override", ["device", "gate.9.max=1", "nothing.here=1", "name.x=1"])
def test_overrides_that_fit_nowhere_are_refused(override: str) -> None:
    with pytest.raises(UsageError):
        load_recipe("smollm2-135m-cpu", [override])
