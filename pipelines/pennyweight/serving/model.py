"""The model that is served: found, loaded, checked, and at work in a thread."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pennyweight.load import models
from pennyweight.load.command import named_tokenizer
from pennyweight.load.engine import Engine
from pennyweight.load.models import Demand
from pennyweight.memory import release_memory
from pennyweight.runtimes import Occupancy
from pennyweight.runtimes.thread import Job, SessionThread
from pennyweight.serving.check import check
from pennyweight.serving.settings import Settings
from pennyweight.serving.text import Tokenizer
from pennyweight.store import Store

#: What exporting and loading print.
LOG = "serve.log"
#: Name of threads that load a model.
LOADING = "load"
#: Seconds that requests are waited for, at most; and for the next of those that come to an idle server together.
GATHER_SECONDS, QUIET_SECONDS = 0.02, 0.003

Say = Callable[[str], None]


@dataclass
class Loaded:
    """A model that was loaded and checked, with what must be closed after it."""

    engine: Engine
    tokenizer: Tokenizer
    ends: frozenset[int]
    stack: ExitStack
    version: str | None = None
    """Of a registered model."""

    @property
    def fingerprint(self) -> str:
        """Tells clients which weights answered."""
        candidate = self.engine.candidate
        return f"fp_{candidate.digest[:12]}" if candidate else "fp_unknown"


def load(target: str, settings: Settings, store: Store, say: Say, version: str | None = None) -> Loaded:
    """Find, load and check a model. Raises a PennyweightError where any of that fails; nothing stays loaded then."""
    with ExitStack() as stack:
        model = models.find(target, store, stack)
        tokenizer = named_tokenizer(settings.tokenizer) or models.load_tokenizer(model)
        demand = Demand([(settings.max_prompt_tokens, settings.max_output_tokens)], users=None, cut=True)
        engine = models.open_engine(model, settings.runtime, demand, True, store, stack, say, LOG)
        assert engine.candidate
        if confirmed := check(engine.candidate, engine.session):
            say(f"it says what the gate judged: {confirmed}")
        ends = frozenset(engine.session.ends())
        release_memory()  # what exporting and checking took
        return Loaded(engine, Tokenizer(tokenizer), ends, stack.pop_all(), version)


class ServedModel:
    """A loaded model at work. It takes requests until it is retired, and is closed when the last of them has ended."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.created = loaded, int(time.time())
        self._thread = SessionThread(loaded.engine.session, _gather)
        self.jobs = 0
        """In flight."""
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @property
    def context(self) -> int | None:
        return self.loaded.engine.session.context

    @property
    def room(self) -> int:
        """Requests that it serves at once."""
        return self.loaded.engine.session.at_once

    @property
    def occupancy(self) -> Occupancy:
        return self._thread.occupancy

    def enter(self) -> None:
        """A request begins that may use the model."""
        self._users += 1
        self._unused.clear()

    def leave(self) -> None:
        self._users -= 1
        if not self._users:
            self._unused.set()

    def submit(self, job: Job) -> None:
        self._thread.submit(job)

    def abort(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._thread.abort(job)

    async def retire(self) -> None:
        """Wait for its requests, then give its memory back."""
        await self._unused.wait()
        await self.close()

    async def close(self) -> None:
        """Give up what is in flight, and give the memory back."""
        await self._thread.close()
        await asyncio.to_thread(self._unload)

    def _unload(self) -> None:
        self.loaded.stack.close()
        release_memory()


def _gather(ended: int, running: int, arrived: Callable[[], int]) -> None:
    """Wait a moment for those who were answered to ask again, and for requests that come together, where no more are
    at work than that: prompts that are read in one step cost less, and a wave that has begun takes no more."""
    if running and ended <= running:
        return
    until, seen = time.monotonic() + GATHER_SECONDS, -1
    while (arrived() < ended if ended else arrived() > seen) and time.monotonic() < until:
        seen = arrived()
        time.sleep(QUIET_SECONDS)


async def in_thread(work: Callable[[], Loaded]) -> Loaded:
    """Run `work` in a thread that the process does not wait for when it ends."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Loaded] = loop.create_future()

    def settle(loaded: Loaded | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            assert loaded
            done.set_result(loaded)

    def run() -> None:
        loaded, error = None, None
        try:
            loaded = work()
        except BaseException as raised:
            error = raised
        loop.call_soon_threadsafe(settle, loaded, error)

    threading.Thread(target=run, name=LOADING, daemon=True).start()
    return await done


def is_loading() -> bool:
    """Whether a thread of `in_thread` is at work."""
    return any(thread.name == LOADING for thread in threading.enumerate())


def name_of(target: str) -> str:
    """The name that clients ask for, where nobody says another: of a registered model its own, without alias or
    version."""
    if target.startswith("models:/"):
        return re.split("[/@]", target.removeprefix("models:/"))[0]
    return target.partition("@")[0] if models.is_registered(target) else Path(target).name
