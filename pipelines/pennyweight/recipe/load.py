"""Reading a recipe or a suite: the file, its overrides, what it names, and every problem found, all at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pennyweight import shipped
from pennyweight.errors import Problem, RecipeError, did_you_mean
from pennyweight.recipe.calibration import names_of
from pennyweight.recipe.learning import Distill
from pennyweight.recipe.schema import Base, DataSource, Recipe
from pennyweight.recipe.wording import validate
from pennyweight.suite import DIVERGENCE_METRICS, Condition, SavingCondition, Suite
from pennyweight.yamlfile import YamlFile, apply_overrides

#: Kinds of source that a URI can name.
SOURCE_SCHEMES = ("hf", "pypi", "file", "models")


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, complete and check a recipe.

    `path` is a file, or the name of a shipped recipe. `overrides` are `KEY.PATH=VALUE` strings, values in YAML. The
    result embeds the suite, the prices and the data pins that the recipe names. Raises RecipeError with all problems
    found.
    """
    file = YamlFile.load(shipped.recipe_path(path))
    apply_overrides(file, overrides or [])
    problems: list[Problem] = list(file.problems)
    raw = dict(file.data)
    suite = _load_suite(file, raw.get("evaluate"), problems)
    if suite is not None:
        raw["evaluate"] = suite
    elif "evaluate" in raw:
        raw["evaluate"] = _PLACEHOLDER_SUITE  # already reported; let the rest be checked too
    recipe = validate(Recipe, raw, file, problems)
    if recipe is not None:
        recipe = _embed_data(recipe, file, problems)
        _check_uris(recipe, file, problems)
        _check_savings(recipe, file, problems)
        if suite is not None:
            _check_gate(recipe, file, problems)
    if problems:
        raise RecipeError(problems)
    return recipe


def load_suite(path: str | Path) -> Suite:
    """Read and check a suite on its own. Raises RecipeError."""
    file = YamlFile.load(Path(path))
    problems: list[Problem] = list(file.problems)
    suite = validate(Suite, dict(file.data), file, problems)
    if suite is not None:
        _check_tasks(suite, file, "tasks", problems)
        _check_texts(suite, file, problems)
    if problems:
        raise RecipeError(problems)
    return suite


def is_suite(path: str | Path) -> bool:
    """Whether a file looks like a suite rather than a recipe: it measures something, and starts from no base."""
    path = Path(path)
    if not path.is_file():
        return False
    keys = YamlFile.load(path).data.keys()
    return not {"base", "variants", "gate"} & keys and bool({"divergence", "perplexity", "tasks", "generation"} & keys)


_PLACEHOLDER_SUITE = {"name": "unknown", "divergence": {"text": "unknown"}}


def _load_suite(file: YamlFile, value: Any, problems: list[Problem]) -> dict[str, Any] | None:
    if isinstance(value, dict):
        suite = validate(Suite, value, file, problems, prefix="evaluate")
        if suite is not None:
            _check_tasks(suite, file, "evaluate.tasks", problems)
    elif isinstance(value, str):
        suites = shipped.suites()
        path = suites.get(value) or file.path.parent / value
        if not path.is_file():
            problems.append(file.problem("evaluate", f"unknown suite {value!r}", did_you_mean(value, list(suites))))
            return None
        try:
            suite = load_suite(path)
        except RecipeError as error:
            problems.extend(error.problems)
            return None
    else:
        return value  # missing or of a wrong type: the schema says so
    return None if suite is None else suite.model_dump(mode="json", by_alias=True)


def _check_tasks(suite: Suite, file: YamlFile, prefix: str, problems: list[Problem]) -> None:
    known = shipped.tasks()
    for index, ref in enumerate(suite.tasks):
        path = f"{prefix}.{index}.task"
        if ref.origin == "pennyweight" and ref.task not in known:
            hint = did_you_mean(ref.task, list(known)) + "; one of lm-eval's own tasks needs `from: lm-eval`"
            problems.append(file.problem(path, f"unknown task {ref.task!r}", hint))
        elif ref.origin == "pennyweight" and (fault := task_fault(known[ref.task])):
            problems.append(file.problem(path, f"task {ref.task!r}: {fault}", f"see {shipped.root() / 'evals/tasks'}"))


def _check_texts(suite: Suite, file: YamlFile, problems: list[Problem]) -> None:
    """Texts of a suite on its own; in a recipe they may also be the recipe's data."""
    if file.data.keys() & {"base", "variants"}:
        return
    used = [item.text for item in suite.texts().values()] + ([suite.generation.text] if suite.generation else [])
    known = shipped.sources()
    for name in dict.fromkeys(used):
        if name in known and "text" not in known[name]:
            problems.append(file.problem("", f"data set {name!r} has no text"))


def task_fault(task: dict[str, Any]) -> str | None:
    """What is wrong with a task's YAML, as far as it shows before anything is loaded."""
    for key in ("doc_to_text", "doc_to_target", "metric_list", "output_type"):
        if key not in task:
            return f"has no `{key}`"
    if task["output_type"] not in ("multiple_choice", "generate_until"):
        return f"output_type {task['output_type']!r} gives no score a question; multiple_choice and generate_until do"
    if task["output_type"] == "multiple_choice" and "doc_to_choice" not in task:
        return "has no `doc_to_choice`"
    if not (isinstance(task["metric_list"], list) and task["metric_list"]):
        return "`metric_list` is empty"
    if any(not isinstance(item, dict) or {"metric", "higher_is_better"} - item.keys() for item in task["metric_list"]):
        return "every item of `metric_list` needs `metric` and `higher_is_better`"
    if "data" not in task.get("metadata", {}):
        return "`metadata.data` names no data set"
    return None


