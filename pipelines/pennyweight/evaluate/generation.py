"""Generated text, as it would be served: what multiple choice cannot see, since it never generates.

A candidate continues prompts greedily through its runtime's own decoding. The base reads the continuations: text that
it finds much more surprising than its own is broken, whatever the cause (weights, a cache, a kernel).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pennyweight.evaluate.divergence import likelihoods
from pennyweight.evaluate.evidence import Row
from pennyweight.runtimes import Session
from pennyweight.suite import GENERATION

_GRAM = 4


def continue_prompts(session: Session, prompts: np.ndarray, new_tokens: int, batch: int) -> np.ndarray:
    """Greedy continuations, int64 (prompts, new tokens)."""
    parts = [session.generate(prompts[i : i + batch], new_tokens).tokens for i in range(0, len(prompts), batch)]
    return np.concatenate(parts)


def judge(
    base: Session, tokenizer: Any, prompts: np.ndarray, continuations: np.ndarray, batch: int, first: int
) -> list[Row]:
    """One row a prompt; `first` is the number of the first prompt. `base` reads what was generated."""
    whole = np.concatenate([prompts, continuations], axis=1)
    nll = likelihoods(base, whole, batch)[:, prompts.shape[1] - 1 :]
    return [
        {
            "task": GENERATION,
            "doc_id": first + index,
            "doc_hash": f"{first + index}",
            "prompt": tokenizer.decode(prompt),
            "answer": tokenizer.decode(continuation),
            "surprise": float(nll[index].mean()),
            "repetition": repetition(continuation),
        }
        for index, (prompt, continuation) in enumerate(zip(prompts.tolist(), continuations.tolist()))
    ]


def repetition(tokens: list[int]) -> float:
    """Share of the 4-grams that came before in the same text, 0 … 1."""
    grams = [tuple(tokens[at : at + _GRAM]) for at in range(len(tokens) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
