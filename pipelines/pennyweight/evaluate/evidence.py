"""What was seen of one candidate: every scored token and every answered question, on disk and in memory.

Verdicts are functions of evidence and nothing else. Looks at growing data add to it; nothing is scored twice.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.errors import StageError

SAMPLES = "samples.jsonl"
TOKENS = "tokens.npz"
#: Folder of a run that holds the answers, a file a candidate, and the file with what they were compared with.
SAMPLES_FOLDER = "samples"
REFERENCE_SAMPLES = "reference.jsonl"

Row = dict[str, Any]


@dataclass(frozen=True)
class ScoredText:
    """Windows of text, token by token. `nll` is of the next token, so one shorter than a window."""

    nll: np.ndarray
    """Negative log-likelihood in nats under the candidate, float32 (windows, length − 1)."""
    nll_base: np.ndarray
    documents: np.ndarray
    """Document that each token comes from, int32 (windows, length)."""
    kl: np.ndarray | None = None
    """KL(base ‖ candidate) in nats, (windows, length); None where only likelihoods were compared."""
    agree: np.ndarray | None = None
    """Whether both rank the same token first, (windows, length)."""

    def plus(self, other: ScoredText) -> ScoredText:
        ours, theirs = vars(self), vars(other)
        return ScoredText(**{key: np.concatenate([ours[key], theirs[key]]) for key in ours if ours[key] is not None})


@dataclass(frozen=True)
class Evidence:
    texts: dict[str, ScoredText] = field(default_factory=dict)
    """By name in the suite (`Suite.texts`)."""
    rows: list[Row] = field(default_factory=list)
    """One a question or prompt: task, doc_id, doc_hash, what was asked and answered, and each metric's score."""
    seconds: float = 0.0

    def of_task(self, task: str) -> list[Row]:
        return [row for row in self.rows if row["task"] == task]

    def plus(self, other: Evidence) -> Evidence:
        """Both; what the two have in common must be different data."""
        texts = dict(self.texts)
        for name, text in other.texts.items():
            texts[name] = texts[name].plus(text) if name in texts else text
        return Evidence(texts, self.rows + other.rows, self.seconds + other.seconds)

    def write(self, files: Path) -> None:
        """Raises StageError where a score is not a finite number: nothing can be concluded from it."""
        for name, text in self.texts.items():
            if not all(np.isfinite(part).all() for part in vars(text).values() if part is not None):
                raise StageError(f"{name}: a token's score is not a finite number")
        for row in self.rows:
            scores = [value for value in row.values() if isinstance(value, float)] + row.get("loglikelihoods", [])
            if not all(math.isfinite(value) for value in scores):
                raise StageError(f"{row['task']} item {row['doc_id']}: a score is not a finite number")
        arrays = {
            f"{name}\n{part}": value
            for name, text in self.texts.items()
            for part, value in vars(text).items()
            if value is not None
        }
        np.savez(files / TOKENS, **arrays)
        write_rows(self.rows, files / SAMPLES)

    @classmethod
    def read(cls, files: Path, seconds: float = 0.0) -> Evidence:
        parts: dict[str, dict[str, np.ndarray]] = {}
        if (files / TOKENS).is_file():
            with np.load(files / TOKENS) as arrays:
                for key in arrays.files:
                    name, _, part = key.partition("\n")
                    parts.setdefault(name, {})[part] = arrays[key]
        return cls({name: ScoredText(**part) for name, part in parts.items()}, read_rows(files / SAMPLES), seconds)


def write_rows(rows: list[Row], path: Path) -> None:
    path.write_text("".join(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    with path.open() as lines:
        return [json.loads(line) for line in lines]
