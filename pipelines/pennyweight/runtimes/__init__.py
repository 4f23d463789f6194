"""Runtimes: checkpoint → candidate, and candidate → tokens and log-likelihoods. One file a runtime.

A runtime has two halves. `export` turns a checkpoint into files that the runtime loads; one that loads checkpoints as
they are has none. `load` gives a `Session`, the one small interface that evaluation and benchmarks use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pennyweight.recipe import RuntimeName
from pennyweight.records import Candidate, Checkpoint

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pennyweight.plan.sizes import ModelShape

#: `continuous`: a request joins those at work, whatever its length, and leaves with its last token. `waves`: requests
#: with prompts of one length are served together to the end of the longest answer, before others begin.
Batching = Literal["continuous", "waves"]
#: Requests that a session serves at once unless it is told otherwise.
MOST_AT_ONCE = 256


@dataclass(frozen=True)
class Generation:
    """Times of one wave of requests that were served together, in seconds."""

    ttft: float
    """From the call to the first token of every request."""
    steps: list[float]
    """Time of each later token, the same for all requests of the wave."""
    tokens: np.ndarray
    """int64 (requests, output tokens)."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen."""

    temperature: float = 0.0
    """0: always the likeliest."""
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    """Tell the log-probability of each token in the model's own distribution, and so many of the likeliest beside."""


GREEDY = Sampling()
#: Alternatives that `Sampling.logprobs` may ask for.
MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Scored:
    """What the model thought of one token."""

    logprob: float
    """In nats."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at its place with their log-probabilities, best first."""


@dataclass(frozen=True)
class Progress:
    """What one request got in one step."""

    request: int
    """Its number, from `Session.submit`."""
    tokens: list[int]
    """Those that are new."""
    at: float
    """When they were there, in seconds of `time.perf_counter`."""
    finished: bool
    scored: list[Scored] | None = None
    """For each of `tokens`, where the request asked for log-probabilities."""


@dataclass(frozen=True)
class Occupancy:
    """How busy a session is."""

    running: int
    """Requests at work; the others in flight wait."""
    cache: float | None
    """Share of its cache of keys and values that is in use; None where it keeps no account of it."""


@dataclass(frozen=True)
class Limits:
    """What a candidate's files say of the requests that it can serve."""

    context: int | None
    """Positions that the model knows; None where it does not say."""
    vocabulary: int
    token_bytes: int
    """Memory of each token of a request in flight: its keys and values."""
    prompt_bytes: int = 0
    """Memory of each token of a prompt while it is read, beside that."""


class Session(Protocol):
    """A loaded candidate. It belongs to one thread at a time."""

    context: int | None
    """Positions that the model knows; None where it does not say."""
    at_once: int
    """Requests that are served at once at most; the others wait. To be set before the first one."""

    @property
    def batching(self) -> Batching:
        """How requests are served together."""

    def logits(self, ids: np.ndarray) -> torch.Tensor:
        """Logits at every position.

        `ids`: int64 (batch, length), right-padded with any token: the models are causal, so what stands behind a
        position cannot change it. Returns float32 or bfloat16 (batch, length, vocabulary). The tensor may be reused by
        the next call.
        """

    def generate(self, ids: np.ndarray, new_tokens: int, stop: bool = False) -> Generation:
        """Greedy continuation of `ids`, int64 (requests, length), by `new_tokens` tokens each, served as a wave.

        The model's end-of-sequence token is not chosen, so that all waves are of one length; with `stop` it is, and the
        wave ends when every request has: what stands behind the token is then meaningless.
        """

    def objection(self, sampling: Sampling) -> str | None:
        """Why this session cannot choose tokens so; None where it can. May be asked from any thread."""

    def submit(self, ids: np.ndarray, new_tokens: int, stop: bool = False, sampling: Sampling = GREEDY) -> int:
        """Queue the continuation of `ids`, int64 (length,), by `new_tokens` tokens. Returns its number.

        With `stop` it may end earlier, with a token of `ends`.
        """

    def step(self) -> list[Progress]:
        """Go on with the requests in flight until some have a token more, or a part of their prompts is read.

        Raises what the engine raises; the requests in flight are then to be cancelled.
        """

    def abort(self, request: int) -> None:
        """Give up one request; nothing more is heard of it. One that is finished may be named too."""

    def occupancy(self) -> Occupancy:
        """How busy it was in the last step."""

    def ends(self) -> list[int]:
        """Tokens that end a sequence. May be asked from any thread once the session has generated."""

    def cancel(self) -> None:
        """Give up all requests that are not finished."""

    def forget_scorer(self) -> None:
        """Give back what `logits` alone needs. The next call makes it anew."""

    def close(self) -> None:
        """Give the memory back."""


@dataclass(frozen=True)
class RuntimeKind:
    version: int
    libraries: tuple[str, ...]
    export: Callable[[Checkpoint, str, Path], None] | None
    """(checkpoint, device, folder to write to); None where checkpoints are loaded as they are."""
    load: Callable[[Candidate, str], Session]
    """(candidate, device) → session."""
    compute_dtype: Callable[[Checkpoint, str], str]
    """(checkpoint, device) → dtype that activations are computed in."""
    limits: Callable[[Candidate], Limits]
    """Read from the candidate's files, before it is loaded."""
    sizes: Callable[[Path], tuple[int, int]] | None = None
    """Exported files → bytes of the weight files, and of the tensors in them."""
    quantized_tensors: Callable[[Path], int] | None = None
    """Exported files → how many of the tensors in them are quantized."""
    levers: Mapping[str, Callable[[Candidate, str, Candidate | None], Session]] = field(default_factory=dict)
    """Lever → (candidate, device, the candidate that proposes tokens) → a session with that lever on."""
    exact: bool = True
    """What is not quantized is computed in the dtype that `compute_dtype` says, the KV cache included."""
    streamed_bytes: Callable[[Candidate, ModelShape], int] | None = None
    """Bytes of weights that a decoding step cannot do without reading: not those of tables in which it looks up a row.
    None: all."""
    unpacks: bool = False
    """Quantized checkpoints are multiplied in floating point."""


def get(name: RuntimeName) -> RuntimeKind:
    """The runtime of that name. Imports it, and so the libraries that it needs only when it is used."""
    if name == "onnxruntime":
        from pennyweight.runtimes import onnxruntime as module
    elif name == "openvino":
        from pennyweight.runtimes import openvino as module
    else:
        from pennyweight.runtimes import transformers as module
    return module.RUNTIME


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of distributions, for store keys. A distribution that is not installed is left out."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def key(name: RuntimeName, device: str) -> dict[str, Any]:
    """What of a runtime and this machine changes the numbers that it computes."""
    from pennyweight import machine

    kind = get(name)
    return {
        "runtime": name,
        "version": kind.version,
        "libraries": versions(kind.libraries),
        "device": device,
        "isa": machine.fingerprint().get("isa"),
        "threads": machine.threads(),
    }
