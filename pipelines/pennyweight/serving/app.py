"""The server's endpoints: what they share, and one request from its first byte to its last."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request as StarletteRequest
from starlette.routing import Route

from pennyweight.runtimes import Progress, Sampling
from pennyweight.runtimes.thread import Job
from pennyweight.serving.answers import Answer, ChatSpeller, CompletionSpeller, Piece, Speller, Usage
from pennyweight.serving.metrics import Metrics, Times
from pennyweight.serving.model import Say, ServedModel
from pennyweight.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    check_text,
    read,
    read_prompts,
)
from pennyweight.serving.settings import Settings

#: Characters of a prompt above which it is read into tokens beside the event loop.
LONG_TEXT = 20_000
#: One at a time: each thread of the C library keeps the memory that its longest prompt took.
_READER = ThreadPoolExecutor(1, "reader")
#: Temperature of a request that names none, as OpenAI has it.
TEMPERATURE = 1.0
#: Seconds that clients have to take in that their answers end, when the server does.
ENDING_SECONDS = 2.0
#: Bytes of a body beyond its limit that are read and forgotten.
MOST_DISCARDED = 32 * 2**20
#: Seconds after which a client that was refused for want of room is asked to try again.
RETRY_SECONDS = 1

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ClientGoneError(Exception):
    """The client closed the connection before its answer was complete."""


class Serving:
    """What all endpoints share: the model, its limits, and what is counted."""

    def __init__(self, settings: Settings, name: str, say: Say) -> None:
        self.settings, self.name, self.say = settings, name, say
        self.model: ServedModel | None = None
        self.draining = False
        self.exchanges: set[Exchange] = set()
        self.metrics = Metrics(name)
        self.metrics.watch(lambda: self.running, lambda: self.waiting)
        self._models: set[ServedModel] = set()
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def running(self) -> int:
        return sum(model.occupancy.running for model in self._models)

    @property
    def waiting(self) -> int:
        return max(0, sum(model.jobs for model in self._models) - self.running)

    @property
    def why_not_ready(self) -> str | None:
        if self.draining:
            return "the server is shutting down"
        return None if self.model else "the model is being loaded"

    def put(self, model: ServedModel) -> None:
        """Serve this model from now on; the one before ends its requests, and is closed then."""
        before, self.model = self.model, model
        self._models.add(model)
        if before is not None:
            task = asyncio.create_task(self._retire(before))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def _retire(self, model: ServedModel) -> None:
        await model.retire()
        self._models.discard(model)

    async def drain(self, seconds: float) -> None:
        """Take no more requests; after so many seconds end those in flight too."""
        self.draining = True
        for patience, ending in ((seconds, False), (ENDING_SECONDS, True)):
            if ending:
                for exchange in list(self.exchanges):
                    exchange.end(ApiError("the server is shutting down", status=503))
            until = time.monotonic() + patience
            while self.exchanges and time.monotonic() < until:
                await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Close the models, whatever is in flight."""
        for task in list(self._retiring):
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        for model in list(self._models):
            await model.close()
        self._models.clear()

    def check_key(self, headers: dict[bytes, bytes]) -> None:
        """Raise ApiError unless the client shows one of the keys, where there are any."""
        if not self.settings.keys:
            return
        shown = headers.get(b"authorization", b"").removeprefix(b"Bearer ").strip()
        if not sum(hmac.compare_digest(shown, key) for key in self.settings.keys):  # all of them, for equal time
            raise ApiError(
                "this server wants an API key: Authorization: Bearer KEY", status=401, code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    def admit(self, answers: int = 1) -> ServedModel:
        """The model for a request of so many answers. Raises ApiError where there is none, or no room."""
        if self.model is None:
            raise self._not_ready()
        self.check_room(self.model, answers)
        return self.model

    def _not_ready(self) -> ApiError:
        return ApiError(self.why_not_ready or "", status=503, headers={"Retry-After": str(RETRY_SECONDS)})

    def check_room(self, model: ServedModel, answers: int) -> None:
        """Raise ApiError where no more requests are taken, or not so many."""
        if self.draining:
            raise self._not_ready()
        if model.jobs + answers > model.room + self.settings.max_queue:
            raise ApiError(
                f"{model.jobs} requests are in flight, and no more may wait", status=429, code="queue_full",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )  # fmt: skip

    def limit(self, model: ServedModel, prompt: Sequence[int], asked: int | None, field: str) -> int:
        """Tokens that an answer may have. Raises ApiError for a request that is too long."""
        limits, context, length = self.settings, model.context, len(prompt)
        if not length:
            raise ApiError("the prompt is empty", field)
        most = limits.max_output_tokens if context is None else min(limits.max_output_tokens, context - length)
        if length > limits.max_prompt_tokens or most < 1:
            shown = limits.max_prompt_tokens if context is None else min(limits.max_prompt_tokens, context - 1)
            raise ApiError(
                f"the prompt has {length:,} tokens; at most {shown:,} are read", field, code="context_length_exceeded"
            )
        if asked is None:
            return most
        if asked > limits.max_output_tokens:
            raise ApiError(
                f"{asked:,} tokens are asked for; an answer has at most {limits.max_output_tokens:,}", "max_tokens"
            )
        if asked > most:
            raise ApiError(
                f"{length:,} tokens in the prompt and {asked:,} asked for are more than the model's context of "
                f"{context:,}", "max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        return asked


class Endpoint:
    """POST /v1/completions, or /v1/chat/completions."""

    def __init__(self, serving: Serving, chat: bool) -> None:
        self._serving, self._chat = serving, chat

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        serving, times = self._serving, Times()
        reply = Reply(send)
        try:
            headers = dict(scope["headers"])
            serving.check_key(headers)
            model = serving.admit()
            model.enter()
            try:
                async with asyncio.timeout(serving.settings.timeout):
                    body = await read_body(receive, headers, serving.settings.max_body_bytes)
                    exchange = await self._prepare(body, model, headers, times)
                    await exchange.run(receive, reply)
            finally:
                model.leave()
        except ClientGoneError:
            return
        except ApiError as error:
            await reply.fail(error)
        except TimeoutError:
            seconds = serving.settings.timeout
            await reply.fail(ApiError(f"the answer took longer than {seconds:g} seconds", status=504, code="timeout"))
        except Exception as error:
            serving.say(f"a request failed: {type(error).__name__}: {error}")
            await reply.fail(ApiError(f"{type(error).__name__}: {error}", status=500))

    async def _prepare(self, body: bytes, model: ServedModel, headers: dict[bytes, bytes], times: Times) -> Exchange:
        serving, loaded = self._serving, model.loaded
        request = read(body, ChatRequest if self._chat else CompletionRequest)
        if request.model not in (None, serving.name, serving.settings.target):
            raise ApiError(
                f"there is no model {request.model!r} here; this server has {serving.name!r}", "model", 404,
                "model_not_found",
            )  # fmt: skip
        if isinstance(request, ChatRequest):
            for number, message in enumerate(request.messages):
                check_text(message.plain()["content"], f"messages.{number}.content")
            messages = [message.plain() for message in request.messages]
            prompts = [await _beside(loaded.tokenizer.chat, messages, len(body))]
        else:
            most = model.room + serving.settings.max_queue
            prompts = []
            for prompt in read_prompts(request.prompt, most, loaded.engine.vocabulary):
                if isinstance(prompt, str):
                    check_text(prompt, "prompt")
                    prompt = await _beside(loaded.tokenizer.encode, prompt, len(prompt))
                prompts.append(prompt)
        sampling = Sampling(
            temperature=TEMPERATURE if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            logprobs=request.scored,
        )
        if objection := loaded.engine.session.objection(sampling):
            raise ApiError(objection, "logprobs", code="unsupported_parameter")
        field = "messages" if self._chat else "prompt"
        tokens = [serving.limit(model, prompt, request.tokens, field) for prompt in prompts]
        serving.check_room(model, len(prompts))
        who = [headers.get(name, b"").decode("latin-1").strip() for name in (b"x-team", b"x-project")]
        return Exchange(serving, model, request, prompts, tokens, sampling, (who[0], who[1]), times)


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


async def read_body(receive: Receive, headers: dict[bytes, bytes], most: int) -> bytes:
    """A request's body. Raises ApiError where it is too large, ClientGoneError where it never ends.

    What is beyond the limit is not kept, but read on for a while: a client that still writes when the connection is
    closed does not see why.
    """
    error = ApiError(
        f"the body has more than {most:,} bytes", status=413, code="body_too_large", headers={"Connection": "close"}
    )
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length) > most and (b"expect" in headers or int(length) > most + MOST_DISCARDED):
        raise error
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        size += len(part)
        if size <= most:
            parts.append(part)
        elif size > most + MOST_DISCARDED:
            raise error
        more = message.get("more_body", False)
    if size > most:
        raise error
    return b"".join(parts)


async def _beside(work: Callable[[Any], list[int]], given: Any, size: int) -> list[int]:
    """Make tokens, and keep the event loop free where that takes long."""
    if size <= LONG_TEXT:
        return work(given)
    return await asyncio.get_running_loop().run_in_executor(_READER, work, given)


def make_app(serving: Serving) -> FastAPI:
    app = FastAPI(openapi_url=None)
    app.router.routes += [
        Route("/v1/completions", Endpoint(serving, chat=False), methods=["POST"]),
        Route("/v1/chat/completions", Endpoint(serving, chat=True), methods=["POST"]),
    ]

    @app.get("/v1/models")
    async def list_models(request: StarletteRequest) -> Response:
        try:
            serving.check_key(dict(request.scope["headers"]))
            model = serving.admit(answers=0)
        except ApiError as error:
            return _refusal(error)
        loaded = model.loaded
        entry = {
            "id": serving.name, "object": "model", "created": model.created, "owned_by": "pennyweight",
            "root": serving.settings.target, "max_model_len": model.context, "version": loaded.version,
            "system_fingerprint": loaded.fingerprint, "runtime": loaded.engine.runtime,
            "batching": loaded.engine.batching,
        }  # fmt: skip
        return JSONResponse({"object": "list", "data": [entry]})

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> Response:
        reason = serving.why_not_ready
        return JSONResponse({"status": reason or "ready"}, 503 if reason else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        cache = serving.model.occupancy.cache if serving.model else None
        return Response(serving.metrics.page(cache), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(HTTPException)
    async def refused(request: StarletteRequest, error: HTTPException) -> Response:
        return _refusal(ApiError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code))

    return app


def _refusal(error: ApiError) -> Response:
    return Response(error.body(), error.status, error.headers, media_type="application/json")
