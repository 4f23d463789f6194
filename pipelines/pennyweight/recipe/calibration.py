"""Text that a step learns from."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pennyweight.schema import Section


def names_of(texts: str | list[str] | None) -> list[str]:
    """Data sets that a step takes its text from."""
    return [texts] if isinstance(texts, str) else texts or []


def _named(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise ValueError("needs the name of a text data set, or a list of such names")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"names {twice[0]} twice")
    return value


#: A data set's name, or those of several that give a window each in turn.
TextNames = Annotated[str | list[str], BeforeValidator(_named)]


class Calibration(Section):
    source: TextNames
    """Name of a text data set in `data` or evals/sources.yaml, or a list of several, which give a window each in turn.
    Must share no text with the evaluation."""
    samples: int = Field(128, ge=1)
    """Number of windows."""
    length: int = Field(512, ge=8)
    """Tokens in each window."""
    allow_overlap: bool = False
    """Report text that the evaluation uses too, instead of refusing the variant."""
