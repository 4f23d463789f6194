"""A model in this process as a target: a thread has the session and serves whatever has been asked for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal

import numpy as np

from pennyweight.load.requests import Asked, Fault, Served
from pennyweight.runtimes import Progress, Session

#: Turns of the event loop in which a user who was answered has asked again: the answer, then the user.
SETTLING_TURNS = 3


@dataclass(frozen=True)
class Engine:
    """A loaded model, and how it is asked."""

    address: str
    model: str
    runtime: str
    batching: Literal["continuous", "waves"]
    session: Session
    vocabulary: int
    stop_at_eos: bool = False

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[EngineTarget]:
        target = EngineTarget(self)
        try:
            yield target
        finally:
            await target.close()


@dataclass
class _Request:
    asked: Asked
    served: Served
    done: asyncio.Future[None]


class EngineTarget:
    """An engine at work for one event loop. Its thread admits what has arrived, goes a step on, and notes the times."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._session = engine, engine.session
        self._loop = asyncio.get_running_loop()
        self._arrived: SimpleQueue[_Request | None] = SimpleQueue()
        self._running: dict[int, _Request] = {}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def serve(self, asked: Asked, due: float) -> Served:
        served = Served(due=due, sent=time.perf_counter(), input_tokens=len(asked.ids))
        request = _Request(asked, served, self._loop.create_future())
        self._arrived.put(request)
        await request.done
        return served

    async def close(self) -> None:
        """Give up what is still asked for, and let the thread end with its step. The loop runs on: it waits for it."""
        self._arrived.put(None)
        await asyncio.to_thread(self._thread.join)

    # What follows runs in the thread.

    def _work(self) -> None:
        answered = True
        while self._admit(answered):
            answered = bool(self._running) and self._advance()
        self._cancel()

    def _admit(self, answered: bool) -> bool:
        """Hand what has arrived to the session; where there is nothing to do, wait for it. False: there is no more.

        Users who were answered have the time to ask again, as otherwise the next wave would begin without them.
        """
        arrived = [] if self._running else [self._arrived.get()]
        if (answered or arrived) and None not in arrived:
            self._settle()
        while not self._arrived.empty():
            arrived.append(self._arrived.get())
        if None in arrived:
            return False
        for request in arrived:
            self._submit(request)
        return True

    def _settle(self) -> None:
        """Wait until the event loop has done what it has to do."""
        settled = threading.Event()

        def turn(left: int) -> None:
            if left:
                self._loop.call_soon(turn, left - 1)
            else:
                settled.set()

        self._loop.call_soon_threadsafe(turn, SETTLING_TURNS)
        settled.wait()

    def _submit(self, request: _Request) -> None:
        ids, new_tokens = np.array(request.asked.ids, np.int64), request.asked.output_tokens
        context = self._session.context
        if context is not None and len(ids) + new_tokens > context:
            reason = f"{len(ids)} tokens in and {new_tokens} out are more than the model's context of {context}"
            self._end(request, "failed", reason)
            return
        try:
            self._running[self._session.submit(ids, new_tokens, self._engine.stop_at_eos)] = request
        except Exception as error:
            self._end(request, "failed", f"{type(error).__name__}: {error}")

    def _advance(self) -> bool:
        """One step. Returns whether a request has ended in it."""
        try:
            made = self._session.step()
        except Exception as error:
            for request in self._running.values():
                self._end(request, "failed", f"{type(error).__name__}: {error}")
            self._cancel()
            return True
        for progress in made:
            self._note(progress)
        return any(progress.finished for progress in made)

    def _note(self, progress: Progress) -> None:
        request = self._running[progress.request]
        served = request.served
        if progress.tokens:
            served.arrivals.append(progress.at)
            served.output_tokens += len(progress.tokens)
        if not progress.finished:
            return
        del self._running[progress.request]
        if not served.output_tokens:
            self._end(request, "empty", "the answer has no tokens")
        elif served.output_tokens < request.asked.output_tokens and not self._engine.stop_at_eos:
            self._end(request, "dropped", f"the answer ended after {served.output_tokens} tokens")
        else:
            self._end(request)

    def _end(self, request: _Request, fault: Fault | None = None, message: str = "") -> None:
        request.served.fault, request.served.message = fault, message
        request.served.ended = time.perf_counter() if fault else request.served.arrivals[-1]
        self._loop.call_soon_threadsafe(_resolve, request.done)

    def _cancel(self) -> None:
        self._running.clear()
        with contextlib.suppress(Exception):  # a session that is broken says so at its next request
            self._session.cancel()


def _resolve(done: asyncio.Future[None]) -> None:
    if not done.cancelled():
        done.set_result(None)
