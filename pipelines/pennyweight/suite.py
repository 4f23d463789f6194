"""What quality is measured on (`Suite`), and the conditions of the gate (`Condition`, `SavingCondition`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pennyweight import shipped
from pennyweight.schema import Name, Section

#: Metrics that are measured on text → whether more is better.
PERPLEXITY_METRICS = {"perplexity": False, "perplexity_ratio": False, "nll_delta": False}
#: Metrics of a suite's `divergence`.
DIVERGENCE_METRICS = {"kl_mean": False, "kl_p99": False, "kl_p999": False, "top1_agreement": True, **PERPLEXITY_METRICS}
#: Those that measure how much changed, rather than whether it got worse.
CHANGE_METRICS = ("kl_mean", "kl_p99", "kl_p999", "top1_agreement")
#: Metrics of a suite's `generation`, under the name `generation`.
GENERATION_METRICS = {"surprise": False, "repetition": False}
GENERATION = "generation"
#: Per-sample metrics of lm-eval that a condition on one of lm-eval's own tasks may name.
LM_EVAL_METRICS = {"acc": True, "acc_norm": True, "exact_match": True, "f1": True, "em": True, "mc1": True, "mc2": True}


class TextWindows(Section):
    text: str
    """Name of a text data set that no step calibrates on."""
    windows: int = Field(16, ge=1)
    length: int = Field(512, ge=8)
    """Tokens in each window."""


class Divergence(TextWindows):
    """Text on which every prediction is compared with the base's."""


class Perplexity(TextWindows):
    """More text, on which only the likelihood of what comes next is compared."""


class Generation(Section):
    """Greedy continuations of text, as they would be served.

    `surprise`: nats per generated token, under the base. `repetition`: share of generated 4-grams that came before in
    the same continuation.
    """

    text: str
    """Name of a text data set that prompts are cut from."""
    prompts: int = Field(16, ge=2)
    input_tokens: int = Field(48, ge=4)
    output_tokens: int = Field(48, ge=8)


class TaskRef(Section):
    task: str
    """Name of a task in evals/tasks, or of one of lm-eval's own."""
    limit: int | None = Field(None, ge=1)
    """Number of items, drawn with the suite's seed; all of them by default."""
    origin: Literal["pennyweight", "lm-eval"] = Field("pennyweight", alias="from")
    """`lm-eval`: one of its own tasks, whose data come from a model hub."""


