"""What the winner said of a little text when it was judged, asked again of the files that are about to be served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ConfigDict, Field

from pennyweight import doctor, installed, machine, runtimes
from pennyweight.errors import PennyweightError, StageError, UsageError
from pennyweight.records import Candidate, Probe, Record

if TYPE_CHECKING:
    from pennyweight.runtimes import Session

#: Windows of text that are asked again, and tokens of each at most.
WINDOWS, LENGTH = 2, 256
#: Nats per token where runtime, libraries, device and instruction set are those that judged: batches alone differ.
SAME_ENGINE_TOLERANCE = 0.001
#: Tokens of the smoke prompt, and of its answer at most.
PROMPT, ANSWER = 32, 16
#: Nats that an answer's token may lie below the best one, scored alone: batching and caches change low bits.
ANSWER_GAP = 0.5


class UnavailableError(UsageError):
    """What a candidate was judged in is not on this machine."""


class Trial(Record):
    """What loaded files said to a probe."""

    model_config = ConfigDict(extra="ignore")  # histories outlive versions of this program

    tokens: int = Field(description="compared with the judged ones")
    divergence: float = Field(
        description="nats per token from what was judged: half the mean squared difference of the tokens' "
        "log-probabilities"
    )
    delta_mean: float = Field(description="mean |Δ log p|, nats")
    delta_max: float = Field(description="largest |Δ log p|, nats")
    tolerance: float = Field(description="of the divergence")
    same_engine: bool = Field(description="runtime, libraries, device and instruction set are those that judged")
    answer_tokens: int = Field(description="of the answer to the smoke prompt")
    answer_gap: float = Field(description="most that one of them lies below the best token, scored alone, nats")

    def describe(self) -> str:
        engine = "the engine that judged" if self.same_engine else "another engine or machine than judged"
        return (
            f"{round(self.divergence, 6):g} of {self.tolerance:g} nats per token on {self.tokens} tokens, in {engine}; "
            f"answered a prompt with {self.answer_tokens} tokens"
        )


def take(text: str, windows: np.ndarray, nll: np.ndarray, engine: Mapping[str, Any], tolerance: float) -> Probe:
    """The first windows of a text, int64 (windows, length), with the negative log-likelihoods of what follows, float
    (windows, length − 1), that a candidate gave in `engine` (`runtimes.key`)."""
    kept = windows[:WINDOWS, :LENGTH]
    log_probs = -nll[:WINDOWS, : kept.shape[1] - 1].astype(float)
    return Probe(
        text=text,
        windows=kept.tolist(),
        log_probs=np.round(log_probs, 6).tolist(),
        engine=dict(engine),
        tolerance=tolerance,
        same_engine_tolerance=SAME_ENGINE_TOLERANCE,
    )


def check_available(candidate: Candidate, device: str) -> None:
    """Raise UnavailableError where this machine lacks the runtime or the device that a candidate was judged in."""
    if missing := installed.missing_packages(candidate.runtime, device):
        raise UnavailableError(
            f"{candidate.id} cannot be tried here: {candidate.runtime} is not installed, it needs {', '.join(missing)}",
            doctor.how_to_get(candidate.runtime, device),
        )
    if device == "cuda" and not machine.has_gpu():
        raise UnavailableError(
            f"{candidate.id} cannot be tried here: it was judged on a GPU, and this machine has none",
            "run the command on a machine like the one that serves it",
        )


def try_out(candidate: Candidate, probe: Probe) -> Trial:
    """Load a candidate in the runtime that it was judged in, and `confirm` it.

    Raises UnavailableError where its runtime is not on this machine, StageError where it cannot be loaded or confirmed.
    """
    device = probe.engine["device"]
    check_available(candidate, device)
    session = None
    try:
        session = runtimes.get(candidate.runtime).load(candidate, device)
        return confirm(candidate, session, probe)
    except PennyweightError:
        raise
    except Exception as error:  # engines raise whatever a file makes them trip over
        reason = next(iter(str(error).splitlines()), "")
        raise StageError(
            f"{candidate.id} cannot be served by {candidate.runtime}: {type(error).__name__}: {reason}"
        ) from error
    finally:
        if session is not None:
            session.close()


def confirm(candidate: Candidate, session: Session, probe: Probe) -> Trial:
    """Ask a loaded candidate the probe, and let it answer a prompt. The session must have nothing else to do.

    Raises StageError where it does not say what was judged, or does not answer.
    """
    differences = ask(session, probe)
    tokens, gap = answer(session, np.array(probe.windows[0], np.int64))
    same = runtimes.key(candidate.runtime, probe.engine["device"]) == probe.engine
    trial = Trial(
        tokens=differences.size,
        divergence=float((differences**2).mean() / 2),
        delta_mean=float(np.abs(differences).mean()),
        delta_max=float(np.abs(differences).max()),
        tolerance=probe.same_engine_tolerance if same else probe.tolerance,
        same_engine=same,
        answer_tokens=tokens,
        answer_gap=gap,
    )
    _refuse(candidate, trial)
    return trial


def ask(session: Session, probe: Probe) -> np.ndarray:
    """Log-probability of each token of the probe's windows less what was judged, (tokens,).

    To second order KL(judged ‖ loaded) is half the mean square of these, the tokens being drawn from what was judged
    (Kullback, Information Theory and Statistics, 1959, chapter 2).
    """
    from pennyweight.evaluate.divergence import likelihoods

    windows = np.array(probe.windows, np.int64)
    found = -likelihoods(session, windows, len(windows)).astype(float)
    return (found - np.array(probe.log_probs)).ravel()


def answer(session: Session, window: np.ndarray) -> tuple[int, float]:
    """Continue a window's first tokens: how many tokens came, and the most that one lies below the best token when the
    whole is scored at once, in nats."""
    import torch

    prompt = window[:PROMPT]
    said = session.generate(prompt[None], ANSWER, stop=True).tokens[0]
    if not len(said):
        return 0, 0.0
    with torch.inference_mode():
        scores = torch.log_softmax(session.logits(np.concatenate([prompt, said])[None])[0].float().cpu(), -1)
    scores = scores[len(prompt) - 1 : -1]
    gaps = scores.max(-1).values - scores.gather(-1, torch.from_numpy(said)[:, None])[:, 0]
    return len(said), gaps.max().item()


def _refuse(candidate: Candidate, trial: Trial) -> None:
    if not trial.divergence <= trial.tolerance:
        raise StageError(
            f"{candidate.id} does not say here what the gate judged: {trial.divergence:.3g} nats per token from it on "
            f"{trial.tokens} tokens, {trial.tolerance:g} are allowed",
            "its runtime computes otherwise on this machine: `pennyweight doctor`; or run the recipe here",
        )
    if not trial.answer_tokens:
        raise StageError(f"{candidate.id} does not answer a prompt: no token came")
    if not trial.answer_gap <= ANSWER_GAP:
        raise StageError(
            f"{candidate.id} answers a prompt with tokens that it would not choose: one lies {trial.answer_gap:.3g} "
            f"nats below the best, {ANSWER_GAP:g} are allowed",
            "the half of its runtime that generates does not compute what the half that scores does",
        )
