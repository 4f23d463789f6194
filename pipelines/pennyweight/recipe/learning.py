"""Settings of the steps that train: `recover` and `distill`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from pennyweight.recipe.calibration import Calibration, TextNames
from pennyweight.schema import Section


class _Training(Section):
    """What all trainings have: text, and a budget that ends them."""

    text_key: ClassVar[str] = "text"
    default_steps: ClassVar[int]

    text: TextNames
    """Name of a text data set to learn on, or a list of several, which give a window each in turn. Must share no text
    with the evaluation."""
    steps: int | None = Field(None, ge=1)
    """Budget: steps of the optimizer. Where no budget is given, 60 of `recover`, 100 of `distill`."""
    tokens: int | None = Field(None, ge=1)
    """Budget: tokens learnt on."""
    minutes: float | None = Field(None, gt=0)
    """Budget: time of the training itself. Another run may do other steps in it, and give other weights."""
    windows: int | None = Field(None, ge=1)
    """Windows of text to learn on, read again in another order once used up. Left out: as many as the budget of
    steps or tokens takes, 1,024 where only minutes end it."""
    batch: int = Field(4, ge=1)
    """Windows that go through the models at once, over all processes."""
    length: int = Field(256, ge=16)
    """Tokens in a window."""
    held_out: int = Field(8, ge=1)
    """Windows that are not learnt on, and decide which state is kept."""
    allow_overlap: bool = False
    """Report text that the evaluation uses too, instead of refusing the variant."""

    @model_validator(mode="before")
    @classmethod
    def _has_a_budget(cls, value: Any) -> Any:
        if isinstance(value, dict) and not {"steps", "tokens", "minutes"} & value.keys():
            return {**value, "steps": cls.default_steps}
        return value

    @property
    def limits(self) -> dict[str, float]:
        """The parts of the budget that are given: steps, tokens, minutes."""
        given = {name: getattr(self, name) for name in ("steps", "tokens", "minutes")}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def step_windows(self) -> int:
        """Windows that one step of the optimizer learns on."""
        return self.batch

    @property
    def step_tokens(self) -> int:
        """Tokens that one step of the optimizer learns on."""
        return self.step_windows * self.length

    @property
    def most_steps(self) -> int | None:
        """Steps after which the budget is spent in any case; None where only time ends it."""
        limits = self.limits
        counted = [int(limits["steps"])] if "steps" in limits else []
        counted += [-(-int(limits["tokens"]) // self.step_tokens)] if "tokens" in limits else []
        return min(counted, default=None)

    @property
    def calibrate(self) -> Calibration:
        """The text it takes: windows held out, and those to learn on."""
        learnt = self.windows or (1024 if self.most_steps is None else self.most_steps * self.step_windows)
        samples = self.held_out + max(learnt, self.batch)
        return Calibration(source=self.text, samples=samples, length=self.length, allow_overlap=self.allow_overlap)

    def _budget(self) -> str:
        limits = " or ".join(f"{value:,g} {name}" for name, value in self.limits.items())
        return f"{limits} of {self.step_windows} × {self.length} tokens"


class Recover(_Training):
    """Heal a quantized checkpoint: train what is not an integer to predict what the base predicts."""

    imitates_base: ClassVar[bool] = True
    default_steps: ClassVar[int] = 60

    kind: Literal["recover"] = "recover"
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
    check_every: int = Field(10, ge=1)
    """Steps between two looks at the held-out windows."""
    patience: int = Field(3, ge=1)
    """Looks in a row without a smaller divergence after which it stops."""
    compile: bool = False
    """Compile both models' passes first, with torch.compile: faster steps after some minutes. A CPU needs a C++
    compiler for it."""

    @model_validator(mode="after")
    def _moves_integers_one_way(self) -> Recover:
        if {"rounding", "low_rank"} <= set(self.train):
            raise ValueError("`rounding` and `low_rank` both move the integers; keep one of them")
        return self

    @property
    def moves(self) -> Literal["none", "by-one", "low-rank"]:
        """How integers may move."""
        return "by-one" if "rounding" in self.train else "low-rank" if "low_rank" in self.train else "none"

    @property
    def keeps_adapter(self) -> bool:
        """The result is larger by a LoRA adapter."""
        return "adapter" in self.train

    def describe(self) -> str:
        return f"recover {', '.join(self.train)}: {self._budget()}"


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


class OnPolicy(Section):
    prompt: int = Field(32, ge=1)
    """Tokens of each window of the text that the student goes on from; with `answers`, at most so many before each
    place where an answer begins."""
    temperature: float = Field(1.0, gt=0)
    """Of what it writes."""


class DrawnStudent(Section):
    layers: int = Field(ge=2)
    """Layers of the student, copied from the base: evenly spread, the first and the last among them."""


#: Settings of `distill` that a student which writes itself cannot have → why.
_NOT_ON_POLICY = {
    "generate": "the student writes, not the teacher",
    "teacher": "the teacher judges what is not written yet, so nothing can be asked in advance",
    "ce": "what the student says is judged, not imitated",
    "hidden": "predictions alone are compared",
    "tokens": "nobody knows in advance how much the student will write",
    "processes": "one process writes and learns",
}


class Distill(_Training):
    """Train all weights of a checkpoint, or of a student drawn from the base, to predict what the base predicts."""

    imitates_base: ClassVar[bool] = False
    default_steps: ClassVar[int] = 100

    kind: Literal["distill"] = "distill"
    answers: bool = False
    """Learn from answers alone, of data with `messages` or with `prompt` and `answer`; what comes before is read."""
    generate: Generate | None = None
    """The teacher writes what is learnt on: it goes on from the beginnings of the text's windows. Windows held out stay
    as they are."""
    on_policy: OnPolicy | None = None
    """The student writes what is learnt on, anew in every step, and the teacher judges each of its tokens, through TRL.
    It goes on from the beginnings of the text's windows until it ends the text or has `length` tokens. Windows held
    out stay as they are."""
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
    accumulate: int = Field(1, ge=1)
    """Batches in a step of the optimizer."""
    train: Literal["all", "blocks", "after_cut"] = "all"
    """Which weights learn. blocks: those of all blocks; embeddings, last norm and head stay. after_cut: of these, the
    blocks from the first one on that is not the base's own. A live teacher's pass through those before serves for the
    student's too. With either there are more steps in the same time."""
    learning_rate: float = Field(0.0002, gt=0, lt=1)
    """Of AdamW, after a warm-up and before a cosine."""
    warm_up: float = Field(0.05, ge=0, lt=1)
    """Fraction of the budget over which the learning rate rises."""
    check_every: int = Field(20, ge=1)
    """Steps between two looks at the held-out windows."""
    patience: int = Field(5, ge=1)
    """Looks in a row without a smaller divergence after which it stops."""
    processes: int = Field(1, ge=1)
    """Processes that share each batch, on this machine. 1 on a machine of several GPUs uses one of them. Where torchrun
    or `accelerate launch` started the run, all processes that they started do, whatever this says."""

    @model_validator(mode="after")
    def _settings_fit_loss(self) -> Distill:
        given = self._given()
        if "beta" in given and self.loss != "jsd":
            raise ValueError("`beta` needs loss: jsd")
        if self.ce == 1 and (extra := {"loss", "temperature", "hidden", "teacher"} & given):
            raise ValueError(f"with ce: 1 nothing is asked of the teacher; remove `{min(extra)}`")
        if self.generate and self.answers:
            raise ValueError("`generate` writes answers of its own; remove `answers`")
        written = self.generate or self.on_policy
        if written and written.prompt >= self.length:
            raise ValueError(f"a prompt of {written.prompt} tokens leaves nothing of windows of {self.length}")
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

    @model_validator(mode="after")
    def _student_can_write(self) -> Distill:
        if self.on_policy and (refused := [name for name in _NOT_ON_POLICY if name in self._given()]):
            raise ValueError(f"with `on_policy` {_NOT_ON_POLICY[refused[0]]}; remove `{refused[0]}`")
        return self

    def _given(self) -> set[str]:
        """Settings that are not at their default."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}

    @property
    def maker(self) -> Literal["pennyweight", "trl"]:
        """Who does it."""
        return "trl" if self.on_policy else "pennyweight"

    @property
    def step_windows(self) -> int:
        return self.batch * self.accumulate

    def describe(self) -> str:
        student = f"{self.student.layers} layers, " if self.student else ""
        cached = "" if self.teacher == "live" else f", {self.teacher.cache} of {self.teacher.k} cached"
        written = ", on policy" if self.on_policy else ""
        return f"distill {student}{self.loss}{cached}{written}: {self._budget()}"
