"""A server that speaks OpenAI's API, streamed over HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from pennyweight.errors import StageError, UsageError
from pennyweight.load.requests import Asked, Served

#: Characters of a server's complaint that are shown.
SHOWN = 200


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask."""

    url: str
    """Up to and without `/v1`."""
    model: str
    api: Literal["completions", "chat"] = "completions"
    key: str | None = None
    ignore_eos: bool = True
    """Ask for exactly as many tokens as the workload says: an extension of vLLM's, SGLang's and llama.cpp's servers."""
    stall_seconds: float = 60.0
    """Longest silence of a server that owes an answer."""
    runtime: None = None
    batching: None = None

    @property
    def address(self) -> str:
        return self.url

    def connect(self) -> AbstractAsyncContextManager[HttpTarget]:
        return connect(self)

    def body(self, asked: Asked) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": asked.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.api == "chat":
            return body | {"messages": [{"role": "user", "content": asked.prompt}]}
        return body | {"prompt": asked.prompt}

    @property
    def path(self) -> str:
        return f"{self.url}/v1/{'chat/completions' if self.api == 'chat' else 'completions'}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


class HttpTarget:
    """One endpoint, over as many connections as there are requests in flight. Made by `connect`."""

    def __init__(self, endpoint: Endpoint, session: aiohttp.ClientSession) -> None:
        self._endpoint, self._session = endpoint, session

    async def serve(self, asked: Asked, due: float) -> Served:
        served = Served(due=due, sent=time.perf_counter(), input_tokens=asked.input_tokens)
        events: list[tuple[float, bytes]] = []
        try:
            try:
                await self._ask(self._session, asked, served, events)
            except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
                # A server may close a connection between two requests; the second finds out when it is sent. All that
                # are kept may be closed, so it is sent again over one of its own.
                if events or isinstance(error, aiohttp.ClientConnectorError):
                    raise
                async with _session(self._endpoint) as fresh:
                    await self._ask(fresh, asked, served, events)
        except TimeoutError:
            served.fault = "stalled"
            served.message = f"nothing came for {self._endpoint.stall_seconds:g} s"
        except aiohttp.ClientConnectorError as error:
            served.fault, served.message = "refused", str(error)
        except (aiohttp.ClientError, ConnectionError) as error:
            served.fault, served.message = "dropped", f"{type(error).__name__}: {error}"
        except asyncio.CancelledError:
            served.fault, served.message = "cancelled", "stopped"
            raise
        served.ended = events[-1][0] if events and served.good else time.perf_counter()
        if served.good:
            _read(events, served)
        return served

    async def _ask(
        self, session: aiohttp.ClientSession, asked: Asked, served: Served, events: list[tuple[float, bytes]]
    ) -> None:
        async with session.post(self._endpoint.path, json=self._endpoint.body(asked)) as response:
            if response.status != 200:
                text = (await response.text())[:SHOWN]
                served.fault, served.message = "status", f"HTTP {response.status}: {text}"
            else:
                await _collect(response, events)


@asynccontextmanager
async def connect(endpoint: Endpoint) -> AsyncIterator[HttpTarget]:
    async with _session(endpoint) as session:
        yield HttpTarget(endpoint, session)


def _session(endpoint: Endpoint) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=endpoint.stall_seconds),
        headers=endpoint.headers,
    )


async def served_model(url: str, key: str | None) -> str:
    """The name of the model that a server serves. Raises StageError where it does not answer, UsageError where it
    serves several."""
    headers = Endpoint(url, "", key=key).headers
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10), headers=headers) as session,
            session.get(f"{url}/v1/models") as response,
        ):
            text, status = await response.text(), response.status
        if status != 200:
            raise StageError(
                f"{url}/v1/models answers HTTP {status}: {text[:SHOWN]}",
                "is the address the server's root, without /v1? A key is read from the variable in --key-from",
            )
        names = [str(item["id"]) for item in json.loads(text)["data"]]
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise StageError(f"{url} does not answer: {reason}", "start the server, or check the address") from None
    except (ValueError, KeyError, TypeError):
        raise StageError(f"{url}/v1/models is no list of models: {text[:SHOWN]!r}", "name one with --model") from None
    if len(names) != 1:
        raise UsageError(f"{url} serves {len(names)} models: {', '.join(names) or 'none'}", "name one with --model")
    return names[0]


async def _collect(response: aiohttp.ClientResponse, events: list[tuple[float, bytes]]) -> None:
    """Gather server-sent events as they come. What they say is read after the last one, so that reading delays none."""
    rest = b""
    async for chunk in response.content.iter_any():
        now = time.perf_counter()
        *whole, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        events.extend((now, event) for event in whole)
    if rest.strip():
        events.append((time.perf_counter(), rest))


def _read(events: list[tuple[float, bytes]], served: Served) -> None:
    """What a finished stream says: pieces of text, the count of tokens, and that it is complete."""
    complete, usage = False, {}
    for moment, event in events:
        data = b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))
        if not data:
            continue  # a comment that keeps the connection open
        if data == b"[DONE]":
            complete = True
            continue
        try:
            body = json.loads(data)
            choices = body.get("choices") or []
            usage = body.get("usage") or usage
            if body.get("error"):
                raise ValueError(body["error"])
            if choices and _text(choices[0]):
                served.arrivals.append(moment)
            complete |= bool(choices and choices[0].get("finish_reason"))
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            served.fault, served.message = "garbage", f"{error} in {data[:SHOWN].decode(errors='replace')!r}"
            return
    served.input_tokens = usage.get("prompt_tokens") or served.input_tokens
    served.output_tokens = usage.get("completion_tokens") or len(served.arrivals)
    if not complete:
        served.fault, served.message = "dropped", f"the stream ended after {len(served.arrivals)} pieces"
    elif not served.arrivals:
        served.fault, served.message = "empty", "the answer has no text"


def _text(choice: dict[str, Any]) -> str | None:
    delta = choice.get("delta") or {}
    return choice.get("text") or delta.get("content") or delta.get("reasoning_content")
