"""The frozen records that stages hand on. Paths and digests travel between stages, models never do.

Every record is versioned JSON through pydantic: `record.model_dump(mode="json")` and `Record.model_validate(...)`.
`RunRecord` is the public `run.json`; its schema is published in docs/reference/run.schema.json.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

RUN_SCHEMA_VERSION = 1

VerdictStatus = Literal["pass", "fail", "inconclusive", "base", "error"]
RunStatus = Literal["passed", "partial", "inconclusive", "nothing-passed", "nothing-cheaper", "failed", "running"]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)


class Allocation(Record):
    """How many bits each layer got from a budget, and what that costs in nats per token, KL from the base."""

    budget: int = Field(description="bytes that the checkpoint's tensors may take")
    bytes: int = Field(description="bytes that they do take")
    layers: dict[str, str] = Field(description="layer → its bits and groups")
    predicted_kl: float
    measured_kl: float = Field(description="on held-out windows of the calibration text")
    uniform_kl: dict[str, float] = Field(description="the same for each choice that fits when all layers get it")
    trials: int = Field(description="measurements that refined it")


class Rounding(Record):
    """What `quantize` did to a checkpoint, checked on the files that it wrote."""

    backend: str
    method: str
    layers: dict[str, int] = Field(description="kind of integers → how many layers have them")
    allocation: Allocation | None = Field(None, description="of scheme auto")
    reload_difference: float = Field(
        description="largest |Δ log p| in nats between what was made and what a fresh process loads"
    )
    seconds: float


class Healing(Record):
    """What `recover` did to a checkpoint."""

    steps: int
    tokens: int = Field(description="tokens learnt on")
    ended_by: str = Field(description="the limit of its budget that was reached, or `patience`")
    trained: int = Field(description="numbers that learnt")
    moved: int = Field(description="integers that are not what they were")
    kl_before: float = Field(description="nats per token from the base, on text that was not learnt on")
    kl_after: float
    curve: list[tuple[int, float]] = Field(description="(step, held-out KL)")
    tokens_per_second: float = Field(description="learnt on, looks at the held-out text included")
    seconds: float


class Pruning(Record):
    """What `prune` took out of a checkpoint. Pairs are (before, after); KL is from the checkpoint before, in nats per
    token, on text that nothing was chosen by."""

    removed: list[int] = Field(description="blocks taken out, by their numbers before")
    layers: tuple[int, int]
    measure: Literal["kl", "influence", "named"] | None = Field(description="what chose the blocks; None: none went")
    channels: tuple[int, int] | None = Field(None, description="of each feed-forward net; None: all stayed")
    kv_groups: tuple[int, int] | None = Field(None, description="key/value heads of each block; None: all stayed")
    refitted: int = Field(description="blocks whose weights were fitted to the whole model")
    kl_cut: float | None = Field(description="without those blocks, before anything was narrowed or fitted")
    kl_influence: float | None = Field(description="the same, had the blocks of least influence gone")
    kl: float | None = Field(description="of the checkpoint as it was written")
    curve: list[tuple[int, float]] = Field(description="(blocks taken out, KL before any fit)")
    parameters: tuple[int, int]
    weight_bytes: tuple[int, int]
    reload_difference: float = Field(
        description="largest |Δ log p| in nats between what was made and what a fresh process loads"
    )
    seconds: float
    earlier: Pruning | None = Field(None, description="of the `prune` step before this one")

    @property
    def all(self) -> list[Pruning]:
        """Of all `prune` steps up to this one, the first one first."""
        return [*(self.earlier.all if self.earlier else []), self]


class Distillation(Record):
    """What `distill` did to a checkpoint."""

    steps: int
    tokens: int = Field(description="tokens learnt on")
    ended_by: str = Field(description="the limit of its budget that was reached, `patience`, or where the loss failed")
    kept_step: int = Field(description="the step whose weights were kept, the best on held-out text")
    shared_blocks: int = Field(0, description="the first blocks, which are the base's and did not learn")
    kl_before: float = Field(description="nats per token from the base, on text that was not learnt on")
    kl_after: float
    curve: list[tuple[int, float]] = Field(description="(step, held-out KL)")
    losses: list[tuple[int, float]] = Field(description="(step, mean training loss since the point before)")
    cache_bytes_per_token: int | None = Field(None, description="of what the teacher says; None where it was live")
    cache_reused: bool = Field(False, description="the cache was in the store already")
    tokens_per_second: float = Field(description="learnt on, looks at the held-out text included")
    training_seconds: float
    seconds: float = Field(description="with loading, and with writing the cache where it was not there; of a resumed "
                           "step, since it was resumed")  # fmt: skip
    earlier: Distillation | None = Field(None, description="of the `distill` step before this one")

    @property
    def all(self) -> list[Distillation]:
        """Of all `distill` steps up to this one, the first one first."""
        return [*(self.earlier.all if self.earlier else []), self]


class Checkpoint(Record):
    """A folder of weights on disk."""

    path: str
    digest: str = Field(description="sha256 over the names and contents of the files in the folder")
    bytes: int = Field(description="size on disk of the weight files")
    weight_bytes: int = Field(description="bytes of the tensors themselves, without any file's header")
    format: str = Field(description="`safetensors`, or `compressed-tensors` for quantized integers")
    dtype: str = Field(description="dtype of what is not quantized, such as `bfloat16`")
    parameters: int
    origin: str = Field(description="the URI it came from, or the steps that made it from the base")
    pruning: Pruning | None = Field(None, description="of its last `prune` step")
    rounding: Rounding | None = Field(None, description="of its last `quantize` step")
    healing: Healing | None = Field(None, description="of its last `recover` step")
    distillation: Distillation | None = Field(None, description="of its last `distill` step")


class Parity(Record):
    """How far an exported candidate is from the checkpoint that it was exported from."""

    kl_mean: float = Field(description="nats per token, checkpoint in transformers against the exported file")
    top1_agreement: float
    tokens: int
    tolerance: float
    delta_mean: float | None = Field(None, description="mean |Δ log p| of the tokens that follow, nats")
    delta_max: float | None = Field(None, description="largest |Δ log p| of the tokens that follow, nats")
    quantized_tensors: int = Field(description="tensors quantized in the exported file")


class Candidate(Record):
    """One variant exported for one runtime: what would really be served."""

    id: str = Field(description="`<variant>@<runtime>`; the base's variant is `base`")
    variant: str
    runtime: str
    checkpoint: Checkpoint
    path: str
    digest: str
    bytes: int = Field(description="size on disk of the weight files that this runtime loads")
    weight_bytes: int
    dtype: str = Field(description="dtype that activations are computed in")
    parity: Parity | None = Field(None, description="None where the runtime loads the checkpoint as it is")


class MetricValue(Record):
    """One metric of one candidate. `delta` is value − base, paired over the same samples where there are samples."""

    value: float
    stderr: float | None = None
    low: float | None = Field(None, description="95% interval; None where the data give no bound")
    high: float | None = None
    n: int
    base: float | None = None
    delta: float | None = None
    delta_stderr: float | None = None
    delta_low: float | None = Field(None, description="95% interval of delta, paired item by item")
    delta_high: float | None = None
    gained: int | None = Field(None, description="questions that only the candidate answered rightly")
    lost: int | None = Field(None, description="questions that only the base answered rightly")
    mcnemar_p: float | None = Field(None, description="exact two-sided McNemar test of gained against lost")
    higher_is_better: bool


class QualityReport(Record):
    candidate: str
    metrics: dict[str, MetricValue] = Field(description="`kl_mean`, `top1_agreement`, …, and `<task>/<metric>`")
    samples_path: str = Field(description="JSONL, one line a sample: task, doc_id, doc_hash, scores")
    samples_digest: str
    tokens_scored: int
    seconds: float


class Percentiles(Record):
    p50: float
    p95: float


class Interval(Record):
    """A 95% confidence interval and the point estimate in it."""

    value: float
    low: float
    high: float


class Measured(Record):
    """How fast this machine is, with the threads that a run would use."""

    threads: int
    read_gb_per_s: float = Field(description="sequential read from memory, 10^9 bytes a second")
    gflops_fp32: float = Field(description="float32 matrix product, 10^9 floating-point operations a second")
    gflops_bf16: float = Field(description="the same in bfloat16")
    gops_int8: float | None = Field(None, description="the same of 8-bit integers, summed in 32 bits; None: no kernel")
    reads: dict[int, float] = Field(
        default_factory=dict, description="bytes that are read over and over → GB/s; what fits in a cache is faster"
    )


class Roofline(Record):
    """The least time that a workload can take on the machine that it was measured on, and how near a candidate came."""

    best_output_tokens_per_second: float = Field(description="bound from the ceilings measured in the same session")
    bound: Literal["memory", "compute"] = Field(description="what most of the least time is spent on")
    realized: float = Field(description="measured / best output tokens a second")
    mbu: float = Field(description="bytes that decoding must read / its time / the measured read speed")
    mfu: float = Field(description="operations that the workload needs / its time / the measured peak")
    largest_saving: float | None = Field(
        None, description="1 − least cost / measured cost of the cheapest base candidate; None without such a candidate"
    )
    saving_realized: float | None = Field(None, description="saving / largest saving; None where either is not above 0")
    prefill_seconds: float = Field(description="least time to read the prompts of one wave")
    decode_step_seconds: float = Field(description="least time of a step that gives every request a token, on average")
    weight_bytes: int = Field(description="weights that a decoding step reads")
    kv_bytes_per_position: int = Field(description="keys and values of one token, all layers")
    read_gb_per_s: float = Field(description="ceiling of reads of as many bytes as a decoding step reads")
    peak_gops: float = Field(description="ceiling of products, 10^9 operations a second")


class CostPoint(Record):
    """What one candidate costs at one concurrency."""

    concurrency: int
    input_tokens: int = Field(description="prompt tokens of each request")
    output_tokens: int = Field(description="generated tokens of each request")
    rounds: int
    output_tokens_per_second: float
    total_tokens_per_second: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    slo_met: bool | None = Field(None, description="None where the recipe states no SLO")
    usd_per_1m_tokens: float = Field(description="per million input + output tokens at the workload's mix")
    usd_per_1m_output_tokens: float
    saving: Interval | None = Field(None, description="1 − cost / cost of the cheapest base candidate, paired by round")
    saving_against: str | None = None
    roofline: Roofline | None = Field(None, description="None where the model is no plain decoder")
    joules_per_output_token: float | None = Field(None, description="None where the machine has no energy counter")
    log_ratios: list[float] = Field([], description="ln(cost / cost of `saving_against`), round by round")


class CostReport(Record):
    candidate: str
    usd_per_hour: float = Field(description="of a busy hour, which tokens are priced with")
    points: list[CostPoint]
    peak_memory_bytes: int | None = Field(
        None, description="most memory that the loaded candidate added: resident, or on a GPU the device's"
    )


class LeverReport(Record):
    """One setting of a candidate's engine, off and on in turn."""

    lever: str
    candidate: str
    concurrency: int
    saving: Interval | None = Field(None, description="1 − cost with it / cost without it; None where it was not tried")
    kept: bool = False
    reason: str = ""


