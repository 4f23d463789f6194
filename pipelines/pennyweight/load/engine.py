"""A model in this process as a target: a thread has the session and serves whatever has been asked for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pennyweight.load.requests import Asked, Fault, Served
from pennyweight.records import Candidate
from pennyweight.runtimes import Batching, Progress, Session
from pennyweight.runtimes.thread import Job, SessionThread

#: Turns of the event loop in which a user who was answered has asked again: the answer, then the user.
SETTLING_TURNS = 3


@dataclass(frozen=True)
class Engine:
    """A loaded model, and how it is asked."""

    address: str
    model: str
    runtime: str
    batching: Batching
    session: Session
    vocabulary: int
    stop_at_eos: bool = False
    candidate: Candidate | None = None
    """What was loaded."""

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[EngineTarget]:
        target = EngineTarget(self)
        try:
            yield target
        finally:
            await target.close()


class EngineTarget:
    """An engine at work for one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._thread = SessionThread(engine.session, self._settle)

    async def serve(self, asked: Asked, due: float) -> Served:
        served = Served(due=due, sent=time.perf_counter(), input_tokens=len(asked.ids))
        context = self._engine.session.context
        if context is not None and len(asked.ids) + asked.output_tokens > context:
            reason = f"{len(asked.ids)} tokens in and {asked.output_tokens} out are more than the model's context of"
            _end(served, "failed", f"{reason} {context}")
            await asyncio.sleep(0)  # others have their turn, even where all requests are too long
            return served
        done: asyncio.Future[None] = self._loop.create_future()

        def receive(news: Progress | Exception) -> None:
            if self._note(news, asked, served) and not done.cancelled():
                done.set_result(None)

        job = Job(asked.ids, asked.output_tokens, receive, self._engine.stop_at_eos)
        self._thread.submit(job)
        try:
            await done
        except asyncio.CancelledError:
            self._thread.abort(job)
            raise
        return served

    async def close(self) -> None:
        """Give up what is still asked for, and let the thread end with its step. The loop runs on: it waits for it."""
        await self._thread.close()

    def _note(self, news: Progress | Exception, asked: Asked, served: Served) -> bool:
        """Note what a request has got. Returns whether it has ended."""
        if isinstance(news, Exception):
            _end(served, "failed", f"{type(news).__name__}: {news}")
            return True
        if news.tokens:
            served.arrivals.append(news.at)
            served.output_tokens += len(news.tokens)
        if news.finished:
            if not served.output_tokens:
                _end(served, "empty", "the answer has no tokens")
            elif served.output_tokens < asked.output_tokens and not self._engine.stop_at_eos:
                _end(served, "dropped", f"the answer ended after {served.output_tokens} tokens")
            else:
                _end(served)
        return news.finished

    def _settle(self, ended: int, running: int, arrived: Callable[[], int]) -> None:
        """Wait until the event loop has done what it has to do: users who were answered have the time to ask again, as
        otherwise the next wave would begin without them."""
        settled = threading.Event()

        def turn(left: int) -> None:
            if left:
                self._loop.call_soon(turn, left - 1)
            else:
                settled.set()

        self._loop.call_soon_threadsafe(turn, SETTLING_TURNS)
        settled.wait()


def _end(served: Served, fault: Fault | None = None, message: str = "") -> None:
    served.fault, served.message = fault, message
    served.ended = time.perf_counter() if fault else served.arrivals[-1]
