"""Settings of `quantize`."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pennyweight.recipe.calibration import Calibration
from pennyweight.schema import Section

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


def scheme_bits(scheme: str) -> int:
    """Bits of a scheme's weights: 4 for `w4a16`. Raises ValueError for `auto`, which has no one width."""
    if scheme == "fp8":
        return 8
    found = re.match(r"w(\d+)a", scheme)
    if found is None:
        raise ValueError(f"scheme {scheme} has no one width")
    return int(found[1])