class Price(Record):
    """What an hour of a machine costs, where that is written, and the parts that make it the price of a busy hour."""

    name: str
    purchase: str
    usd_per_hour: float = Field(description="of an hour that is paid for, busy or not")
    source: str
    date: str = Field(description="on which it held; empty where that is not known")
    owned: dict[str, float] | None = Field(None, description="what an hour of a machine of one's own is made of")
    overhead: float = Field(0.0, description="share of paid time that is lost to restarts")
    utilization: float = Field(1.0, description="share of the hours that it is up in which the machine works")
    usd_per_busy_hour: float = Field(description="usd_per_hour / (1 − overhead) / utilization; it prices tokens")
    egress_usd_per_gb: float = Field(0.0, description="of the answers' text; a GB has 10⁹ bytes")
    bytes_per_token: float | None = Field(None, description="of an answer's text; None where egress is free")
    egress_usd_per_1m_output: float = Field(0.0, description="egress_usd_per_gb · bytes_per_token / 1000")

    @model_validator(mode="before")
    @classmethod
    def _without_parts(cls, value: Any) -> Any:
        """Records that know no parts: every hour that is paid for is a busy one."""
        if isinstance(value, dict) and "usd_per_hour" in value and not {"overhead", "utilization"} & value.keys():
            return {"usd_per_busy_hour": value["usd_per_hour"], **value}
        return value

    def words(self) -> str:
        """The price of an hour, where it is written, and what makes it that of a token."""
        origin = f"{self.name}, {self.purchase}, ${self.usd_per_hour:.6g} an hour"
        return "; ".join([f"{origin} ({self.source}, {self.date or 'undated'})", *self.parts()])

    @property
    def is_of_the_market(self) -> bool:
        """It is that of an instance for hire, which this machine need not be."""
        return self.purchase in ("on demand", "spot")

    def parts(self) -> list[str]:
        """What stands between the price of an hour and that of a token, in words; empty where nothing does."""
        words = [f"{self.overhead:.2%} of the time lost to restarts"] if self.overhead else []
        if self.purchase == "spot" and not self.overhead:
            words.append("no interruption counted")
        if self.utilization < 1:
            words.append(f"busy {self.utilization:.1%} of the time")
        if self.usd_per_busy_hour != self.usd_per_hour:
            words.append(f"so ${self.usd_per_busy_hour:.6g} a busy hour")
        if self.egress_usd_per_gb:
            words.append(f"egress ${self.egress_usd_per_gb:g} a GB at {self.bytes_per_token:g} bytes a token")
        return words


