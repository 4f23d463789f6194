"""Settings of the steps that change a checkpoint."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pennyweight.schema import Name, Section

Scheme = Literal["w8a16", "w4a16", "w3a16", "w8a8", "w4a8", "fp8", "auto"]
Method = Literal["rtn", "gptq", "awq", "smoothquant", "autoround"]
Backend = Literal["pennyweight", "llm-compressor", "auto-round", "gptqmodel"]

#: Integers for weights alone, a scale for each group of them.
WEIGHT_ONLY = ("w8a16", "w4a16", "w3a16")
#: Schemes that round activations too, as they come.
ACTIVATIONS = ("w8a8", "w4a8", "fp8")
#: Schemes with one scale for each output channel instead of each group.
PER_CHANNEL = ("w8a8", "fp8")
#: Backend → method → schemes that it makes.
CAPABILITIES: dict[str, dict[str, tuple[str, ...]]] = {
    "pennyweight": {"rtn": (*WEIGHT_ONLY, "auto"), "gptq": (*WEIGHT_ONLY, "auto"), "awq": WEIGHT_ONLY},
    "llm-compressor": {
        "rtn": (*WEIGHT_ONLY, *ACTIVATIONS),
        "gptq": (*WEIGHT_ONLY, "w8a8", "w4a8"),
        "awq": WEIGHT_ONLY,
        "smoothquant": ("w8a8", "w4a8"),
    },
    "auto-round": {"autoround": WEIGHT_ONLY},
    "gptqmodel": {"gptq": WEIGHT_ONLY},
}
#: Methods that look at what the model does with text.
CALIBRATED = ("gptq", "awq", "smoothquant", "autoround")


class From(Section):
    """Start from one of `bases` instead of `base`. It comes first; alone it lets that model compete unchanged."""

    imitates_base: ClassVar[bool] = False
    text_key: ClassVar[str] = ""
    calibrate: ClassVar[None] = None

    kind: Literal["from"] = "from"
    base: Name
    """A name in `bases`."""

    def describe(self) -> str:
        return f"from {self.base}"


class Calibration(Section):
    source: str
    """Name of a text data set in `data` or evals/sources.yaml. Must share no text with the evaluation."""
    samples: int = Field(128, ge=1)
    """Number of windows."""
    length: int = Field(512, ge=8)
    """Tokens in each window."""
    allow_overlap: bool = False
    """Report text that the evaluation uses too, instead of refusing the variant."""


class Budget(Section):
    """What a checkpoint may weigh: all its tensors, with scales, zero points, embedding and head."""

    bytes: int | None = Field(None, ge=1)
    bits_per_weight: float | None = Field(None, gt=0, le=32)
    """Bits of all tensors for each parameter."""
    ratio: float | None = Field(None, gt=0, le=1)
    """Fraction of the unquantized checkpoint's bytes."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Budget:
        if sum(value is not None for value in (self.bytes, self.bits_per_weight, self.ratio)) != 1:
            raise ValueError("needs exactly one of `bytes`, `bits_per_weight` and `ratio`")
        return self

    def allowed(self, parameters: int, dense_bytes: int) -> int:
        """Bytes that a model of so many parameters and unquantized bytes may take."""
        if self.bytes is not None:
            return self.bytes
        if self.bits_per_weight is not None:
            return int(parameters * self.bits_per_weight / 8)
        assert self.ratio is not None
        return int(dense_bytes * self.ratio)

    def __str__(self) -> str:
        if self.bytes is not None:
            return f"{self.bytes / 1e6:.1f} MB"
        return f"{self.bits_per_weight:g} bits a weight" if self.bits_per_weight else f"{self.ratio:.0%} of the bytes"


class Search(Section):
    """Work that goes into an allocation."""

    windows: int = Field(4, ge=1)
    """Windows of the calibration text that sensitivity is computed on."""
    held_out: int = Field(4, ge=1)
    """Windows, others, that divergence is measured on; they calibrate nothing."""
    trials: int = Field(40, ge=0)
    """Measurements of divergence that refine the allocation."""


