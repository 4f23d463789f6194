"""How far a candidate's predictions are from the base's, token by token, on held-out text.

The base is run once: its final hidden states and its head are kept, a hundredth of the bytes of its log-probabilities,
and give the same log-probabilities back for every candidate.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pennyweight.errors import StageError
from pennyweight.evaluate.evidence import ScoredText

if TYPE_CHECKING:
    import torch

    from pennyweight.runtimes import Session

STATES_FILE = "states.safetensors"
HEAD_FILE = "head.safetensors"
#: Positions compared at once: rows × vocabulary × 4 bytes should stay in the processor's cache.
CHUNK = 64


def write_states(session: Any, windows: np.ndarray, batch: int, path: Path) -> None:
    """Keep the base's final hidden states on `windows`, int64 (windows, length). `session` is a transformers session.

    Raises StageError where the logits are not the head applied to them, as for models that scale or cap their logits.
    """
    import torch
    from safetensors.torch import save_file

    parts = [session.hidden_states(windows[i : i + batch]).cpu() for i in range(0, len(windows), batch)]
    states = torch.cat(parts)
    head = session.head()
    with torch.inference_mode():
        direct = session.logits(windows[:1])[0, :CHUNK].float().cpu()
        again = head(states[0, :CHUNK].to(head.weight.device)).float().cpu()
    if not torch.allclose(direct, again, atol=0.05, rtol=0.02):
        raise StageError(
            "this model's logits are more than its head applied to its last hidden states",
            "models that cap or scale their logits cannot be a base yet",
        )
    save_file({"states": states.contiguous()}, path)


def write_head(session: Any, path: Path) -> None:
    """Keep the base's head: hidden state → logits."""
    from safetensors.torch import save_file

    save_file({"head": session.head().weight.detach().cpu().contiguous()}, path)


class Reference:
    """The base's log-probabilities on some windows, made again from its hidden states."""

    def __init__(self, states: Path, head: Path):
        from safetensors.torch import load_file

        self._states, self._head = load_file(states)["states"], load_file(head)["head"]

    def log_probabilities(self, row: int, span: slice) -> torch.Tensor:
        """float32 (positions, vocabulary)."""
        import torch

        return torch.log_softmax((self._states[row, span] @ self._head.T).float(), -1)


def compare(
    session: Session, windows: np.ndarray, documents: np.ndarray, batch: int, reference: Reference
) -> ScoredText:
    """Score `windows` with a candidate and compare with the base, position by position."""
    import torch

    count, length = windows.shape
    targets = torch.from_numpy(windows)
    kl, agree = torch.empty(count, length), torch.empty(count, length, dtype=torch.bool)
    nll, nll_base = torch.empty(count, length - 1), torch.empty(count, length - 1)
    with torch.inference_mode():
        for start in range(0, count, batch):
            logits = session.logits(windows[start : start + batch])
            for row, scores in enumerate(logits, start):
                for at in range(0, length, CHUNK):
                    span = slice(at, min(at + CHUNK, length))
                    base = reference.log_probabilities(row, span)
                    ours = torch.log_softmax(scores[span].float().cpu(), -1)
                    kl[row, span], agree[row, span] = token_kl(base, ours), base.argmax(-1) == ours.argmax(-1)
                    known = min(span.stop, length - 1) - at  # the last position has no next token
                    following = targets[row, at + 1 : at + 1 + known, None]
                    nll[row, at : at + known] = -ours[:known].gather(-1, following)[:, 0]
                    nll_base[row, at : at + known] = -base[:known].gather(-1, following)[:, 0]
    return ScoredText(nll.numpy(), nll_base.numpy(), documents, kl.numpy(), agree.numpy())


def same(windows: np.ndarray, documents: np.ndarray, reference: Reference) -> ScoredText:
    """The base against itself: no divergence, by definition."""
    import torch

    nll = torch.empty(windows.shape[0], windows.shape[1] - 1)
    with torch.inference_mode():
        for row, tokens in enumerate(torch.from_numpy(windows)):
            for at in range(0, nll.shape[1], CHUNK):
                span = slice(at, min(at + CHUNK, nll.shape[1]))
                scores = reference.log_probabilities(row, span)
                nll[row, span] = -scores.gather(-1, tokens[span.start + 1 : span.stop + 1, None])[:, 0]
    nothing = np.zeros(windows.shape, np.float32)
    return ScoredText(nll.numpy(), nll.numpy(), documents, nothing, np.ones(windows.shape, bool))


def likelihoods(session: Session, windows: np.ndarray, batch: int) -> np.ndarray:
    """Negative log-likelihood of each next token, float32 (windows, length − 1)."""
    import torch

    parts = []
    with torch.inference_mode():
        for start in range(0, len(windows), batch):
            chosen = windows[start : start + batch]
            for tokens, logits in zip(torch.from_numpy(chosen), session.logits(chosen)):
                found = [
                    -torch.log_softmax(logits[at : at + CHUNK].float().cpu(), -1).gather(
                        -1, tokens[at + 1 : at + 1 + CHUNK, None]
                    )[:, 0]
                    for at in range(0, len(tokens) - 1, CHUNK)
                ]
                parts.append(torch.cat(found).numpy())
    return np.stack(parts)


def token_kl(base: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """KL(base ‖ candidate) in nats of each row of log-probabilities, (rows, vocabulary) → (rows,).

    Never below 0: rounding can leave −1e-8 for equal rows.
    """
    return (base.exp() * (base - candidate)).sum(-1).clamp_min(0)
