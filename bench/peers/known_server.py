"""A server of OpenAI's streamed completions whose times are known, as it sleeps instead of computing.

    python known_server.py TTFT_MS TPOT_MS

Each token is due at a moment that is fixed when its request arrives, so lateness does not add up. What really happened
is kept: `GET /seen` hands over (arrived, first token, last token, tokens) of every request since it was last asked, in
seconds of one clock. Prints its address, then an `a` when a request arrives and a `d` when it is done, and serves until
standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

from aiohttp import web

MODEL = "known"


class Known:
    def __init__(self, first: float, each: float) -> None:
        self._first, self._each = first, each  # seconds
        self._seen: list[tuple[float, float, float, int]] = []

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def seen(self, _: web.Request) -> web.Response:
        taken, self._seen = self._seen, []
        return web.json_response(taken)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        arrived = time.perf_counter()
        os.write(1, b"a")
        body = await request.json()
        tokens = int(body["max_tokens"])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        first = last = arrived
        for number in range(tokens):
            due = arrived + self._first + number * self._each
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            last = time.perf_counter()
            first = first if number else last
            await _send(response, {"model": MODEL, "choices": [{"index": 0, "text": " a", "finish_reason": None}]})
        self._seen.append((arrived, first, last, tokens))
        into = len(body["prompt"].split())
        usage = {"prompt_tokens": into, "completion_tokens": tokens, "total_tokens": into + tokens}
        await _send(response, {"model": MODEL, "choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        await _send(response, {"model": MODEL, "choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        os.write(1, b"d")
        return response


async def _send(response: web.StreamResponse, body: dict) -> None:
    await response.write(b"data: " + json.dumps(body).encode() + b"\n\n")


async def main() -> None:
    ttft_ms, tpot_ms = map(float, sys.argv[1:])
    known = Known(ttft_ms / 1000, tpot_ms / 1000)
    app = web.Application()
    app.router.add_get("/v1/models", known.models)
    app.router.add_get("/health", known.health)
    app.router.add_get("/seen", known.seen)
    app.router.add_post("/v1/completions", known.complete)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    print(f"http://{host}:{port}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main())