class Suite(Section):
    name: Name
    description: str = ""
    divergence: Divergence | None = None
    perplexity: list[Perplexity] = Field([])
    tasks: list[TaskRef] = Field([])
    generation: Generation | None = None
    batch_size: int = Field(8, ge=1)
    """Sequences scored at once. It changes the last digits, so it is one for all candidates."""
    seed: int = 0

    @field_validator("tasks", mode="before")
    @classmethod
    def _names_to_tasks(cls, value: Any) -> Any:
        return (
            [{"task": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
        )

    @model_validator(mode="after")
    def _measures_something_once(self) -> Suite:
        if not (self.divergence or self.perplexity or self.tasks or self.generation):
            raise ValueError("a suite needs `divergence`, `perplexity`, `tasks` or `generation`")
        names = [ref.task for ref in self.tasks] + [item.text for item in self.perplexity]
        names += [self.divergence.text] if self.divergence else []
        names += [GENERATION] if self.generation else []
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"names {', '.join(twice)} twice")
        return self

    def texts(self) -> dict[str, TextWindows]:
        """Windows of text that are scored: `divergence`, and each perplexity text under its own name."""
        found: dict[str, TextWindows] = {"divergence": self.divergence} if self.divergence else {}
        return found | {item.text: item for item in self.perplexity}

    def first_sizes(self) -> dict[str, int | None]:
        """Source of evidence → windows, items or prompts of the first look; None for all there are."""
        sizes: dict[str, int | None] = {name: item.windows for name, item in self.texts().items()}
        sizes |= {ref.task: ref.limit for ref in self.tasks}
        return sizes | ({GENERATION: self.generation.prompts} if self.generation else {})

    def metrics(self) -> dict[str, bool]:
        """Names of all metrics that the suite measures → higher is better."""
        names = dict(DIVERGENCE_METRICS) if self.divergence else {}
        for item in self.perplexity:
            names |= {f"{item.text}/{metric}": higher for metric, higher in PERPLEXITY_METRICS.items()}
        for ref in self.tasks:
            if ref.origin == "lm-eval":
                found = LM_EVAL_METRICS
            else:
                task = shipped.tasks().get(ref.task, {})
                found = {item["metric"]: bool(item["higher_is_better"]) for item in task.get("metric_list", [])}
            names |= {f"{ref.task}/{metric}": higher for metric, higher in found.items()}
        if self.generation:
            names |= {f"{GENERATION}/{metric}": higher for metric, higher in GENERATION_METRICS.items()}
        return names


def source_of(metric: str) -> str:
    """The part of a suite that measures a metric: a task or text by name, `divergence` for what has no name."""
    return metric.rpartition("/")[0] or "divergence"


def metrics_of_condition(condition: dict[str, Any]) -> list[str]:
    """Full names of the metrics that say how a condition of a resolved recipe came out; none for one on a saving."""
    if "metric" not in condition:
        return []
    relative = condition["metric"] == "perplexity" and condition.get("relative_within") is not None
    metric = "perplexity_ratio" if relative else condition["metric"]
    return [f"{task}/{metric}" if task else metric for task in (condition.get("tasks") or [condition.get("task")])]


BOUNDS = ("max", "min", "non_inferior_within", "relative_within")


class Condition(Section):
    """One condition of the gate: a metric, and exactly one bound.

    Every bound is judged by a confidence interval: a value on the right side of it whose interval is not is
    inconclusive.
    """

    metric: str
    task: str | None = None
    """Task or perplexity text that the metric belongs to; `generation` for the suite's generated text."""
    tasks: list[str] = Field([])
    """Several tasks that the metric belongs to, judged together."""
    combine: Literal["mean", "worst"] = "mean"
    """With `tasks`: the mean of their differences from the base, or every one of them."""
    max: float | None = None
    """The metric itself is at most this."""
    min: float | None = None
    """The metric itself is at least this."""
    non_inferior_within: float | None = Field(None, gt=0)
    """Worse than the base by less than this, paired question by question."""
    relative_within: float | None = Field(None, gt=0, lt=1)
    """Worse than the base by less than this fraction of the base's value."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    for_every_variant: bool = False
    """Divergence decides for variants too that are not meant to predict what the base does: distilled, pruned, or made
    from another base."""

    @property
    def needs_imitation(self) -> bool:
        """It decides only where a variant should predict what the base predicts, and informs elsewhere."""
        return self.metric in CHANGE_METRICS and not self.for_every_variant

    @model_validator(mode="after")
    def _one_bound(self) -> Condition:
        given = [name for name in BOUNDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(BOUNDS)}; has {' and '.join(given) or 'none'}")
        if self.task is not None and self.tasks:
            raise ValueError("has both `task` and `tasks`; keep one")
        if given == ["non_inferior_within"] and not (self.task or self.tasks):
            raise ValueError("non_inferior_within compares with the base item by item; add `task:`")
        if self.tasks and given != ["non_inferior_within"]:
            raise ValueError("`tasks` are combined under `non_inferior_within` only")
        return self

    @property
    def names(self) -> list[str]:
        """Full names of the metrics it is on: `piqa/acc`."""
        if self.tasks:
            return [f"{task}/{self.metric}" for task in self.tasks]
        return [f"{self.task}/{self.metric}" if self.task else self.metric]

    @property
    def name(self) -> str:
        return f"{self.combine}({', '.join(self.names)})" if self.tasks else self.names[0]

    @property
    def alpha(self) -> float:
        return 1 - self.confidence


class SavingCondition(Section):
    """One condition of the gate on cost: at least so much is saved against the cheapest base candidate. The saving's
    interval decides: a lower end at or above the bound passes, an upper end below it fails, and what is in between is
    inconclusive."""

    saving_at_least: float = Field(gt=-1, lt=1, allow_inf_nan=False)
    """A fraction: 0.3 for 30%. Below 0 it says how much more a token may cost."""
    concurrency: int | None = None
    """The load that it is judged at, one that is measured. Left out: `decide_at`."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Of the interval, both ends together: at 0.95 it is the one that the report shows."""

    @field_validator("saving_at_least", mode="before")
    @classmethod
    def _fraction(cls, value: Any) -> Any:
        if isinstance(value, int | float) and abs(value) > 1:
            raise ValueError(f"{value:g} is not a fraction; write {value / 100:g} for {value:g}%")
        return value

    @property
    def alpha(self) -> float:
        """Error probability at either end of the interval."""
        return (1 - self.confidence) / 2


def _kind_of_condition(value: Any) -> str:
    saving = any(str(key).startswith("saving") for key in value) if isinstance(value, dict) else False
    return "[SavingCondition]" if saving or isinstance(value, SavingCondition) else "[Condition]"


#: Brackets keep the tag out of the key paths of errors.
GateCondition = Annotated[
    Annotated[Condition, Tag("[Condition]")] | Annotated[SavingCondition, Tag("[SavingCondition]")],
    Discriminator(_kind_of_condition),
]