class Quantize(Section):
    """Quantize the weights of the decoder's linear layers."""

    imitates_base: ClassVar[bool] = True
    """Whether the result should predict what the base predicts, so that divergence from it is damage."""
    text_key: ClassVar[str] = "calibrate"
    """The key that names the text a step learns from."""

    kind: Literal["quantize"] = "quantize"
    scheme: Scheme
    """Bits of the weights and of the activations: w4a16. fp8 has 8-bit floats for both. w4a8 keeps a byte a weight on
    disk, as engines load it. auto: bits layer by layer, so that the whole weighs no more than `budget`."""
    method: Method = "rtn"
    """rtn rounds to nearest. gptq (Frantar et al., 2023) places the rounding errors where calibration text feels them
    least. awq (Lin et al., 2024) scales inputs that matter before rounding. smoothquant (Xiao et al., 2023) moves
    activations' outliers into the weights. autoround (Cheng et al., 2024) learns the rounding."""
    backend: Backend | None = None
    """Who does it. Left out: pennyweight for integer weights, auto-round for autoround, llm-compressor for the rest."""
    group_size: int = Field(128, ge=8)
    """Weights that share one scale. Must divide every quantized layer's input size."""
    symmetric: bool = True
    """Without zero points."""
    scales: Literal["max", "mse"] | None = None
    """How pennyweight chooses a scale: max reaches the largest weight, mse takes the smallest squared error. Left out:
    max for rtn, mse for gptq and awq."""
    ignore: list[str] = Field([])
    """Layers to leave alone: module names, or `re:` and a regular expression."""
    head: Literal["none", "w8a16", "w4a16", "auto"] = "none"
    """Scheme of the output head, left alone by default. A tied head is untied; the embedding stays as it is."""
    embedding: Literal["none", "w8a16", "w4a16", "w3a16", "auto"] = "none"
    """Scheme of the input embedding. A tied head shares its integers, unless `head` gives it others of its own."""
    calibrate: Calibration | None = None
    """Text for the methods that need it: a data set's name, or `{source, samples, length}`."""
    dampening: float = Field(0.01, gt=0, lt=1)
    """gptq: fraction of the Hessian's mean diagonal added to it."""
    smoothing: float = Field(0.5, ge=0, le=1)
    """smoothquant: exponent of the activations' maxima, α in the paper; 1 moves their outliers to the weights whole."""
    iterations: int = Field(200, ge=1)
    """autoround: steps of the optimizer in each block."""
    kv_cache: Literal["none", "fp8", "int8"] = "none"
    """Scheme of the keys and values that an engine keeps while it generates. Needs calibration text."""
    budget: Budget | None = None
    """auto: what the checkpoint may weigh: `{bytes}`, `{bits_per_weight}` or `{ratio}`."""
    choices: list[Literal[3, 4, 8, 16]] = Field([4, 8, 16], min_length=1)
    """auto: bits that a layer may get; 16 leaves it as it is."""
    group_sizes: list[Annotated[int, Field(ge=8)]] = Field([])
    """auto: group sizes that a layer may get. Left out: `group_size` alone."""
    search: Search = Field(Search())
    """auto: `{windows, held_out, trials}`."""

    @field_validator("calibrate", mode="before")
    @classmethod
    def _name_to_calibration(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _can_be_made(self) -> Quantize:
        able = [name for name, methods in CAPABILITIES.items() if self.scheme in methods.get(self.method, ())]
        if not able:
            methods = sorted({m for made in CAPABILITIES.values() for m, of in made.items() if self.scheme in of})
            raise ValueError(f"nothing makes {self.scheme} by {self.method}; {self.scheme} has {', '.join(methods)}")
        if self.backend and self.backend not in able:
            raise ValueError(f"backend {self.backend} makes no {self.scheme} by {self.method}; {', '.join(able)} does")
        if self.kv_cache != "none" and self.maker != "llm-compressor":
            raise ValueError("kv_cache is made by llm-compressor; add `backend: llm-compressor`")
        return self

    @model_validator(mode="after")
    def _calibration_fits_method(self) -> Quantize:
        if self.needs_text and self.calibrate is None:
            why = f"method {self.method}" if self.method in CALIBRATED else f"scheme {self.scheme}"
            why = why if self.kv_cache == "none" else "kv_cache"
            raise ValueError(f"{why} needs calibration text; add `calibrate: boolq-passages` or another data set")
        if not self.needs_text and self.calibrate is not None:
            raise ValueError(f"method {self.method} uses no calibration text; remove `calibrate`, or use method: gptq")
        return self

    @model_validator(mode="after")
    def _settings_fit_scheme(self) -> Quantize:
        # What differs from its default, so that a resolved recipe, which spells all of them out, can be read again.
        given = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        if (self.scheme == "auto") != (self.budget is not None):
            raise ValueError("scheme auto needs a `budget`" if self.scheme == "auto" else "`budget` needs scheme: auto")
        if self.scheme != "auto" and (extra := {"choices", "group_sizes", "search"} & given):
            raise ValueError(f"`{min(extra)}` needs scheme: auto")
        if self.scheme in PER_CHANNEL and (extra := {"group_size", "symmetric"} & given):
            raise ValueError(f"{self.scheme} has one scale for each output channel; remove `{min(extra)}`")
        if self.scheme == "w4a8" and not self.symmetric:
            raise ValueError("engines multiply w4a8's integers without zero points; remove `symmetric`")
        if self.scheme in ACTIVATIONS and self.head != "none":
            raise ValueError(f"the head of a {self.scheme} checkpoint stays as it is; remove `head`")
        for key, method in (("smoothing", "smoothquant"), ("iterations", "autoround"), ("dampening", "gptq")):
            if key in given and self.method != method:
                raise ValueError(f"`{key}` needs method: {method}")
        if self.scales and self.maker != "pennyweight":
            raise ValueError(f"`scales` is for backend pennyweight; this step is made by {self.maker}")
        if self.embedding != "none" and self.maker != "pennyweight":
            raise ValueError(f"{self.maker} leaves the embedding as it is; remove `embedding`")
        return self

    @model_validator(mode="after")
    def _allocation_has_something_to_choose(self) -> Quantize:
        if self.scheme != "auto":
            if wrong := [key for key in ("head", "embedding") if getattr(self, key) == "auto"]:
                raise ValueError(f"`{wrong[0]}: auto` needs scheme: auto")
            return self
        assert self.calibrate
        if set(self.choices) == {16}:
            raise ValueError("choices: 16 alone leaves every layer as it is; add 3, 4 or 8")
        if self.search.windows + self.search.held_out > self.calibrate.samples:
            raise ValueError(
                f"search takes {self.search.windows} + {self.search.held_out} windows of the calibration text, which "
                f"has {self.calibrate.samples}; raise `calibrate.samples`, or lower `search`"
            )
        return self

    @property
    def candidate_sizes(self) -> list[int]:
        """Group sizes that a layer may get."""
        return sorted(set(self.group_sizes)) or [self.group_size]

    @property
    def maker(self) -> str:
        """The backend that does it."""
        if self.backend:
            return self.backend
        if self.kv_cache != "none":
            return "llm-compressor"
        return next(name for name, methods in CAPABILITIES.items() if self.scheme in methods.get(self.method, ()))

    @property
    def needs_text(self) -> bool:
        return self.method in CALIBRATED or self.scheme == "auto" or self.kv_cache != "none"

    @property
    def bits(self) -> int:
        """Bits of the weights. Raises ValueError for scheme auto, which has no one width."""
        return scheme_bits(self.scheme)

    @property
    def scale_search(self) -> Literal["max", "mse"]:
        return self.scales or ("max" if self.method == "rtn" else "mse")

    def describe(self) -> str:
        head = "" if self.head == "none" else f", head {self.head}"
        embedding = "" if self.embedding == "none" else f", embedding {self.embedding}"
        cache = "" if self.kv_cache == "none" else f", {self.kv_cache} KV cache"
        kind = "symmetric" if self.symmetric else "asymmetric"
        sizes = "/".join(map(str, self.candidate_sizes))
        grid = "" if self.scheme in PER_CHANNEL else f" {kind} g{sizes}"
        scheme = f"{self.scheme} ({self.budget})" if self.budget else self.scheme
        maker = "" if self.maker == "pennyweight" else f" by {self.maker}"
        return f"quantize {scheme} {self.method}{grid}{head}{embedding}{cache}{maker}"


class _Budgeted(ABC):
    """A training that a budget of its fields `steps`, `tokens` and `minutes` ends."""

    @property
    def limits(self) -> dict[str, float]:
        """The parts of the budget that are given: steps, tokens, minutes."""
        given = {name: getattr(self, name) for name in ("steps", "tokens", "minutes")}
        return {name: value for name, value in given.items() if value is not None}

    @property
    @abstractmethod
    def step_tokens(self) -> int:
        """Tokens that one step of the optimizer learns on."""

    @property
    def most_steps(self) -> int | None:
        """Steps after which the budget is spent in any case; None where only time ends it."""
        limits = self.limits
        counted = [int(limits["steps"])] if "steps" in limits else []
        counted += [-(-int(limits["tokens"]) // self.step_tokens)] if "tokens" in limits else []
        return min(counted, default=None)


class Recover(_Budgeted, Section):
    """Heal a quantized checkpoint: train what is not an integer to predict what the base predicts."""

    imitates_base: ClassVar[bool] = True
    text_key: ClassVar[str] = "text"

    kind: Literal["recover"] = "recover"
    text: str
    """Name of a text data set to learn on. Must share no text with the evaluation."""
    steps: int | None = Field(None, ge=1)
    """Budget: steps of the optimizer. Where no budget is given, 60."""
    tokens: int | None = Field(None, ge=1)
    """Budget: tokens learnt on."""
    minutes: float | None = Field(None, gt=0)
    """Budget: time of the training itself. Another run may do other steps in it, and give other weights."""
    windows: int | None = Field(None, ge=1)
    """Windows of text to learn on, read again in another order once used up. Left out: as many as the budget of
    steps or tokens takes, 1,024 where only minutes end it."""
    batch: int = Field(4, ge=1)
    """Windows in a step."""
    length: int = Field(256, ge=16)
    """Tokens in a window."""
    learning_rate: float = Field(0.0015, gt=0, lt=1)
    """Of AdamW, after a warm-up and before a cosine. A fraction of each scale, and of a norm's mean weight. 0.005
    suits rtn, which leaves scales far from where they do best."""
    train: list[Literal["scales", "norms", "biases", "rounding", "low_rank", "adapter"]] = Field(
        ["scales", "norms"], min_length=1
    )
    """What learns. rounding: every integer may move by one. low_rank: integers move by a product of two thin
    matrices, rounded, which is merged into them. Without either the integers stay as they are. adapter: such a
    product is added to each layer and kept beside it as a LoRA adapter, which transformers and vLLM load."""
    rank: int = Field(16, ge=1)
    """low_rank and adapter: inner size of the product."""
    hidden: float = Field(0.0, ge=0)
    """Weight in the loss of the last hidden states' relative squared distance from the base's."""
    held_out: int = Field(8, ge=1)
    """Windows that are not learnt on, and decide which state is kept."""
    check_every: int = Field(10, ge=1)
    """Steps between two looks at the held-out windows."""
    patience: int = Field(3, ge=1)
    """Looks in a row without a smaller divergence after which it stops."""
    compile: bool = False
    """Compile both models' passes first, with torch.compile: faster steps after some minutes. A CPU needs a C++
    compiler for it."""
    allow_overlap: bool = False
    """Report text that the evaluation uses too, instead of refusing the variant."""

    @model_validator(mode="before")
    @classmethod
    def _has_a_budget(cls, value: Any) -> Any:
        if isinstance(value, dict) and not {"steps", "tokens", "minutes"} & value.keys():
            return {**value, "steps": 60}
        return value

    @model_validator(mode="after")
    def _moves_integers_one_way(self) -> Recover:
        if {"rounding", "low_rank"} <= set(self.train):
            raise ValueError("`rounding` and `low_rank` both move the integers; keep one of them")
        return self

    @property
    def step_tokens(self) -> int:
        return self.batch * self.length

    @property
    def moves(self) -> Literal["none", "by-one", "low-rank"]:
        """How integers may move."""
        return "by-one" if "rounding" in self.train else "low-rank" if "low_rank" in self.train else "none"

    @property
    def keeps_adapter(self) -> bool:
        """The result is larger by a LoRA adapter."""
        return "adapter" in self.train

    @property
    def calibrate(self) -> Calibration:
        """The text it takes: the held-out windows, then those to learn on."""
        learnt = self.windows or (1024 if self.most_steps is None else self.most_steps * self.batch)
        samples = self.held_out + max(learnt, self.batch)
        return Calibration(source=self.text, samples=samples, length=self.length, allow_overlap=self.allow_overlap)

    def describe(self) -> str:
        budget = " or ".join(f"{value:,g} {name}" for name, value in self.limits.items())
        return f"recover {', '.join(self.train)}: {budget} of {self.batch} × {self.length} tokens"


class Prune(Section):
    """Take whole blocks, feed-forward channels, or groups of heads out of a decoder. A plain checkpoint stays."""

    imitates_base: ClassVar[bool] = False
    text_key: ClassVar[str] = "text"

    kind: Literal["prune"] = "prune"
    layers: int | None = Field(None, ge=1)
    """Blocks to take out; `choose` says which."""
    drop: list[Annotated[int, Field(ge=0)]] = Field([])
    """The blocks to take out, by their numbers from 0 on, instead of `layers`."""
    choose: Literal["kl", "influence"] = "kl"
    """kl searches for the blocks whose removal together moves the predictions least. influence takes those that change
    the hidden states least (Men et al., 2024: ShortGPT), and sees none of what goes with them."""
    ffn: float | None = Field(None, gt=0, lt=1)
    """Fraction of every block's feed-forward channels to take out, those that text shows to matter least."""
    kv_groups: int | None = Field(None, ge=1)
    """Key/value heads to take out of every block, each with the query heads that share it."""
    sparsity: Literal["unstructured", "2:4"] | None = None
    """Zeros in weights that keep their shape. Always refused: no runtime here computes less for them."""
    refit: bool = True
    """Fit what stays to the whole model's hidden states, by least squares."""
    text: str | None = None
    """Name of a text data set to choose by and to fit to. Must share no text with the evaluation."""
    samples: int = Field(128, ge=8)
    """Windows of text, the last eighth of them held out for the divergence that is reported."""
    length: int = Field(128, ge=8)
    """Tokens in each window."""
    allow_overlap: bool = False
    """Report text that the evaluation uses too, instead of refusing the variant."""

    @field_validator("sparsity")
    @classmethod
    def _nothing_computes_less(cls, value: str | None) -> str | None:
        if value == "2:4":
            raise ValueError(
                "2:4 zeros save time in the sparse tensor cores of NVIDIA GPUs alone, through vLLM or TensorRT-LLM; "
                "transformers, onnxruntime and openvino multiply them all. Use `layers`, `ffn` or `kv_groups`"
            )
        if value is not None:
            raise ValueError(
                "no runtime here multiplies fewer weights because some are zero; engines for CPUs such as DeepSparse "
                "did. Use `layers`, `ffn` or `kv_groups`"
            )
        return value

    @model_validator(mode="after")
    def _takes_something_out(self) -> Prune:
        if self.layers is None and not self.drop and self.ffn is None and self.kv_groups is None:
            raise ValueError("takes nothing out; add `layers`, `drop`, `ffn` or `kv_groups`")
        if self.layers is not None and self.drop:
            raise ValueError("`drop` names the blocks that `layers` would choose; keep one of the two")
        if self.choose != "kl" and self.layers is None:
            raise ValueError("`choose` needs `layers`")
        twice = sorted({block for block in self.drop if self.drop.count(block) > 1})
        if twice:
            raise ValueError(f"drop names block {twice[0]} twice")
        return self

    @model_validator(mode="after")
    def _has_text(self) -> Prune:
        if self.text is None and (chosen := [key for key in ("layers", "ffn", "kv_groups") if getattr(self, key)]):
            raise ValueError(f"`{chosen[0]}` is chosen by text; add `text: boolq-passages` or another data set")
        return self

    @property
    def removed_layers(self) -> int:
        return self.layers or len(self.drop)

    @property
    def held_out(self) -> int:
        """Windows of the text that nothing is chosen by or fitted to."""
        return self.samples // 8

    @property
    def calibrate(self) -> Calibration | None:
        if self.text is None:
            return None
        return Calibration(source=self.text, samples=self.samples, length=self.length, allow_overlap=self.allow_overlap)

    def describe(self) -> str:
        parts = [f"{self.layers} layers by {self.choose}"] if self.layers else []
        parts += [f"layers {', '.join(map(str, sorted(self.drop)))}"] if self.drop else []
        parts += [f"{self.ffn:.3g} of the FFN channels"] if self.ffn else []
        parts += [f"{self.kv_groups} KV groups"] if self.kv_groups else []
        return f"prune {', '.join(parts)}{', refitted' if self.refit and self.text else ''}"


class TeacherCache(Section):
    """What the teacher says to each token, computed once and kept."""

    cache: Literal["top_k", "sampled"]
    """top_k: its k most probable tokens, and all others as one class. sampled: its k / 2 most probable tokens, and as
    many draws from the others, whose loss is right on average (after Anshumann et al., 2025)."""
    k: int = Field(64, ge=2, le=1024)

    @property
    def exact(self) -> int:
        """Tokens whose own probability is kept."""
        return self.k if self.cache == "top_k" else self.k // 2

    def bytes_per_token(self, vocabulary: int) -> int:
        """Of the cache: each token's number takes 2 bytes up to a vocabulary of 65,536, else 4. The log-probabilities
        of the most probable and that of all others take 2 each, padded to whole numbers."""
        number = 2 if vocabulary <= 2**16 else 4
        return self.k * number + number * -(-2 * (self.exact + 1) // number)


class Generate(Section):
    prompt: int = Field(32, ge=1)
    """Tokens of each window of the text that the teacher goes on from."""
    temperature: float = Field(1.0, gt=0)


class DrawnStudent(Section):
    layers: int = Field(ge=2)
    """Layers of the student, copied from the base: evenly spread, the first and the last among them."""


class Distill(_Budgeted, Section):
    """Train all weights of a checkpoint, or of a student drawn from the base, to predict what the base predicts."""

    imitates_base: ClassVar[bool] = False
    text_key: ClassVar[str] = "text"

    kind: Literal["distill"] = "distill"
    text: str
    """Name of a text data set to learn on. Must share no text with the evaluation."""
    answers: bool = False
    """Learn from answers alone, of data with `messages` or with `prompt` and `answer`; what comes before is read."""
    generate: Generate | None = None
    """The teacher writes what is learnt on: it goes on from the beginnings of the text's windows. Windows held out stay
    as they are."""
    student: DrawnStudent | None = None
    """`{layers}`: a student drawn from the base. Left out: the checkpoint before this step."""
    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """Divergence from the teacher. forward_kl: the student covers all that the teacher may say. reverse_kl: it says
    nothing that the teacher would not. jsd: between them, by `beta`."""
    beta: float = Field(0.5, gt=0, lt=1)
    """jsd: the teacher's share of the mixture that both are compared with."""
    ce: float = Field(0.0, ge=0, le=1)
    """Share in the loss of the cross-entropy with the text itself; 1: no teacher."""
    hidden: float = Field(0.0, ge=0)
    """Weight in the loss of the last hidden states' relative squared distance from the teacher's."""
    temperature: float = Field(1.0, gt=0)
    """Of both models' predictions in the divergence, which is multiplied by its square."""
    teacher: Literal["live"] | TeacherCache = "live"
    """live: the base reads every batch. `{cache, k}`: what it says is computed once, kept in the store, and shared by
    all variants that learn on the same windows."""
    steps: int | None = Field(None, ge=1)
    """Budget: steps of the optimizer. Where no budget is given, 100."""
    tokens: int | None = Field(None, ge=1)
    """Budget: tokens learnt on."""
    minutes: float | None = Field(None, gt=0)
    """Budget: time of the training itself. Another run may do other steps in it, and give other weights."""
    windows: int | None = Field(None, ge=1)
    """Windows of text to learn on, read again in another order once used up. Left out: as many as the budget of
    steps or tokens takes, 1,024 where only minutes end it."""
    batch: int = Field(4, ge=1)
    """Windows that go through the models at once, over all processes."""
    accumulate: int = Field(1, ge=1)
    """Batches in a step of the optimizer."""
    length: int = Field(256, ge=16)
    """Tokens in a window."""
    learning_rate: float = Field(0.0002, gt=0, lt=1)
    """Of AdamW, after a warm-up and before a cosine."""
    warm_up: float = Field(0.05, ge=0, lt=1)
    """Fraction of the budget over which the learning rate rises."""
    held_out: int = Field(8, ge=1)
    """Windows that are not learnt on, and decide which state is kept."""
    check_every: int = Field(20, ge=1)
    """Steps between two looks at the held-out windows."""
    patience: int = Field(5, ge=1)
    """Looks in a row without a smaller divergence after which it stops."""
    processes: int = Field(1, ge=1)
    """Processes that share each batch, on this machine. 1 on a machine of several GPUs uses one of them."""
    allow_overlap: bool = False
    """Report text that the evaluation uses too, instead of refusing the variant."""

    @model_validator(mode="before")
    @classmethod
    def _has_a_budget(cls, value: Any) -> Any:
        if isinstance(value, dict) and not {"steps", "tokens", "minutes"} & value.keys():
            return {**value, "steps": 100}
        return value

    @model_validator(mode="after")
    def _settings_fit_loss(self) -> Distill:
        given = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        if "beta" in given and self.loss != "jsd":
            raise ValueError("`beta` needs loss: jsd")
        if self.ce == 1 and (extra := {"loss", "temperature", "hidden", "teacher"} & given):
            raise ValueError(f"with ce: 1 nothing is asked of the teacher; remove `{min(extra)}`")
        if self.generate and self.answers:
            raise ValueError("`generate` writes answers of its own; remove `answers`")
        if self.generate and self.generate.prompt >= self.length:
            raise ValueError(f"a prompt of {self.generate.prompt} tokens leaves nothing of windows of {self.length}")
        if self.batch % self.processes:
            raise ValueError(f"{self.processes} processes cannot share a batch of {self.batch} windows evenly")
        return self

    @model_validator(mode="after")
    def _cache_has_what_loss_needs(self) -> Distill:
        if self.teacher == "live":
            return self
        if self.teacher.cache == "sampled" and self.loss != "forward_kl":
            raise ValueError(f"a sampled cache gives the forward KL alone; use cache: top_k for {self.loss}")
        if self.hidden:
            raise ValueError("a cache keeps no hidden states; use teacher: live, or remove `hidden`")
        return self

    @property
    def step_tokens(self) -> int:
        return self.batch * self.accumulate * self.length

    @property
    def calibrate(self) -> Calibration:
        """The text it takes: the held-out windows, then those to learn on."""
        a_step = self.batch * self.accumulate
        learnt = self.windows or (1024 if self.most_steps is None else self.most_steps * a_step)
        samples = self.held_out + max(learnt, self.batch)
        return Calibration(source=self.text, samples=samples, length=self.length, allow_overlap=self.allow_overlap)

    def describe(self) -> str:
        budget = " or ".join(f"{value:,g} {name}" for name, value in self.limits.items())
        student = f"{self.student.layers} layers, " if self.student else ""
        cached = "" if self.teacher == "live" else f", {self.teacher.cache} of {self.teacher.k} cached"
        shape = f"{self.batch * self.accumulate} × {self.length} tokens"
        return f"distill {student}{self.loss}{cached}: {budget} of {shape}"


Step = Annotated[From | Prune | Quantize | Recover | Distill, Field(discriminator="kind")]
STEPS: dict[str, type[Section]] = {
    "from": From,
    "prune": Prune,
    "distill": Distill,
    "quantize": Quantize,
    "recover": Recover,
}


def scheme_bits(scheme: str) -> int:
    """Bits of a scheme's weights: 4 for `w4a16`. Raises ValueError for `auto`, which has no one width."""
    if scheme == "fp8":
        return 8
    found = re.match(r"w(\d+)a", scheme)
    if found is None:
        raise ValueError(f"scheme {scheme} has no one width")
    return int(found[1])


def step_by_kind(item: Any) -> Any:
    """`{quantize: {…}}`, as a step is written, to `{kind: quantize, …}`. Raises ValueError for any other shape."""
    if isinstance(item, dict) and "kind" not in item and len(item) == 1:
        kind, body = next(iter(item.items()))
        return {"kind": kind, **body} if isinstance(body, dict) else {"kind": kind}
    if isinstance(item, dict) and "kind" not in item:
        raise ValueError(f"a step is a mapping with one key, the kind of step; this one has {sorted(map(str, item))}")
    return item
