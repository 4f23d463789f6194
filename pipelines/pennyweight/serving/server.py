"""The server's process: its socket, the model that it waits for, signals, and the way out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial

import uvicorn

from pennyweight.errors import UsageError
from pennyweight.load import models
from pennyweight.serving.app import Serving, make_app
from pennyweight.serving.follow import Follower
from pennyweight.serving.model import Loaded, Say, ServedModel, in_thread, is_loading, load, name_of
from pennyweight.serving.settings import Settings
from pennyweight.store import Store

SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Connections that may wait to be taken.
BACKLOG = 2048


def serve(settings: Settings, store: Store, say: Say) -> None:
    """Serve until SIGTERM or SIGINT comes and what was in flight then has ended; a second one ends it at once.

    Raises UsageError where the port is taken, and what loading the model raises.
    """
    listening = listen(settings.host, settings.port)
    with contextlib.closing(listening), asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(settings, store, listening, say))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UsageError where there can be none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OverflowError as error:
        raise UsageError(f"there is no port {port}") from error
    except OSError as error:
        raise UsageError(
            f"{host}:{port} cannot be listened on: {error.strerror or error}", "another --port may be free"
        ) from error
    return listening


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to us: first the requests in flight end."""
        yield


async def _serve(settings: Settings, store: Store, listening: socket.socket, say: Say) -> None:
    serving = Serving(settings, settings.name or name_of(settings.target), say)
    server = _Server(
        uvicorn.Config(
            make_app(serving), access_log=False, log_level="warning", lifespan="off", backlog=BACKLOG, ws="none",
            timeout_keep_alive=30, timeout_graceful_shutdown=1, server_header=False,
        )
    )  # fmt: skip
    stopping = asyncio.Event()
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, _stop, stopping)
    host, port = listening.getsockname()[:2]
    say(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}; not ready yet")
    running = asyncio.create_task(server.serve(sockets=[listening]))
    working = asyncio.create_task(_work(serving, store, say))
    asked_to_stop = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait([running, working, asked_to_stop], return_when=asyncio.FIRST_COMPLETED)
        if stopping.is_set():
            say(f"stopping: {len(serving.exchanges)} requests in flight have {settings.drain_seconds:g} s to end")
            await serving.drain(settings.drain_seconds)
    finally:
        working.cancel()
        asked_to_stop.cancel()
        server.should_exit = True
        await asyncio.gather(running, return_exceptions=True)
        await serving.close()
    if working.done() and not working.cancelled() and (error := working.exception()):
        raise error
    if running.done() and not stopping.is_set() and (error := running.exception()):
        raise error
    say("stopped")
    if is_loading():
        os._exit(0)  # a library that loads a model cannot be interrupted, nor survive the interpreter's end


def _stop(stopping: asyncio.Event) -> None:
    """A second signal does not wait."""
    if stopping.is_set():
        os._exit(130)
    stopping.set()


async def _work(serving: Serving, store: Store, say: Say) -> None:
    """Load the model and put it to work; follow its alias, where it has one."""
    settings = serving.settings
    follower = None
    if models.is_registered(settings.target):
        name, _, alias = settings.target.partition("@")

        def load_version(version: str) -> asyncio.Future[Loaded]:
            work = partial(load, f"models:/{name}/{version}", settings, store, say, version)
            return asyncio.ensure_future(in_thread(work))

        def swapped(loaded: Loaded | None) -> None:
            serving.metrics.swapped(done=loaded is not None)
            if loaded is not None:
                serving.put(ServedModel(loaded))

        follower = Follower(name, alias, load_version, swapped, say)
        loaded = await follower.start()
    else:
        loaded = await in_thread(partial(load, settings.target, settings, store, say))
    serving.put(ServedModel(loaded))
    for line in describe(serving, loaded):
        say(line)
    if follower is None:
        await asyncio.Event().wait()
    else:
        await follower.run(settings.follow_seconds)


def describe(serving: Serving, loaded: Loaded) -> list[str]:
    """What a person who starts the server needs to know of it."""
    settings, engine = serving.settings, loaded.engine
    assert engine.candidate
    batching = {
        "continuous": "continuous batching: requests join and leave at every token",
        "waves": "static waves: only prompts of equal length are served together, to the end of the longest answer",
    }[engine.batching]
    version = f" version {loaded.version}" if loaded.version else ""
    lines = [
        f"ready: {serving.name}{version} in {engine.runtime} ({engine.candidate.dtype}), {batching}",
        f"  at most {engine.session.at_once} requests at once and {settings.max_queue} waiting; up to "
        f"{settings.max_prompt_tokens:,} tokens in and {settings.max_output_tokens:,} out, within the model's context "
        f"of {engine.session.context or 'unknown length'}",
    ]
    if settings.prices:
        price = settings.prices.of(engine.candidate.id)
        if price:
            lines.append(f"  ${price[0]:g} for a million tokens in, ${price[1]:g} out")
        else:
            lines.append(f"  no price: the card has none for {engine.candidate.id}")
    if not settings.keys:
        lines.append("  open to all who reach it: no API keys")
    return lines