class BenchmarkReport(Record):
    """All candidates' costs, measured in turn in one session on one machine."""

    reports: dict[str, CostReport]
    failures: dict[str, str] = Field(default_factory=dict, description="candidate id → why it could not be measured")
    price: Price
    order: str = Field(description="how the candidates took turns")
    seconds: float
    measured_at: str
    machine: dict[str, Any]
    ceilings: Measured | None = Field(
        None, description="the machine's speed before and after the turns, whichever was faster"
    )
    energy_counters: list[str] = Field([], description="what joules were counted by")


class ConditionResult(Record):
    """One condition of the gate: what was seen, how sure that is, and what it would take to be surer."""

    name: str
    status: Literal["pass", "fail", "inconclusive", "info"] = Field(description="`info`: it does not decide")
    reason: str
    higher_is_better: bool
    value: float | None = Field(None, description="of the metric, of its difference from the base, or of the saving")
    threshold: float | None = Field(None, description="what the value is compared with")
    worst: float | None = Field(None, description="one-sided confidence bound on the bad side; None: no bound")
    best: float | None = Field(None, description="one-sided confidence bound on the good side")
    n: int = Field(0, description="questions, prompts or tokens; rounds of the benchmark for a saving")
    look: int = 1
    looks: int = Field(1, description="looks that were planned; more than 1 with `on_inconclusive: extend`")
    detectable: float | None = Field(None, description="distance from the threshold that this n sees in 80% of cases")
    needed: int | None = Field(None, description="n that passes no loss, and fails twice the margin, in 80% of cases")
    needed_as_seen: int | None = Field(None, description="n that decides in 80% of cases if the value is the truth")


