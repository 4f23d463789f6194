"""Whether a loaded candidate may be served: it answers, and says what the gate judged."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from pennyweight import runtimes
from pennyweight.errors import StageError
from pennyweight.probe import confirm
from pennyweight.recipe import RuntimeName
from pennyweight.records import Candidate
from pennyweight.runtimes import Sampling, Session
from pennyweight.tracking.evidence import probe_in

#: Tokens of the smoke prompt, and of its answer.
PROMPT_TOKENS, ANSWER_TOKENS = 8, 4


def check(candidate: Candidate, session: Session) -> str | None:
    """Answer a smoke prompt; and where evidence of a gate lies beside the candidate's files, say what was judged.

    Returns how well it did that, None where nothing is known to ask. Raises StageError. The session must have nothing
    else to do.
    """
    answer(candidate, session)
    probe = probe_in(Path(candidate.path))
    if probe is None:
        return None
    trial = confirm(candidate, session, probe)
    session.forget_scorer()
    return trial.describe()


def answer(candidate: Candidate, session: Session) -> None:
    """Answer on the very path that requests take: every token in the vocabulary, every log-probability finite."""
    name: RuntimeName = candidate.runtime  # type: ignore[assignment]
    vocabulary = runtimes.get(name).limits(candidate).vocabulary
    prompt = np.linspace(0, vocabulary - 1, PROMPT_TOKENS + 2)[1:-1].astype(np.int64)
    number = session.submit(prompt, ANSWER_TOKENS, sampling=Sampling(logprobs=0))
    tokens: list[int] = []
    logprobs: list[float] = []
    finished = False
    while not finished:
        for progress in session.step():
            assert progress.request == number
            tokens += progress.tokens
            logprobs += [scored.logprob for scored in progress.scored or []]
            finished = progress.finished
    if len(tokens) != ANSWER_TOKENS or not all(0 <= token < vocabulary for token in tokens):
        raise StageError(f"{candidate.id} answers a smoke prompt with tokens {tokens}")
    if len(logprobs) != ANSWER_TOKENS or not all(math.isfinite(value) and value <= 1e-3 for value in logprobs):
        raise StageError(f"{candidate.id} gives the tokens of a smoke prompt log-probabilities {logprobs}")
