"""An OpenAI-compatible server of known behaviour, on a real socket in a thread."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Fake:
    """What it does, and what was asked of it."""

    first: float = 0.0
    """Seconds before the first token."""
    each: float = 0.0
    """Seconds before every later one."""
    slots: int = 1000
    """Requests that are served at once; the others wait."""
    fault: str | None = None
    """status:CODE, stall, drop, garbage, error, empty, hangup, once: a connection is closed when it is used again."""
    models: tuple[str, ...] = ("fake",)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    used: set[Any] = field(default_factory=set)
    """Connections that have had a request."""
    most_at_once: int = 0
    at_once: int = 0
    url: str = ""

    async def list_models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in self.models]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            async with self.gate:
                return await self._answer(request, body)
        finally:
            self.at_once -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        kind, _, code = (self.fault or "").partition(":")
        if kind == "once" and request.transport in self.used:
            request.transport.close()
            return web.Response()
        self.used.add(request.transport)
        if kind == "status":
            return web.json_response({"error": {"message": "too much"}}, status=int(code))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(self.first)
        if kind == "stall":
            await asyncio.sleep(30)
        chat = "messages" in body
        if chat:
            await self._send(response, {"choices": [{"delta": {"role": "assistant"}}]})
        for number in range(0 if kind == "empty" else body["max_tokens"]):
            if number:
                await asyncio.sleep(self.each)
            if number == 2 and kind == "drop":
                request.transport.close()
                return response
            if number == 2 and kind == "garbage":
                await response.write(b"data: {not json\n\n")
            if number == 2 and kind == "error":
                await self._send(response, {"error": {"message": "out of memory"}})
            piece = {"delta": {"content": " a"}} if chat else {"text": " a"}
            await self._send(response, {"choices": [piece]})
        words = body["messages"][0]["content"] if chat else body["prompt"]
        usage = {"prompt_tokens": len(words.split()), "completion_tokens": body["max_tokens"]}
        await self._send(response, {"choices": [{"text": "", "finish_reason": "length"}]})
        await self._send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        if kind == "hangup":  # without having said that it would
            await response.write_eof()
            request.transport.close()
        return response

    @staticmethod
    async def _send(response: web.StreamResponse, body: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(body).encode() + b"\n\n")


@contextmanager
def serve(**behaviour: Any) -> Iterator[Fake]:
    fake, ready, loop = Fake(**behaviour), threading.Event(), asyncio.new_event_loop()

    async def main() -> None:
        fake.gate = asyncio.Semaphore(fake.slots)
        app = web.Application()
        app.router.add_get("/v1/models", fake.list_models)
        app.router.add_post("/v1/completions", fake.complete)
        app.router.add_post("/v1/chat/completions", fake.complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        fake.url = f"http://127.0.0.1:{port}"
        fake.stop = asyncio.Event()
        ready.set()
        await fake.stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(fake.stop.set)
        thread.join(10)