class Verdict(Record):
    status: VerdictStatus
    reasons: list[str]
    conditions: list[ConditionResult] = []


class Probe(Record):
    """What the winner said of a little text when it was judged, so that whoever loads its files can ask again."""

    text: str = Field(description="name of the text in the suite")
    windows: list[list[int]] = Field(description="token ids")
    log_probs: list[list[float]] = Field(
        description="natural logarithm of the probability of each next token, so one fewer than a window has tokens"
    )
    engine: dict[str, Any] = Field(
        description="what said it: runtime, versions of its libraries, device, instruction set, threads"
    )
    tolerance: float = Field(description="nats per token that another engine or machine may differ by")
    same_engine_tolerance: float = Field(description="nats per token that the same engine may differ by")


class Registered(Record):
    model: str
    version: str
    alias: str
    uri: str


class Tracking(Record):
    uri: str
    run_id: str
    experiment: str


class CandidateResult(Record):
    """One line of the outcome: a candidate with all that is known of it."""

    id: str
    variant: str
    runtime: str
    checkpoint: Checkpoint | None
    candidate: Candidate | None
    quality: QualityReport | None
    cost: CostReport | None
    verdict: Verdict


class StageTime(Record):
    """Where the time of a run went. `seconds` is wall time; `library_seconds` the part spent in other people's code."""

    stage: str
    subject: str
    seconds: float
    library_seconds: float
    reused: bool = Field(description="the result was in the store already")
    peak_memory_bytes: int | None = None
    error: str | None = None


class RecipeRef(Record):
    path: str
    digest: str
    resolved: dict[str, Any] = Field(description="the recipe with all defaults, and all that it named embedded")


class RunRecord(Record):
    """`run.json`: the public record of one run."""

    schema_version: int = RUN_SCHEMA_VERSION
    name: str
    run_dir: str
    started_at: str
    recipe: RecipeRef
    environment: dict[str, Any]
    status: RunStatus
    base: str | None = Field(None, description="the cheapest base candidate at `decide_at`")
    winner: str | None = None
    registered: Registered | None = None
    tracking: Tracking | None = None
    tracking_error: str | None = None
    seconds: float = 0.0
    candidates: list[CandidateResult] = []
    stages: list[StageTime] = []
    levers: list[LeverReport] = Field([], description="settings of its engine that were tried on the winner")
    probe: Probe | None = Field(None, description="what the winner said of a little text")
    price: Price | None = None
    ceilings: Measured | None = Field(None, description="the machine's speed in the benchmark's session")
    energy_counters: list[str] = Field([], description="what joules were counted by")
    notes: list[str] = Field([], description="what a reader must know to read the numbers rightly")

    def start_of(self, variant: str) -> str:
        """Name of the base that a variant was made from; `base` is the recipe's own."""
        steps = (self.recipe.resolved.get("variants") or {}).get(variant) or [{}]
        return (steps[0].get("from") or {}).get("base", "base")
