"""Whether what a variant learns from is what it is judged on: text that both share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from pennyweight.errors import StageError
from pennyweight.records import Record

if TYPE_CHECKING:
    import numpy as np

#: Length of runs that count as copied text: Brown et al. (2020), Language Models are Few-Shot Learners, app. C.
OVERLAP_N = 13

#: Share of the evaluation that may lie in such runs; a stock phrase or two recurs in any large text.
MAX_OVERLAP = 0.01


class Overlap(Record):
    """How much of the evaluation is a copy of calibration text."""

    n: int = Field(description="tokens in the runs that are compared")
    shared: int = Field(description="different n-grams found on both sides")
    tokens: int = Field(description="tokens of the evaluation")
    covered: int = Field(description="those of them inside a shared n-gram")
    documents: int = Field(description="documents or windows of the evaluation")
    touched: int = Field(description="those of them with a shared n-gram")
    example: str | None = Field(None, description="the longest shared run, and where it lies")

    @property
    def fraction(self) -> float:
        """Share of the evaluation's tokens that lie in shared n-grams, 0 … 1."""
        return self.covered / self.tokens if self.tokens else 0.0


def measure(
    calibration: Sequence[np.ndarray],
    evaluation: Sequence[np.ndarray],
    n: int = OVERLAP_N,
    decode: Callable[[list[int]], str] | None = None,
) -> Overlap:
    """Runs of `n` tokens that two sets of token sequences share: arrays (windows, length), or lists of arrays.

    `decode` spells tokens in the example; without it the example says only where the run lies.
    """
    import numpy as np

    tokens = sum(len(document) for document in evaluation)
    left, _ = _hashes(calibration, n)
    right, starts = _hashes(evaluation, n)
    hits = np.isin(right, left)
    covered = np.zeros(tokens, dtype=bool)
    for offset in range(n):
        covered[starts[hits] + offset] = True
    lengths = np.array([len(document) for document in evaluation], dtype=np.int64)
    owner = np.repeat(np.arange(len(evaluation)), lengths)
    return Overlap(
        n=n,
        shared=len(np.unique(right[hits])),
        tokens=tokens,
        covered=int(covered.sum()),
        documents=len(evaluation),
        touched=len(np.unique(owner[covered])),
        example=_example(covered, owner, lengths, evaluation, decode) if hits.any() else None,
    )


def refuse(found: Overlap, name: str, key: str) -> None:
    """Raise StageError when more than MAX_OVERLAP of the evaluation is copied from the text of `name`, which the
    recipe's `key` names.

    Touvron et al. (2023), Llama 2, app. A.6, measure contamination in the same way, as the share of a sample's tokens
    that lie inside long common n-grams.
    """
    if found.fraction > MAX_OVERLAP:
        raise StageError(
            f"{name} learns from text that the evaluation uses: {found.fraction:.1%} of the evaluation's "
            f"tokens, in {found.touched} of {found.documents} documents; the longest run: {found.example}",
            f"name another data set than the suite's in `{key}`, or report it all the same with `allow_overlap: true`",
        )


def _hashes(documents: list[np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
    """A 64-bit hash of every n-gram that lies within one document, and where it starts in all documents joined.

    A polynomial over random words of the ids, modulo 2⁶⁴: two of a million different n-grams collide with a probability
    of about 10⁻⁷.
    """
    import numpy as np

    joined = np.concatenate([np.zeros(0, dtype=np.int64), *documents]).astype(np.uint64)
    mixed = _mix(joined)
    count = max(len(joined) - n + 1, 0)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        total = total * np.uint64(0x9E3779B97F4A7C15) + mixed[offset : offset + count]
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    inside = np.ones(count, dtype=bool)
    for end in ends[:-1]:
        inside[max(end - n + 1, 0) : end] = False
    return total[inside], np.flatnonzero(inside)


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble uint64 values: the finalizer of SplitMix64 (Steele et al., 2014)."""
    import numpy as np

    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _example(
    covered: np.ndarray,
    owner: np.ndarray,
    lengths: np.ndarray,
    evaluation: list[np.ndarray],
    spell: Callable[[list[int]], str] | None,
) -> str:
    """The longest covered run within one document, cut after 20 tokens."""
    import numpy as np

    positions = np.flatnonzero(covered)
    breaks = np.flatnonzero((np.diff(positions) > 1) | (np.diff(owner[positions]) > 0)) + 1
    run = max(np.split(positions, breaks), key=len)
    document = int(owner[run[0]])
    begin = int(run[0] - lengths[:document].sum())
    where = f"{len(run)} in document {document + 1} from number {begin + 1}"
    if spell is None:
        return where
    return f"{where}: «{spell(evaluation[document][begin : begin + min(len(run), 20)].tolist())}»"
