"""Many requests in flight: a closed loop of so many users, or an open one with arrivals of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from pennyweight.load.requests import Asked, Served, Target
from pennyweight.load.steady import ALPHA, drift

#: Requests that must have failed, with none served, before a target is given up.
HOPELESS = 5
#: Seconds between two looks at how many requests are in flight.
LOOK_SECONDS = 0.5
#: Looks at the queue, back from now, that must all rise for an open loop to count as over-saturated.
SATURATION_LOOKS = 20


@dataclass(frozen=True)
class Until:
    """When no more requests are sent: whatever comes first."""

    requests: int | None = None
    seconds: float | None = None


@dataclass
class Course:
    """What happened. It grows while a load runs, so that an interrupted one keeps what it has."""

    begun: float
    served: list[Served] = field(default_factory=list)
    failed: int = 0
    stopped_sending: float = 0.0
    in_flight: list[tuple[float, int]] = field(default_factory=list)
    """(moment, requests in flight), every `LOOK_SECONDS`."""
    saturated: bool = False
    interrupted: bool = False
    given_up: bool = False


#: Called after every request, with all that happened so far.
Watch = Callable[[Course], None]


async def closed_loop(target: Target, asked: Iterator[Asked], concurrency: int, until: Until, watch: Watch) -> Course:
    """`concurrency` users, each with one request in flight, and the next as soon as that has ended."""
    course = Course(time.perf_counter())

    async def user() -> None:
        while not _spent(course, until, sent=len(course.served) + flying.count):
            with flying:
                served = await target.serve(next(asked), time.perf_counter())
            _note(course, served, watch)

    flying = _Flying()
    await _run(course, [user() for _ in range(concurrency)], flying)
    return course


async def open_loop(target: Target, asked: Iterator[Asked], until: Until, watch: Watch) -> Course:
    """Each request at its own moment, however many are in flight. Stops when the queue grows without end."""
    course = Course(time.perf_counter())
    flying, tasks = _Flying(), set()

    async def one(request: Asked, due: float) -> None:
        with flying:
            served = await target.serve(request, due)
        _note(course, served, watch)

    async def send() -> None:
        for sent, request in enumerate(asked):
            assert request.at is not None
            due = course.begun + request.at
            while (wait := due - time.perf_counter()) > 0 and not _spent(course, until, sent):
                await asyncio.sleep(min(wait, LOOK_SECONDS))
            if _spent(course, until, sent):
                break
            task = asyncio.create_task(one(request, due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        course.stopped_sending = time.perf_counter()
        while tasks and not course.saturated:
            await asyncio.wait(tasks, timeout=LOOK_SECONDS)

    try:
        await _run(course, [send()], flying, _queue_grows)
    finally:
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return course


class _Flying:
    """How many requests are in flight."""

    count = 0

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.count -= 1


async def _run(
    course: Course, parts: list, flying: _Flying, saturates: Callable[[Course], bool] = lambda course: False
) -> None:
    """Run `parts` to their end, looking at the queue. A cancelled run (Ctrl-C) keeps what has been served."""
    running = [asyncio.create_task(part) for part in parts]
    try:
        while not all(task.done() for task in running):
            await asyncio.wait(running, timeout=LOOK_SECONDS)
            course.in_flight.append((time.perf_counter(), flying.count))
            course.saturated |= saturates(course)
        for task in running:
            task.result()
    except asyncio.CancelledError:
        course.interrupted = True
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        course.stopped_sending = course.stopped_sending or time.perf_counter()


def _note(course: Course, served: Served, watch: Watch) -> None:
    course.served.append(served)
    course.failed += not served.good
    course.given_up |= HOPELESS <= course.failed == len(course.served)
    watch(course)


def _spent(course: Course, until: Until, sent: int) -> bool:
    now = time.perf_counter()
    over = (until.requests is not None and sent >= until.requests) or (
        until.seconds is not None and now - course.begun >= until.seconds
    )
    if over and not course.stopped_sending:
        course.stopped_sending = now
    return over or course.given_up or course.saturated


def _queue_grows(course: Course) -> bool:
    """The number in flight has a rising trend over the last looks, and has at least doubled in them."""
    if course.stopped_sending or len(course.in_flight) < SATURATION_LOOKS:
        return False
    counts = np.array([count for _, count in course.in_flight[-SATURATION_LOOKS:]], float)
    trend = drift(counts)
    return trend.p_value < ALPHA and trend.change > 0 and counts[-1] > max(2 * counts[0], 8)
