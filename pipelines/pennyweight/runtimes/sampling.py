"""Choosing tokens from logits, for runtimes whose engine does not: by temperature and top-p, with log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pennyweight.runtimes import Sampling, Scored


class Chooser:
    """Chooses the next token of every request of a wave, each by its own `Sampling` and from a stream of its own: with
    its seed it draws the same numbers whatever else is in the wave.

    `never`: tokens that are not chosen, whatever their logits.
    """

    def __init__(self, samplings: Sequence[Sampling], never: Sequence[int]) -> None:
        self._samplings, self._never = samplings, list(never)
        self._streams = [np.random.default_rng(None if s.seed is None else s.seed % 2**64) for s in samplings]
        self.scored: list[Scored | None] = [None] * len(samplings)
        """Of the tokens chosen last, for the requests that asked."""

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """`logits`: float (requests, vocabulary). Returns int64 (requests,)."""
        tokens = np.empty(len(logits), np.int64)
        for number, (row, sampling, stream) in enumerate(zip(logits, self._samplings, self._streams)):
            allowed = row.astype(np.float32)  # a copy
            allowed[self._never] = -np.inf
            tokens[number] = choose(allowed, sampling.temperature, sampling.top_p, stream)
            if sampling.logprobs is not None:
                self.scored[number] = score(row, int(tokens[number]), sampling.logprobs)
        return tokens


def choose(logits: np.ndarray, temperature: float, top_p: float, stream: np.random.Generator) -> int:
    """One token by its logits (vocabulary,): the likeliest at temperature 0; else drawn from softmax(logits /
    temperature), of which only the fewest likeliest tokens are kept that have `top_p` together (Holtzman et al., 2020,
    https://arxiv.org/abs/1904.09751)."""
    if temperature == 0:
        return int(logits.argmax())
    shifted = (logits - logits.max()).astype(np.float64) / temperature
    chances = np.exp(shifted)
    chances /= chances.sum()
    if top_p < 1:
        # Those below (1 - top_p) / vocabulary have less than 1 - top_p together, so that none of them can be kept.
        order = np.flatnonzero(chances > (1 - top_p) / len(chances))
        order = order[np.argsort(-chances[order], kind="stable")]
        kept = order[: int(np.searchsorted(np.cumsum(chances[order]), top_p)) + 1]
    else:
        kept = np.arange(len(chances))
    sums = np.cumsum(chances[kept])
    place = int(np.searchsorted(sums, stream.random() * sums[-1], side="right"))
    return int(kept[min(place, len(kept) - 1)])


def score(logits: np.ndarray, token: int, top: int) -> Scored:
    """The log-probability of `token` under softmax(logits), and the `top` likeliest tokens with theirs."""
    shifted = logits.astype(np.float64) - logits.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    best = np.argpartition(-logprobs, top - 1)[:top] if top else np.array([], np.int64)
    best = best[np.argsort(-logprobs[best], kind="stable")]
    return Scored(float(logprobs[token]), tuple((int(each), float(logprobs[each])) for each in best))
