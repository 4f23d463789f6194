"""One request that was understood: its answers, from the first token to the last byte."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from pennyweight.runtimes import Progress, Sampling
from pennyweight.runtimes.thread import Job
from pennyweight.serving.answers import Answer, ChatSpeller, CompletionSpeller, Piece, Speller, Usage
from pennyweight.serving.metrics import Times
from pennyweight.serving.model import ServedModel
from pennyweight.serving.protocol import ApiError, ChatRequest, CompletionRequest

if TYPE_CHECKING:
    from pennyweight.serving.app import Serving

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ClientGoneError(Exception):
    """The client closed the connection before its answer was complete."""


class Reply:
    """What goes back to one client."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._streaming = False

    async def body(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """All of an answer at once."""
        fields = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        await self._start(status, fields)
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, data: bytes, last: bool = False) -> None:
        """Server-sent events, whole ones."""
        if not self._streaming:
            self._streaming = True
            await self._start(
                200, {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache",
                      "x-accel-buffering": "no"},
            )  # fmt: skip
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})

    async def fail(self, error: ApiError) -> None:
        if self._streaming:
            await self.events(b"data: " + error.body() + b"\n\ndata: [DONE]\n\n", last=True)
        else:
            await self.body(error.body(), error.status, error.headers)

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})


class Exchange:
    """A request that was understood, and its answers, one for each of its prompts."""

    def __init__(
        self, serving: Serving, model: ServedModel, request: CompletionRequest | ChatRequest,
        prompts: Sequence[Sequence[int]], tokens: Sequence[int], sampling: Sampling, who: tuple[str, str], times: Times,
    ) -> None:  # fmt: skip
        self._serving, self._model, self._request, self._prompts = serving, model, request, prompts
        self._who, self._news = who, asyncio.Queue[tuple[int | None, Progress | Exception]]()
        loaded, ends = model.loaded, model.loaded.ends
        may_end, stops = not request.ignore_eos, request.stop or []
        self._answers = [
            Answer(loaded.tokenizer, prompt, new, stops, ends if may_end else frozenset())
            for prompt, new in zip(prompts, tokens)
        ]
        self._times = [Times(times.begun) for _ in prompts]
        self._jobs = [
            Job(prompt, new, self._receiver(index), may_end, sampling)
            for index, (prompt, new) in enumerate(zip(prompts, tokens))
        ]
        self._speller = self._make_speller()

    def end(self, error: ApiError) -> None:
        """End it before its time."""
        self._news.put_nowait((None, error))

    async def run(self, receive: Receive, reply: Reply) -> None:
        """Answer. Raises ClientGoneError, ApiError, TimeoutError, or what the session raised."""
        model, jobs = self._model, self._jobs
        model.jobs += len(jobs)
        self._serving.exchanges.add(self)
        watching = asyncio.create_task(self._watch(receive))
        try:
            for job in jobs:
                model.submit(job)
            await (self._stream(reply) if self._request.stream else self._answer(reply))
        except ClientGoneError:
            self._count("abort")
            raise
        except BaseException:
            self._count("error")
            raise
        else:
            self._count(None)
        finally:
            watching.cancel()
            model.abort([job for job, answer in zip(jobs, self._answers) if not answer.finish])
            model.jobs -= len(jobs)
            self._serving.exchanges.discard(self)

    async def _stream(self, reply: Reply) -> None:
        request, speller = self._request, self._speller
        opened: set[int] = set()
        waiting = [Piece() for _ in self._answers]
        async for news in self._pieces():
            events = []
            for index, piece in news:
                waiting[index].add(piece)
                finish = self._answers[index].finish
                if not (waiting[index].text or finish):
                    continue
                first = index not in opened
                if first:
                    opened.add(index)
                    events.append(speller.opening(index))
                events.append(speller.event(index, waiting[index], finish, self._prompts[index] if first else None))
                waiting[index] = Piece()
            if events:
                await reply.events(b"".join(events))
        ending = b"data: [DONE]\n\n"
        if request.stream_options and request.stream_options.include_usage:
            ending = speller.usage_event(self._usage()) + ending
        await reply.events(ending, last=True)

    async def _answer(self, reply: Reply) -> None:
        pieces = [Piece() for _ in self._answers]
        async for news in self._pieces():
            for index, piece in news:
                pieces[index].add(piece)
        answers = [(piece, answer.finish) for piece, answer in zip(pieces, self._answers)]
        await reply.body(self._speller.whole(answers, self._prompts, self._usage()))

    async def _pieces(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """What has come, in the order that it came, until all answers are complete."""
        while any(not answer.finish for answer in self._answers):
            news = [await self._news.get()]
            while not self._news.empty():
                news.append(self._news.get_nowait())
            pieces = []
            for index, each in news:
                if isinstance(each, Exception):
                    raise each
                if index is not None and not self._answers[index].finish:
                    pieces.append((index, self._take(index, each)))
            yield pieces

    def _take(self, index: int, news: Progress) -> Piece:
        answer, times, metrics = self._answers[index], self._times[index], self._serving.metrics
        before = answer.tokens
        piece = answer.take(news)
        if news.tokens:
            if times.first is None:
                metrics.read_prompt(len(self._prompts[index]))
            metrics.tokens(answer.tokens - before, news.at, times)
        if answer.finish:
            metrics.ended(answer.finish, times)
            if not news.finished:
                self._model.abort([self._jobs[index]])
        return piece

    def _receiver(self, index: int) -> Callable[[Progress | Exception], None]:
        return lambda news: self._news.put_nowait((index, news))

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._news.put_nowait((None, ClientGoneError()))

    def _usage(self) -> Usage:
        return Usage(sum(map(len, self._prompts)), sum(answer.tokens for answer in self._answers))

    def _count(self, reason: str | None) -> None:
        """Count what was not complete by `reason`, and what all of it cost."""
        serving, candidate = self._serving, self._model.loaded.engine.candidate
        prices = serving.settings.prices and serving.settings.prices.of(candidate.id if candidate else "")
        for answer, times in zip(self._answers, self._times):
            if not answer.finish and reason:
                serving.metrics.ended(reason, times)
        if prices:
            read = sum(len(prompt) for prompt, times in zip(self._prompts, self._times) if times.first is not None)
            made = sum(answer.tokens for answer in self._answers)
            serving.metrics.spent((read * prices[0] + made * prices[1]) / 1e6, *self._who)

    def _make_speller(self) -> Speller:
        request, loaded = self._request, self._model.loaded
        chat = isinstance(request, ChatRequest)
        number = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        options = request.stream_options
        return (ChatSpeller if chat else CompletionSpeller)(
            number, int(time.time()), self._serving.name, loaded.fingerprint, loaded.tokenizer,
            scored=request.scored is not None, with_tokens=bool(request.return_token_ids),
            with_usage=bool(options and options.include_usage),
        )  # fmt: skip
