"""How far a candidate's predictions are from the base's, token by token, on held-out text.

The base is run once: its final hidden states and its head are kept, a hundredth of the bytes of its log-probabilities,
and give the same log-probabilities back for every candidate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pennyweight.errors import StageError
from pennyweight.records import MetricValue

if TYPE_CHECKING:
    import torch

    from pennyweight.runtimes import Session

REFERENCE_FILE = "reference.safetensors"
#: Positions compared at once: rows × vocabulary × 4 bytes should stay in the processor's cache.
CHUNK = 64


@dataclass(frozen=True)
class TokenDivergence:
    """Per-token comparison of one candidate with the base; arrays of shape (windows, length)."""

    kl: np.ndarray
    """KL(base ‖ candidate) in nats."""
    agree: np.ndarray
    """Whether both rank the same token first."""
    nll: np.ndarray
    """Negative log-likelihood of the next token under the candidate, (windows, length − 1)."""
    nll_base: np.ndarray


def write_reference(session: Any, windows: np.ndarray, batch: int, files: Path) -> None:
    """Keep what gives the base's log-probabilities on `windows`, int64 (windows, length).

    `session` is a transformers session. Raises StageError where the logits are not the head applied to the last hidden
    states, as for models that scale or cap them.
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
    tensors = {"states": states.contiguous(), "head": head.weight.detach().cpu().contiguous()}
    save_file(tensors, files / REFERENCE_FILE)


def compare(session: Session, windows: np.ndarray, batch: int, reference: Path) -> TokenDivergence:
    """Score `windows` with a candidate and compare with the base, position by position."""
    import torch
    from safetensors.torch import load_file

    stored = load_file(reference / REFERENCE_FILE)
    head, states = stored["head"], stored["states"]
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
                    base = torch.log_softmax((states[row, span] @ head.T).float(), -1)
                    ours = torch.log_softmax(scores[span].float().cpu(), -1)
                    kl[row, span], agree[row, span] = token_kl(base, ours), base.argmax(-1) == ours.argmax(-1)
                    known = min(span.stop, length - 1) - at  # the last position has no next token
                    following = targets[row, at + 1 : at + 1 + known, None]
                    nll[row, at : at + known] = -ours[:known].gather(-1, following)[:, 0]
                    nll_base[row, at : at + known] = -base[:known].gather(-1, following)[:, 0]
    return TokenDivergence(kl.numpy(), agree.numpy(), nll.numpy(), nll_base.numpy())


def reference_nll(windows: np.ndarray, reference: Path) -> np.ndarray:
    """Negative log-likelihood of each next token under the base, (windows, length − 1)."""
    import torch
    from safetensors.torch import load_file

    stored = load_file(reference / REFERENCE_FILE)
    nll = torch.empty(windows.shape[0], windows.shape[1] - 1)
    with torch.inference_mode():
        for row, tokens in enumerate(torch.from_numpy(windows)):
            for at in range(0, nll.shape[1], CHUNK):
                span = slice(at, min(at + CHUNK, nll.shape[1]))
                scores = torch.log_softmax((stored["states"][row, span] @ stored["head"].T).float(), -1)
                nll[row, span] = -scores.gather(-1, tokens[span.start + 1 : span.stop + 1, None])[:, 0]
    return nll.numpy()


def token_kl(base: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """KL(base ‖ candidate) in nats of each row of log-probabilities, (rows, vocabulary) → (rows,).

    Never below 0: rounding can leave −1e-8 for equal rows.
    """
    return (base.exp() * (base - candidate)).sum(-1).clamp_min(0)


def metrics(tokens: TokenDivergence) -> dict[str, MetricValue]:
    """The suite's divergence metrics. Standard errors take each window as one draw: its tokens are not independent."""
    n = tokens.kl.size
    perplexity = math.exp(tokens.nll.mean())
    perplexity_base = math.exp(tokens.nll_base.mean())
    gap = (tokens.nll - tokens.nll_base).mean(axis=1)
    ratio = math.exp(gap.mean())
    return {
        "kl_mean": MetricValue(
            value=float(tokens.kl.mean()), stderr=_stderr(tokens.kl.mean(axis=1)), n=n, base=0.0,
            delta=float(tokens.kl.mean()), higher_is_better=False,
        ),
        "kl_p99": MetricValue(
            value=float(np.quantile(tokens.kl, 0.99)), n=n, base=0.0, delta=float(np.quantile(tokens.kl, 0.99)),
            higher_is_better=False,
        ),
        "top1_agreement": MetricValue(
            value=float(tokens.agree.mean()), stderr=_stderr(tokens.agree.mean(axis=1)), n=n, base=1.0,
            delta=float(tokens.agree.mean()) - 1.0, higher_is_better=True,
        ),
        "perplexity": MetricValue(
            value=perplexity, stderr=_times(perplexity, _stderr(tokens.nll.mean(axis=1))), n=tokens.nll.size,
            base=perplexity_base, delta=perplexity - perplexity_base, higher_is_better=False,
        ),
        "perplexity_ratio": MetricValue(
            value=ratio, stderr=_times(ratio, _stderr(gap)), n=tokens.nll.size, base=1.0, delta=ratio - 1.0,
            delta_stderr=_times(ratio, _stderr(gap)), higher_is_better=False,
        ),
    }  # fmt: skip


def _stderr(values: np.ndarray) -> float | None:
    """Standard error of a mean of independent values."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _times(value: float, stderr: float | None) -> float | None:
    """Delta method for exp: the standard error of exp(x) is exp(x) times that of x."""
    return None if stderr is None else value * stderr
