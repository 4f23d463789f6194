"""Errors that users can cause. Each one says what is wrong and what to do; none of them shows a traceback."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches


class PennyweightError(Exception):
    """An expected failure: one message, an optional hint, and the exit code that the command ends with."""

    exit_code = 4

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class UsageError(PennyweightError):
    """The command was called in a way that cannot work."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a recipe, suite or price sheet.

    `path` is the dotted key path (`variants.int4.0.quantize.group_size`), `line` the 1-based line in `file`.
    """

    file: str
    path: str
    message: str
    line: int | None = None
    hint: str | None = None

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        text = f"{where}: {self.path}: {self.message}" if self.path else f"{where}: {self.message}"
        return f"{text}\n    hint: {self.hint}" if self.hint else text


class RecipeError(PennyweightError):
    """A recipe that cannot be run, with every problem found in it."""

    exit_code = 2
    subject = "the recipe"

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{count} in {self.subject}:", *(f"  {problem}" for problem in problems)]))


class PriceSheetError(RecipeError):
    """A price sheet that cannot be read, with every problem found in it."""

    subject = "the price sheet"


class SourceError(PennyweightError):
    """A model or a data set that cannot be fetched, read or trusted."""


class StoreError(PennyweightError):
    """The store cannot be read or written."""


class StageError(PennyweightError):
    """A stage could not do its work."""


class TrackingError(PennyweightError):
    """The MLflow server did not take what it was given. The run's own record is untouched."""


def did_you_mean(word: str, choices: list[str]) -> str | None:
    """A hint for a mistyped `word`: the nearest choice where there is one, else all of them."""
    near = get_close_matches(word, choices, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"choose one of: {', '.join(sorted(choices))}" if choices else None
