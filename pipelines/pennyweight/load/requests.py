"""One request: what is asked, and when its tokens came."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol

#: What can go wrong with a request that was sent.
Fault = Literal["refused", "status", "stalled", "dropped", "garbage", "empty", "failed", "cancelled"]


@dataclass(frozen=True)
class Asked:
    prompt: str
    input_tokens: int
    """Tokens that the prompt was cut to; the server's own count is in `Served`."""
    output_tokens: int
    at: float | None = None
    """Seconds after the start at which it arrives; None in a closed loop, where it follows another's end."""
    ids: tuple[int, ...] = ()
    """The prompt's tokens, where a tokenizer cut it."""


@dataclass
class Served:
    """What became of one request. Times are seconds on one monotonic clock."""

    due: float
    """When it should have been sent. In an open loop the wait of a busy client counts, as a user's would."""
    sent: float
    ended: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    arrivals: list[float] = field(default_factory=list)
    """When each piece of text came. A server may put several tokens into one."""
    fault: Fault | None = None
    message: str = ""

    @property
    def good(self) -> bool:
        return self.fault is None

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.arrivals[0] - self.due

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None for a single token."""
        if self.output_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)

    @property
    def latency(self) -> float:
        """End to end."""
        return self.ended - self.due


class Target(Protocol):
    """Something that serves requests, in one event loop."""

    async def serve(self, asked: Asked, due: float) -> Served:
        """Serve one request to its end. What goes wrong with it is told in the answer, not raised."""


class Place(Protocol):
    """Where requests are served: a server, or a model in this process."""

    address: str
    """As the command line names it."""
    model: str
    runtime: str | None
    """Of a model in this process."""
    batching: str | None
    """How that runtime batches."""

    def connect(self) -> AbstractAsyncContextManager[Target]: ...
