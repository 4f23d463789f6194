"""`pennyweight bench`: loads on one target, one after the other, to one report."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from pennyweight import machine
from pennyweight.errors import StageError, UsageError
from pennyweight.load import driver
from pennyweight.load.knee import Knee, find_knee
from pennyweight.load.report import LoadReport, summarize
from pennyweight.load.requests import Asked, Place, Served
from pennyweight.load.workload import Arrival, Prompts, Shape, poisson
from pennyweight.recipe import Slo
from pennyweight.records import Price, Record

#: Requests of a closed loop where nobody says how many: so many for each user, and at least so many in all.
REQUESTS_PER_USER, FEWEST_REQUESTS = 8, 80
#: Seconds that an open loop lasts where nobody says how long.
OPEN_SECONDS = 60.0
#: Seconds between two lines of progress.
TELL_SECONDS = 5.0


@dataclass(frozen=True)
class Load:
    """One load: users in a closed loop, or arrivals in an open one."""

    concurrency: int | None = None
    rate: float | None = None
    trace: tuple[Arrival, ...] = ()

    def __str__(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} user{'s' if self.concurrency > 1 else ''}"
        if self.rate is not None:
            return f"{self.rate:g} requests/s, Poisson"
        span = self.trace[-1].at
        return f"trace of {len(self.trace)} requests over {span:.0f} s"


@dataclass(frozen=True)
class Settings:
    place: Place
    shape: Shape
    prompts: Prompts
    loads: tuple[Load, ...]
    requests: int | None = None
    seconds: float | None = None
    slo: Slo | None = None
    price: Price | None = None
    knee_up_to: int | None = None
    """Look for the knee, at no more than so many users."""
    tokenizer: str | None = None
    seed: int = 0


class BenchReport(Record):
    target: str
    model: str
    runtime: str | None = Field(None, description="of a model in this process; None for a server")
    batching: str | None = Field(None, description="of that runtime: `continuous` or `waves`")
    workload: str
    prompts: str = Field(description="what a prompt's length was counted in")
    slo: Slo | None
    price: Price | None
    knee_up_to: int | None = Field(None, description="users that the knee was looked for at, at most")
    loads: list[LoadReport]
    knee: Knee | None
    started_at: str
    seconds: float
    client: dict[str, Any] = Field(description="the machine that asked")
    client_cpu_share: float = Field(description="CPU seconds of the load generator for each second of the measurement")
    interrupted: bool


@dataclass
class Measured:
    """What `run` found, and every request that it rests on."""

    report: BenchReport
    requests: list[tuple[LoadReport, list[Served]]] = field(default_factory=list)


def run(settings: Settings, say: Callable[[str], None]) -> Measured:
    """Measure every load, then the knee. Raises StageError where a target serves nothing.

    A Ctrl-C ends the load at work, which keeps what it has, and leaves out those after it.
    """
    begin, cpu, started = time.perf_counter(), time.thread_time(), datetime.now(UTC)
    kept: list[tuple[LoadReport, list[Served]]] = []
    stopped = False

    def measure(load: Load, times: int = 1) -> LoadReport | None:
        nonlocal stopped
        if stopped:
            return None
        course = asyncio.run(_drive(settings, load, times, say))
        stopped = course.interrupted
        report = _summary(settings, load, course)
        if report is None and not stopped:
            raise _nothing_served(settings, load, course)
        if report is not None:
            kept.append((report, course.served))
        return report

    reports = [report for load in settings.loads if (report := measure(load))]
    knee = None
    if settings.knee_up_to and not stopped:
        knee = find_knee(lambda users, times: measure(Load(users), times), settings.knee_up_to)
    seconds = time.perf_counter() - begin
    report = BenchReport(
        target=settings.place.address,
        model=settings.place.model,
        runtime=settings.place.runtime,
        batching=settings.place.batching,
        workload=str(settings.shape) if not any(load.trace for load in settings.loads) else "trace",
        prompts="tokens" if settings.tokenizer else "words, at 0.75 a token; counts are the server's own",
        slo=settings.slo,
        price=settings.price,
        knee_up_to=settings.knee_up_to,
        loads=reports,
        knee=knee,
        started_at=started.isoformat(timespec="seconds"),
        seconds=seconds,
        client=machine.fingerprint(),
        client_cpu_share=(time.thread_time() - cpu) / seconds,
        interrupted=stopped,
    )
    return Measured(report, kept)


async def _drive(settings: Settings, load: Load, times: int, say: Callable[[str], None]) -> driver.Course:
    told = time.perf_counter()

    def watch(course: driver.Course) -> None:
        nonlocal told
        if time.perf_counter() - told >= TELL_SECONDS:
            told = time.perf_counter()
            failed = f", {course.failed} of them failed" if course.failed else ""
            say(f"  {load}: {len(course.served)} requests{failed}")

    async with settings.place.connect() as target:
        if load.concurrency is not None:
            seconds = None if settings.seconds is None else settings.seconds * times
            until = driver.Until(_requests(settings, load.concurrency, times), seconds)
            return await driver.closed_loop(target, _asked(settings, load), load.concurrency, until, watch)
        seconds = settings.seconds
        if seconds is None and settings.requests is None and not load.trace:
            seconds = OPEN_SECONDS
        return await driver.open_loop(target, _asked(settings, load), driver.Until(settings.requests, seconds), watch)


def _requests(settings: Settings, concurrency: int, times: int) -> int | None:
    """Requests after which a closed loop ends; None where time ends it."""
    if settings.requests is not None:
        return settings.requests * times
    return None if settings.seconds is not None else max(FEWEST_REQUESTS, REQUESTS_PER_USER * concurrency) * times


def _asked(settings: Settings, load: Load) -> Iterator[Asked]:
    if load.trace:
        for arrival in load.trace:
            yield settings.prompts.ask(arrival.input_tokens, arrival.output_tokens, arrival.at)
        return
    moments: Iterator[float | None] = itertools.repeat(None)
    if load.rate is not None:
        moments = poisson(load.rate, settings.seed)
    for (into, out), at in zip(settings.shape.sizes(settings.seed), moments):
        yield settings.prompts.ask(into, out, at)


def _summary(settings: Settings, load: Load, course: driver.Course) -> LoadReport | None:
    return summarize(
        course,
        str(load),
        settings.slo,
        settings.price,
        load.concurrency,
        load.rate,
    )


def _nothing_served(settings: Settings, load: Load, course: driver.Course) -> StageError:
    first = next((item for item in course.served if not item.good), None)
    reason = f": {first.message}" if first else ""
    hints = {
        "status": "read the message; a server that does not know `ignore_eos` needs --stop-at-eos",
        "stalled": "raise --stall-seconds, or lower the load",
        "garbage": "is this an OpenAI-compatible server that streams?",
        "refused": "start the server, or check the address",
        "failed": "another --runtime may serve it",
    }
    fault = first.fault if first else ""
    return StageError(
        f"{settings.place.address} served none of {len(course.served)} requests at {load}{reason}",
        hints.get(str(fault), "look at the server's log"),
    )


def read_texts(path: Path) -> list[str]:
    """Paragraphs of a text file. Raises UsageError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text: {error}") from error
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    if not paragraphs:
        raise UsageError(f"{path} has no text")
    return paragraphs