def _embed_data(recipe: Recipe, file: YamlFile, problems: list[Problem]) -> Recipe:
    """Add the shipped data sets that the recipe names to its `data`."""
    wanted: dict[str, tuple[str, str]] = {}  # data set → (key path that names it, kind)
    for variant, steps in recipe.variants.items():
        for index, step in enumerate(steps):
            for name in names_of(step.calibrate.source if step.calibrate else None):
                wanted[name] = (f"variants.{variant}.{index}.{step.kind}.{step.text_key}", "words")
    suite = recipe.evaluate
    if suite.name != "unknown":
        wanted |= {item.text: ("evaluate", "text") for item in suite.texts().values()}
        wanted |= {suite.generation.text: ("evaluate", "text")} if suite.generation else {}
    for ref in suite.tasks:
        task = shipped.tasks().get(ref.task, {})
        if ref.origin == "pennyweight" and not task_fault(task):
            wanted[task["metadata"]["data"]] = ("evaluate", "questions")
    catalog = {name: DataSource.model_validate(body) for name, body in shipped.sources().items()} | recipe.data
    for name, (path, kind) in wanted.items():
        if name not in catalog:
            problems.append(file.problem(path, f"unknown data set {name!r}", did_you_mean(name, list(catalog))))
        elif getattr(catalog[name], kind) is None:
            problems.append(file.problem(path, f"data set {name!r} has no {'text' if kind == 'words' else kind}"))
    for variant, steps in recipe.variants.items():
        for index, step in enumerate(steps):
            for name in names_of(step.text) if isinstance(step, Distill) and step.answers else []:
                source = catalog.get(name)
                if source and source.words and not source.has_answers:
                    path = f"variants.{variant}.{index}.distill.answers"
                    hint = "name one with `messages`, or with `prompt` and `answer`, or remove `answers`"
                    problems.append(file.problem(path, f"data set {name!r} is plain text, without answers", hint))
    data = {name: catalog[name] for name in sorted({*wanted, *recipe.data}) if name in catalog}
    return recipe.model_copy(update={"data": data})


def _check_uris(recipe: Recipe, file: YamlFile, problems: list[Problem]) -> None:
    for name, base in recipe.all_bases.items():
        path = "base" if name == "base" else f"bases.{name}"
        problems += [file.problem(path, message, hint) for message, hint in _uri_faults(base)]


def _uri_faults(base: Base) -> Iterator[tuple[str, str | None]]:
    """(message, hint) of what is wrong with a base's URI."""
    scheme, separator, _ = base.uri.partition(":")
    if separator and re.fullmatch(r"[a-z][a-z0-9]+", scheme) and scheme not in SOURCE_SCHEMES:
        yield f"unknown kind of source {scheme!r}", did_you_mean(scheme, list(SOURCE_SCHEMES))
    if scheme == "pypi" and not re.fullmatch(r"pypi:[A-Za-z0-9._-]+==[^/]+/.+", base.uri):
        yield "a pypi: source reads pypi:PACKAGE==VERSION/MEMBER", None
    elif scheme == "pypi" and base.sha256 is None:
        hint = "append `#sha256=` and the wheel's digest, as `pip hash WHEEL` prints it"
        yield "a pypi: base must be pinned by its wheel's digest", hint
    if scheme == "hf" and not re.fullmatch(r"hf:[^/@]+/[^/@]+@[^@]+", base.uri):
        hint = "pin the revision, a commit for a recipe that others can repeat"
        yield "an hf: source reads hf:OWNER/NAME@REVISION", hint


def _check_savings(recipe: Recipe, file: YamlFile, problems: list[Problem]) -> None:
    measured = recipe.benchmark.concurrency
    for index, condition in enumerate(recipe.gate):
        if isinstance(condition, SavingCondition) and condition.concurrency not in (None, *measured):
            message = f"{condition.concurrency} is not measured; benchmark.concurrency is {measured}"
            problems.append(file.problem(f"gate.{index}.concurrency", message, "add it there, or name one of these"))


def _check_gate(recipe: Recipe, file: YamlFile, problems: list[Problem]) -> None:
    measured = recipe.evaluate.metrics()
    for index, condition in enumerate(recipe.gate):
        if isinstance(condition, SavingCondition):
            continue
        path = f"gate.{index}"
        unknown = [name for name in condition.names if name not in measured]
        for name in unknown:
            message = f"suite {recipe.evaluate.name!r} does not measure {name!r}"
            problems.append(file.problem(path, message, did_you_mean(name, list(measured))))
        if not unknown and (fault := _condition_fault(condition, measured[condition.names[0]])):
            problems.append(file.problem(path, *fault))


def _condition_fault(condition: Condition, higher_is_better: bool) -> tuple[str, str] | None:
    """A bound that no sense can be made of for this metric: (what is wrong, what to write instead)."""
    metric = condition.metric
    if condition.max is not None and higher_is_better:
        return f"more is better for {metric}; a `max` would reject the better model", "use `min`"
    if condition.min is not None and not higher_is_better:
        return f"less is better for {metric}; a `min` would reject the better model", "use `max`"
    from_base = metric in DIVERGENCE_METRICS and metric != "perplexity"
    if condition.relative_within is not None and from_base:
        return (
            f"{metric} is measured from the base already; a fraction of the base's says nothing",
            "use `max` or `min`",
        )
    if condition.non_inferior_within is not None and metric in DIVERGENCE_METRICS:
        return f"{metric} has no answers to pair", "use `max`, `min` or `relative_within`"
    return None
