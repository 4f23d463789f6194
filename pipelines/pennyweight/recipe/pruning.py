"""Settings of `prune`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pennyweight.columns import spans
from pennyweight.recipe.calibration import Calibration, TextNames
from pennyweight.schema import Section

#: Windows held out, at most.
HELD_OUT = 32


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
    text: TextNames | None = None
    """Name of a text data set to choose by and to fit to, or a list of several, which give a window each in turn. Must
    share no text with the evaluation."""
    samples: int = Field(512, ge=8)
    """Windows of text, the last eighth of them, 32 at most, held out for the divergence that is reported. Few choose as
    well as many; what is fitted to many predicts other text better."""
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
        about_text = ("samples", "length", "allow_overlap")
        changed = [key for key in about_text if getattr(self, key) != type(self).model_fields[key].default]
        if self.text is None and changed:
            raise ValueError(f"`{changed[0]}` is about `text`, and there is none; add `text`, or remove it")
        return self

    @property
    def removed_layers(self) -> int:
        return self.layers or len(self.drop)

    @property
    def held_out(self) -> int:
        """Windows of the text that nothing is chosen by or fitted to."""
        return min(self.samples // 8, HELD_OUT)

    @property
    def calibrate(self) -> Calibration | None:
        if self.text is None:
            return None
        return Calibration(source=self.text, samples=self.samples, length=self.length, allow_overlap=self.allow_overlap)

    def describe(self) -> str:
        parts = [f"{self.layers} {_layers(self.layers)} by {self.choose}"] if self.layers else []
        parts += [f"{_layers(len(self.drop))} {spans(sorted(self.drop))}"] if self.drop else []
        parts += [f"{self.ffn:.3g} of the FFN channels"] if self.ffn else []
        parts += [f"{self.kv_groups} KV group{'s' if self.kv_groups > 1 else ''}"] if self.kv_groups else []
        return f"prune {', '.join(parts)}{', refitted' if self.refit and self.text else ''}"


def _layers(count: int) -> str:
    return "layer" if count == 1 else "layers"
