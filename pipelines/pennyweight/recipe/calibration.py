"""Text that a step learns from."""

from __future__ import annotations

from pydantic import Field

from pennyweight.schema import Section


class Calibration(Section):
    source: str
    """Name of a text data set in `data` or evals/sources.yaml. Must share no text with the evaluation."""
    samples: int = Field(128, ge=1)
    """Number of windows."""
    length: int = Field(512, ge=8)
    """Tokens in each window."""
    allow_overlap: bool = False
    """Report text that the evaluation uses too, instead of refusing the variant."""
