"""Static batching: a wave of requests is served together to its end, before others begin."""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pennyweight.runtimes import GREEDY, MOST_AT_ONCE, Batching, Generation, Occupancy, Progress, Sampling

if TYPE_CHECKING:
    import numpy as np

    from pennyweight.runtimes.sampling import Chooser

#: Logits, float (requests, vocabulary) → the token of each, int64 (requests,).
Choose = Callable[["np.ndarray"], "np.ndarray"]


@dataclass
class Request:
    """One in flight."""

    number: int
    ids: np.ndarray
    left: int
    """Tokens that it still gets; 0: it is finished."""
    stop: bool
    sampling: Sampling

    @property
    def kind(self) -> tuple[int, bool]:
        """Only requests of one kind share a wave."""
        return len(self.ids), self.stop


class Waves(ABC):
    """The generating half of a session on an engine that serves one wave at a time, all prompts of one length.

    A wave runs until its longest answer is complete; a request in it is finished when its own is.
    """

    at_once = MOST_AT_ONCE

    @property
    def batching(self) -> Batching:
        return "waves"

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._waiting: list[Request] = []
        self._wave: list[Request] = []
        self._columns: Iterator[np.ndarray] = iter(())
        self._chooser: Chooser | None = None

    def forget_scorer(self) -> None:
        return  # one model does both, unless the engine says otherwise

    @abstractmethod
    def columns(
        self, ids: np.ndarray, new_tokens: int, stop: bool, choose: Choose | None = None
    ) -> Iterator[np.ndarray]:
        """Continue `ids`, int64 (requests, length): `new_tokens` times the next token of each, (requests,).

        `choose` chooses them; without it they are the likeliest, and the model's end-of-sequence token is chosen with
        `stop` alone. With `stop` there may be fewer.
        """

    @abstractmethod
    def ends(self) -> list[int]:
        """Tokens that end a sequence."""

    def generate(self, ids: np.ndarray, new_tokens: int, stop: bool = False) -> Generation:
        import numpy as np

        going = np.ones(len(ids), bool)
        tokens: list[np.ndarray] = []
        columns = self.columns(ids, new_tokens, stop)
        moments = [time.perf_counter()]
        for column in columns:
            moments.append(time.perf_counter())
            tokens.append(column)
            if stop:
                going &= ~np.isin(column, self.ends())
                if not going.any():
                    break
        times = np.diff(moments).tolist()
        return Generation(times[0], times[1:], np.stack(tokens, 1).astype(np.int64))

    def objection(self, sampling: Sampling) -> str | None:
        return None

    def submit(self, ids: np.ndarray, new_tokens: int, stop: bool = False, sampling: Sampling = GREEDY) -> int:
        request = Request(next(self._numbers), ids, new_tokens, stop, sampling)
        self._waiting.append(request)
        return request.number

    def step(self) -> list[Progress]:
        """The next token of all requests in the wave; of a new wave where none is at work."""
        if not self._wave:
            self._begin()
        column = next(self._columns, None)
        now = time.perf_counter()
        found = []
        for row, request in enumerate(self._wave):
            if not request.left:
                continue
            tokens = [] if column is None else [int(column[row])]
            scored = self._chooser.scored[row] if self._chooser else None
            request.left -= 1
            if column is None or (request.stop and tokens[0] in self.ends()):
                request.left = 0
            found.append(
                Progress(request.number, tokens, now, not request.left, [scored] if tokens and scored else None)
            )
        self._end_if_done()
        return found

    def abort(self, request: int) -> None:
        """One that waits is forgotten; one in the wave keeps its row until the wave ends, unheard."""
        self._waiting = [waiting for waiting in self._waiting if waiting.number != request]
        for member in self._wave:
            if member.number == request:
                member.left = 0
        self._end_if_done()

    def occupancy(self) -> Occupancy:
        return Occupancy(sum(request.left > 0 for request in self._wave), None)

    def cancel(self) -> None:
        self._waiting, self._wave, self._columns = [], [], iter(())

    def _begin(self) -> None:
        """Make a wave of the oldest request and all of its kind, up to `at_once`."""
        import numpy as np

        kind = self._waiting[0].kind
        self._wave = [request for request in self._waiting if request.kind == kind][: self.at_once]
        chosen = {request.number for request in self._wave}
        self._waiting = [request for request in self._waiting if request.number not in chosen]
        longest = max(request.left for request in self._wave)
        ids = np.stack([request.ids for request in self._wave])
        samplings = [request.sampling for request in self._wave]
        if all(sampling.temperature == 0 and sampling.logprobs is None for sampling in samplings):
            self._chooser, self._columns = None, self.columns(ids, longest, kind[1])
            return
        from pennyweight.runtimes.sampling import Chooser

        self._chooser = Chooser(samplings, never=() if kind[1] else self.ends())
        self._columns = self.columns(ids, longest, kind[1], self._chooser)

    def _end_if_done(self) -> None:
        if not any(request.left for request in self._wave):
            self._wave, self._columns = [], iter(())
