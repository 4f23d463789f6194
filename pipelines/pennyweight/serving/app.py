"""The server's endpoints, what they share, and how a request is read and admitted."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request as StarletteRequest
from starlette.routing import Route

from pennyweight.runtimes import Sampling
from pennyweight.serving.exchange import ClientGoneError, Exchange, Message, Receive, Reply, Send
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
