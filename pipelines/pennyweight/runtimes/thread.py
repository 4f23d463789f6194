"""A thread that has a session, and serves with it what an event loop asks for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

import numpy as np

from pennyweight.runtimes import GREEDY, Occupancy, Progress, Sampling, Session


@dataclass(eq=False)
class Job:
    """A request for a session thread."""

    ids: Sequence[int]
    new_tokens: int
    receive: Callable[[Progress | Exception], None]
    """Called in the event loop with what each step brought, or with what ended the request before its time."""
    stop: bool = False
    sampling: Sampling = GREEDY
    number: int | None = None
    """The session's, once it has been admitted."""


#: Called with how many requests ended in the last step, how many are still at work, and a count of those that have
#: arrived since; may wait for more.
Settle = Callable[[int, int, Callable[[], int]], None]


def _at_once(ended: int, running: int, arrived: Callable[[], int]) -> None:
    """Wait for nobody."""


class SessionThread:
    """A session at work for the event loop that is running. The thread admits what has arrived, goes a step on, and
    hands what that brought to the loop, all of a step in one call.

    `settle` is called in the thread before requests are admitted, where it had nothing to do or one has ended.
    """

    def __init__(self, session: Session, settle: Settle = _at_once) -> None:
        self.occupancy = Occupancy(0, None)
        """After the last step."""
        self._session, self._settle = session, settle
        self._loop = asyncio.get_running_loop()
        self._arrived: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._running: dict[int, Job] = {}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._arrived.put(partial(self._submit, job))

    def abort(self, job: Job) -> None:
        """Give up a job, in whatever state it is. It may still receive what was under way."""
        self._arrived.put(partial(self._abort, job))

    async def close(self) -> None:
        """Give up all jobs, and let the thread end with its step."""
        self._arrived.put(None)
        await asyncio.to_thread(self._thread.join)

    # What follows runs in the thread.

    def _work(self) -> None:
        ended = 0
        while self._admit(ended):
            ended = self._advance() if self._running else 0
        self._cancel()

    def _admit(self, ended: int) -> bool:
        """Hand what has arrived to the session; where there is nothing to do, wait for it. False: there is no more."""
        arrived = [] if self._running else [self._arrived.get()]
        if (ended or arrived) and None not in arrived:
            self._settle(ended, len(self._running), lambda: len(arrived) + self._arrived.qsize())
        while not self._arrived.empty():
            arrived.append(self._arrived.get())
        if None in arrived:
            return False
        for action in arrived:
            action()
        return True

    def _submit(self, job: Job) -> None:
        try:
            job.number = self._session.submit(np.array(job.ids, np.int64), job.new_tokens, job.stop, job.sampling)
        except Exception as error:
            self._hand_over([(job, error)])
        else:
            self._running[job.number] = job

    def _abort(self, job: Job) -> None:
        if job.number is not None and self._running.pop(job.number, None):
            self._session.abort(job.number)

    def _advance(self) -> int:
        """One step. Returns how many requests have ended in it."""
        try:
            made = self._session.step()
            self.occupancy = self._session.occupancy()
        except Exception as error:
            failed = [(job, error) for job in self._running.values()]
            self._hand_over(failed)
            self._cancel()
            return len(failed)
        self._hand_over([(self._running[progress.request], progress) for progress in made])
        ended = [progress.request for progress in made if progress.finished]
        for number in ended:
            del self._running[number]
        return len(ended)

    def _hand_over(self, brought: list[tuple[Job, Progress | Exception]]) -> None:
        self._loop.call_soon_threadsafe(_receive, brought)

    def _cancel(self) -> None:
        self._running.clear()
        self.occupancy = Occupancy(0, None)
        with contextlib.suppress(Exception):  # a session that is broken says so at its next request
            self._session.cancel()


def _receive(brought: list[tuple[Job, Progress | Exception]]) -> None:
    for job, news in brought:
        job.receive(news)
