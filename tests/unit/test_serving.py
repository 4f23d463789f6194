"""The server's protocol over a session whose answers are known, and once over a real model in a real process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bigrams
import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from pennyweight import tracking
from pennyweight.cli import main
from pennyweight.errors import SourceError, StageError, TrackingError, UsageError
from pennyweight.load.command import parse_price
from pennyweight.load.engine import Engine
from pennyweight.recipe import load_prices
from pennyweight.records import Candidate, Checkpoint
from pennyweight.runtimes import GREEDY, Occupancy, Progress, Sampling, Scored
from pennyweight.serving import check as check_
from pennyweight.serving import protocol, vllm
from pennyweight.serving.app import Serving, make_app
from pennyweight.serving.follow import Follower
from pennyweight.serving.metrics import MOST_PAIRS
from pennyweight.serving.model import Loaded, ServedModel, name_of
from pennyweight.serving.server import listen
from pennyweight.serving.settings import Prices, Settings, read_keys, read_prices
from pennyweight.serving.text import REPLACEMENT, Tokenizer
from pennyweight.store import Store
from pennyweight.tracking.evidence import EVIDENCE

END, VOCABULARY = 0, 512


@dataclass
class Scripted:
    """A session that answers every prompt with the tokens that `script` says, one a step, and then with END."""

    script: Callable[[tuple[int, ...]], Sequence[int]]
    pause: float = 0.0
    """Seconds of every step."""
    context: int | None = 256
    at_once: int = 4
    fails: set[int] = field(default_factory=set)
    """Steps that raise."""
    steps: int = 0
    submitted: list[tuple[tuple[int, ...], int, bool, Sampling]] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    flying: dict[int, tuple[list[int], int, Sampling]] = field(default_factory=dict)
    closed: bool = False
    logprob: float = -0.25

    def objection(self, sampling: Sampling) -> str | None:
        return "scripted knows no more than 2 alternatives" if (sampling.logprobs or 0) > 2 else None

    def submit(self, ids: np.ndarray, new_tokens: int, stop: bool = False, sampling: Sampling = GREEDY) -> int:
        prompt = tuple(map(int, ids))
        self.submitted.append((prompt, new_tokens, stop, sampling))
        tokens = [*self.script(prompt), *([END] if stop else [])]
        while len(tokens) < new_tokens and not stop:
            tokens += tokens
        self.flying[len(self.submitted)] = (tokens[:new_tokens], 0, sampling)
        return len(self.submitted)

    def step(self) -> list[Progress]:
        time.sleep(self.pause)
        self.steps += 1
        if self.steps in self.fails:
            raise RuntimeError("out of memory")
        found = []
        for number, (tokens, done, sampling) in list(self.flying.items())[: self.at_once]:
            token, finished = tokens[done], done + 1 == len(tokens)
            self.flying[number] = (tokens, done + 1, sampling)
            if finished:
                del self.flying[number]
            scored = None
            if sampling.logprobs is not None:
                top = tuple((token + n, self.logprob - n) for n in range(sampling.logprobs))
                scored = [Scored(self.logprob, top)]
            found.append(Progress(number, [token], time.perf_counter(), finished, scored))
        return found

    def abort(self, request: int) -> None:
        self.aborted.append(request)
        self.flying.pop(request, None)

    def occupancy(self) -> Occupancy:
        return Occupancy(min(len(self.flying), self.at_once), 0.5)

    def ends(self) -> list[int]:
        return [END]

    def cancel(self) -> None:
        self.flying.clear()

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)


class World:
    """A server in this process, and a client of it."""

    def __init__(self, session: Scripted, tokenizer: Any, settings: Settings) -> None:
        self.said: list[str] = []
        self.session, self.tokenizer = session, Tokenizer(tokenizer)
        self.serving = Serving(settings, "tiny", self.said.append)
        self.app = make_app(self.serving)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://server")

    def put(self, session: Scripted, version: str | None = None) -> Loaded:
        stack = ExitStack()
        stack.callback(session.close)
        engine = Engine("here", "scripted", "transformers", "continuous", session, VOCABULARY, True)
        loaded = Loaded(engine, self.tokenizer, frozenset([END]), stack, version)
        self.serving.put(ServedModel(loaded))
        return loaded

    async def complete(self, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"prompt": "one", **body}, headers=headers)

    async def chat(self, text: str = "one", **body: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], **body}
        return await self.client.post("/v1/chat/completions", json=body)

    async def counts(self) -> dict[tuple[str, ...], float]:
        """(name, label values…) → value, of /metrics."""
        page = (await self.client.get("/metrics")).text
        return {
            (sample.name, *(value for label, value in sample.labels.items() if label != "model_name")): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        }


def events(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    found = [block.removeprefix("data: ") for block in response.text.removesuffix("\n\n").split("\n\n")]
    assert found[-1] == "[DONE]"
    return [json.loads(block) for block in found[:-1]]


@pytest.fixture
def run(tokenizer: Any) -> Callable[..., None]:
    """Run a test's coroutine in a world of its own."""

    def run_(
        test: Callable[[World], Awaitable[None]], answer: str = "two three four", session: Scripted | None = None,
        template: str | None = TEMPLATE, loaded: bool = True, **settings: Any,
    ) -> None:  # fmt: skip
        tokenizer.chat_template = template
        ids = tokenizer.encode(answer)

        async def main_() -> None:
            world = World(session or Scripted(lambda _: ids), tokenizer, Settings("there", **settings))
            if loaded:
                world.put(world.session)
            try:
                await asyncio.wait_for(test(world), 30)
            finally:
                await world.serving.drain(0)
                await world.serving.close()

        asyncio.run(main_())

    return run_


# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_completion(run: Callable[..., None], tokenizer: Any) -> None:
    async def test(world: World) -> None:
        length = len(tokenizer.encode("two three four"))
        body = (await world.complete(model="tiny", max_tokens=50)).json()
        (choice,) = body["choices"]
        assert (choice["index"], choice["text"], choice["finish_reason"]) == (0, "two three four", "stop")
        assert choice["logprobs"] is None
        assert (body["object"], body["model"]) == ("text_completion", "tiny")
        assert body["id"].startswith("cmpl-")
        prompt = len(tokenizer.encode("one"))
        # the token that ends the answer was made too
        expected = {
            "prompt_tokens": prompt, "completion_tokens": length + 1, "total_tokens": prompt + length + 1
        }  # fmt: skip
        assert body["usage"] == expected
        body = (await world.complete(max_tokens=length)).json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == length
        body = (await world.complete(max_tokens=2 * length, ignore_eos=True)).json()
        assert body["choices"][0]["text"] == "two three four" * 2
        assert body["choices"][0]["finish_reason"] == "length"
        assert world.session.submitted[-1][1:3] == (2 * length, False)
        assert (await world.complete()).json()["usage"]["completion_tokens"] <= protocol.COMPLETION_TOKENS

    run(test)


def test_a_streamed_completion_says_the_same(run: Callable[..., None], tokenizer: Any) -> None:
    async def test(world: World) -> None:
        whole = (await world.complete(max_tokens=50)).json()
        *chunks, last = events(await world.complete(max_tokens=50, stream=True, stream_options={"include_usage": True}))
        assert last["choices"] == []
        assert last["usage"] == whole["usage"]
        assert {chunk["id"] for chunk in chunks} == {last["id"]}
        assert all(chunk["usage"] is None and chunk["object"] == "text_completion" for chunk in chunks)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "two three four"
        assert len(chunks) >= len(tokenizer.encode("two three four"))
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
        assert all("usage" not in chunk for chunk in events(await world.complete(max_tokens=50, stream=True)))

    run(test)


def test_prompts_as_tokens_and_several_at_once(run: Callable[..., None], tokenizer: Any) -> None:
    session = Scripted(lambda prompt: [token + 1 for token in prompt])

    async def test(world: World) -> None:
        body = (await world.complete(prompt=[70, 71, 72], max_tokens=9, return_token_ids=True)).json()
        assert session.submitted[-1][0] == (70, 71, 72)
        assert body["choices"][0]["token_ids"] == [71, 72, 73, END]
        assert body["choices"][0]["prompt_token_ids"] == [70, 71, 72]
        body = (await world.complete(prompt=[[70, 71], [80], [90, 91, 92]], max_tokens=9)).json()
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        assert [choice["text"] for choice in body["choices"]] == [
            tokenizer.decode(ids) for ids in ([71, 72], [81], [91, 92, 93])
        ]
        assert body["usage"] == {"prompt_tokens": 6, "completion_tokens": 9, "total_tokens": 15}
        texts = ["one two", "three"]
        chunks = events(await world.complete(prompt=texts, max_tokens=9, stream=True, return_token_ids=True))
        for index, text in enumerate(texts):
            mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            prompt = tokenizer.encode(text)
            assert mine[0]["prompt_token_ids"] == prompt
            assert [token for piece in mine for token in piece["token_ids"]] == [*(token + 1 for token in prompt), END]
            assert "prompt_token_ids" not in mine[-1]

    run(test, session=session)


def test_chat_uses_the_models_template(run: Callable[..., None], tokenizer: Any) -> None:
    async def test(world: World) -> None:
        messages = [
            {"role": "developer", "content": "be short"},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]},
        ]
        body = (await world.chat(messages=messages)).json()
        assert tokenizer.decode(world.session.submitted[-1][0]) == "<system>be short<user>one two<assistant>"
        (choice,) = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": "two three four"}
        assert (body["object"], choice["finish_reason"]) == ("chat.completion", "stop")
        first, *chunks = events(await world.chat(stream=True, max_completion_tokens=50))
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert first["object"] == "chat.completion.chunk"
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta.get("content", "") for delta in deltas) == "two three four"
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        refused = await world.chat(messages=[{"role": "tool", "content": "x"}])
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
        assert "no tools" in refused.json()["error"]["message"]

    run(test)

    async def without(world: World) -> None:
        error = (await world.chat()).json()["error"]
        assert (error["code"], error["type"]) == ("no_chat_template", "invalid_request_error")

    run(without, template=None)


def test_a_chat_without_a_limit_may_fill_the_context(run: Callable[..., None], tokenizer: Any) -> None:
    async def test(world: World) -> None:
        await world.chat("one")
        prompt, new_tokens, _, _ = world.session.submitted[-1]
        assert new_tokens == 256 - len(prompt)
        world.session.context = None
        await world.chat("one")
        assert world.session.submitted[-1][1] == 300

    run(test, max_output_tokens=300)


def test_characters_come_whole(run: Callable[..., None], tokenizer: Any) -> None:
    answer = "naïve 日本 👩‍👧!"
    ids = tokenizer.encode(answer)

    async def test(world: World) -> None:
        chunks = events(await world.complete(max_tokens=200, stream=True))
        pieces = [chunk["choices"][0]["text"] for chunk in chunks]
        assert "".join(pieces) == answer
        assert not any(REPLACEMENT in piece for piece in pieces)
        for cut in range(1, len(ids)):
            body = (await world.complete(max_tokens=cut)).json()
            assert answer.startswith(body["choices"][0]["text"])
            assert body["usage"]["completion_tokens"] == cut

    run(test, answer)


def test_stop_strings_end_an_answer_and_free_its_place(run: Callable[..., None], tokenizer: Any) -> None:
    ids = tokenizer.encode("two three four five")

    async def test(world: World) -> None:
        needed = next(n for n in range(1, 99) if "e fo" in tokenizer.decode(ids[:n]))
        body = (await world.complete(max_tokens=50, stop="e fo")).json()
        assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("two thre", "stop")
        assert body["usage"]["completion_tokens"] == needed
        chunks = events(await world.complete(max_tokens=50, stop=["zzz", "e fo", "five"], stream=True))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "two thre"
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        body = (await world.complete(max_tokens=50, stop="five and")).json()
        assert body["choices"][0]["text"] == "two three four five"
        await until(lambda: world.session.aborted == [1, 2])

    run(test, "two three four five")


def test_log_probabilities(run: Callable[..., None], tokenizer: Any) -> None:
    ids = tokenizer.encode("two €")

    async def test(world: World) -> None:
        (choice,) = (await world.complete(max_tokens=50, logprobs=2)).json()["choices"]
        found = choice["logprobs"]
        assert found["token_logprobs"] == [-0.25] * (len(ids) + 1)
        assert found["tokens"][len(ids) - 1] == "bytes:\\xac"
        assert found["tokens"][-1] == tokenizer.decode([END])
        assert all(len(top) == 2 or len({*top}) == 1 for top in found["top_logprobs"])
        plain = [token for token in found["tokens"] if not token.startswith("bytes:")]
        assert "".join(plain[:-1]) == "two "
        assert found["text_offset"][0] == 0
        assert found["text_offset"][-1] == len("two €")
        body = (await world.chat(logprobs=True, top_logprobs=1)).json()
        entries = body["choices"][0]["logprobs"]["content"]
        assert b"".join(bytes(entry["bytes"]) for entry in entries[:-1]).decode() == "two €"
        assert entries[0]["top_logprobs"][0] == {key: entries[0][key] for key in ("token", "logprob", "bytes")}
        assert all(entry["top_logprobs"] == [] for entry in
                   (await world.chat(logprobs=True)).json()["choices"][0]["logprobs"]["content"])  # fmt: skip
        chunks = events(await world.complete(max_tokens=50, logprobs=0, stream=True))
        streamed = [chunk["choices"][0]["logprobs"]["token_logprobs"] for chunk in chunks]
        assert sum(map(len, streamed)) == len(ids) + 1
        error = (await world.complete(logprobs=3)).json()["error"]
        assert error["message"] == "scripted knows no more than 2 alternatives"

    run(test, "two €")


def test_sampling_reaches_the_session(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        await world.complete(temperature=0.5, top_p=0.9, seed=7)
        assert world.session.submitted[-1][3] == Sampling(0.5, 0.9, 7)
        await world.complete()
        assert world.session.submitted[-1][3] == Sampling(1.0, 1.0, None)
        await world.chat(temperature=0, logprobs=True, top_logprobs=2)
        assert world.session.submitted[-1][3] == Sampling(0, 1, None, 2)

    run(test)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "9"}, "max_tokens", "valid integer"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"max_tokens": 10**30}, "max_tokens", "an answer has at most"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"seed": 2**64}, "seed", "less than"),
        ({"stop": ["x"] * 1000}, "stop", "at most 16"),
        ({"stop": ["x", 5]}, "stop.1", "valid string"),
        ({"stop": ""}, "stop.0", "at least 1 character"),
        ({"stop": "x" * 5000}, "stop.0", "at most 1000"),
        ({"n": 2}, "n", "n must be 1"),
        ({"n": True}, "n", "n must be 1"),
        ({"best_of": 3}, "best_of", "not served"),
        ({"echo": True}, "echo", "not served"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not served"),
        ({"maxtokens": 5}, "maxtokens", "did you mean 'max_tokens'"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "with stream"),
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "neither a text"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": {"a": 1}}, "prompt", "neither a text"),
        ({"prompt": ["a", 5]}, "prompt", "neither a text"),
        ({"prompt": [True]}, "prompt", "neither a text"),
        ({"prompt": [5, VOCABULARY]}, "prompt", "0 to 511"),
        ({"prompt": [-1]}, "prompt", "0 to 511"),
        ({"prompt": "\ud800"}, "prompt", "surrogate"),
        ({"prompt": ["x"] * 500}, "prompt", "500 prompts"),
        ({"prompt": [5] * 101}, "prompt", "has 101 tokens; at most 100"),
        ({"prompt": [5] * 100, "max_tokens": 157}, "max_tokens", "context of 256"),
    ],
)  # fmt: skip
def test_completions_that_are_refused(run: Callable[..., None], body: dict[str, Any], param: str, says: str) -> None:
    async def test(world: World) -> None:
        given = json.dumps({"prompt": "one", **body}).encode()
        response = await world.client.post("/v1/completions", content=given)
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
        assert says in error["message"], error["message"]
        assert world.session.submitted == []

    run(test, max_prompt_tokens=100)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "messages.0.content"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_chats_that_are_refused(run: Callable[..., None], body: dict[str, Any], param: str) -> None:
    async def test(world: World) -> None:
        given = json.dumps({"messages": [{"role": "user", "content": "one"}], **body}).encode()
        response = await world.client.post("/v1/chat/completions", content=given)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text

    run(test)


def test_parameters_that_ask_for_nothing_are_taken(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        neutral = {"n": 1, "presence_penalty": 0.0, "logit_bias": {}, "best_of": None, "user": "me", "top_k": -1}
        assert (await world.complete(**neutral)).status_code == 200

    run(test)


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"nul", b'{"prompt": NaN}', b"[" * 100_000])
def test_bodies_that_are_no_json(run: Callable[..., None], body: bytes) -> None:
    async def test(world: World) -> None:
        response = await world.client.post("/v1/completions", content=body)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")

    run(test)


def test_a_body_that_is_too_large(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        large = json.dumps({"prompt": "one " * 2_500_000}).encode()
        for content in (large, in_parts(large)):
            response = await world.client.post("/v1/completions", content=content)
            assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        fits = json.dumps({"prompt": "one"}).encode()
        assert (await world.client.post("/v1/completions", content=fits + b" " * (1000 - len(fits)))).status_code == 200
        assert (await world.client.post("/v1/completions", content=fits + b" " * 1000)).status_code == 413

    async def in_parts(content: bytes) -> AsyncIterator[bytes]:
        for begin in range(0, len(content), 65536):
            yield content[begin : begin + 65536]

    run(test, max_body_bytes=1000)


def test_other_addresses_methods_and_models(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        for response, status in (
            (await world.client.get("/v1/nothing"), 404),
            (await world.client.get("/v1/completions"), 405),
            (await world.complete(model="gpt-5"), 404),
        ):
            assert response.status_code == status
            assert response.json()["error"].keys() == {"message", "type", "param", "code"}
        assert response.json()["error"]["code"] == "model_not_found"
        assert (await world.complete(model="there")).status_code == 200
        (model,) = (await world.client.get("/v1/models")).json()["data"]
        assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", 256)

    run(test)


def test_keys(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        for shown in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer secret-"}):
            response = await world.complete(headers=shown)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert (await world.client.get("/v1/models", headers=shown)).status_code == 401
        for key in ("secret", "other"):
            assert (await world.complete(headers={"Authorization": f"Bearer {key}"})).status_code == 200
        assert (await world.client.get("/health")).status_code == 200

    run(test, keys=(b"secret", b"other"))


# --- load, time and failure -------------------------------------------------------------------------------------------


async def until(happened: Callable[[], bool]) -> None:
    while not happened():
        await asyncio.sleep(0.002)


def test_a_full_queue_refuses(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        asked = [asyncio.create_task(world.complete(max_tokens=20)) for _ in range(6)]
        await until(lambda: (world.serving.running, world.serving.waiting) == (4, 2))
        refused = await world.complete()
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(refused.headers["retry-after"]) >= 1
        assert [(await task).status_code for task in asked] == [200] * 6
        assert (await world.complete()).status_code == 200

    run(test, session=Scripted(lambda _: [70] * 20, pause=0.03), max_queue=2)


def test_not_ready_while_loading_and_while_draining(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        assert (await world.client.get("/ready")).status_code == 503
        assert (await world.complete()).status_code == 503
        assert (await world.client.get("/v1/models")).status_code == 503
        world.put(world.session)
        assert (await world.client.get("/ready")).status_code == 200
        flying = asyncio.create_task(world.complete(max_tokens=30))
        await until(lambda: bool(world.session.flying))
        draining = asyncio.create_task(world.serving.drain(20))
        await until(lambda: world.serving.draining)
        assert (await world.client.get("/ready")).status_code == 503
        assert (await world.client.get("/health")).status_code == 200
        refused = await world.complete()
        assert (refused.status_code, "shutting down" in refused.text) == (503, True)
        assert (await flying).json()["usage"]["completion_tokens"] == 30
        await draining

    run(test, session=Scripted(lambda _: [70] * 30, pause=0.01), loaded=False)


def test_an_impatient_drain_tells_those_in_flight(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        flying = asyncio.create_task(world.complete(max_tokens=200, ignore_eos=True))
        await until(lambda: bool(world.session.flying))
        await world.serving.drain(0.05)
        assert (await flying).status_code == 503
        await until(lambda: not world.session.flying)

    run(test, session=Scripted(lambda _: [70], pause=0.05))


async def call(app: Any, body: dict[str, Any], hang_up: asyncio.Event) -> list[dict[str, Any]]:
    """Ask an app as a server does; the client goes away at `hang_up`."""
    sent: list[dict[str, Any]] = []
    parts = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop()
        await hang_up.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "headers": [],
        "query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("server", 80), "client": ("me", 1),
        "root_path": "",
    }  # fmt: skip
    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(run: Callable[..., None], stream: bool) -> None:
    async def test(world: World) -> None:
        hang_up = asyncio.Event()
        body = {"prompt": ["one", "two"], "max_tokens": 200, "ignore_eos": True, "stream": stream}
        asked = asyncio.create_task(call(world.app, body, hang_up))
        await until(lambda: world.session.steps > 2)
        hang_up.set()
        await asked
        await until(lambda: sorted(world.session.aborted) == [1, 2])
        assert world.session.flying == {}
        assert world.serving.model and world.serving.model.jobs == 0
        counts = await world.counts()
        assert counts["vllm:request_success_total", "abort"] == 2
        assert (await world.complete()).status_code == 200

    run(test, session=Scripted(lambda _: [70], pause=0.01))


def test_an_answer_that_takes_too_long(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        late = await world.complete(max_tokens=200, ignore_eos=True)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        *chunks, last = events(await world.complete(max_tokens=200, ignore_eos=True, stream=True))
        assert chunks
        assert last["error"]["code"] == "timeout"
        await until(lambda: not world.session.flying)

    run(test, session=Scripted(lambda _: [70], pause=0.02), timeout=0.3)


def test_a_step_that_fails_fails_those_in_flight_alone(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        failed = await world.complete(max_tokens=9)
        assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
        assert "out of memory" in failed.json()["error"]["message"]
        assert any("out of memory" in line for line in world.said)
        assert (await world.complete(max_tokens=9)).status_code == 200

    run(test, session=Scripted(lambda _: [70] * 5, fails={3}))


def test_an_answer_that_the_runtime_ends_is_not_passed_off_as_complete(run: Callable[..., None]) -> None:
    class Short(Scripted):
        def step(self) -> list[Progress]:
            return [Progress(p.request, p.tokens, p.at, True) for p in super().step()]

    async def test(world: World) -> None:
        failed = await world.complete(max_tokens=9)
        assert (failed.status_code, "after 1 tokens" in failed.text) == (500, True)

    run(test, session=Short(lambda _: [70] * 5))


# --- what is counted --------------------------------------------------------------------------------------------------


def test_metrics_by_vllms_names(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        await world.complete(prompt=[70] * 7, max_tokens=5)
        await world.complete(prompt=[70] * 3, max_tokens=50, stream=True)
        counts = await world.counts()
        assert counts["vllm:prompt_tokens_total",] == 10
        assert counts["vllm:generation_tokens_total",] == 5 + 21
        assert counts["vllm:request_success_total", "length"] == 1
        assert counts["vllm:request_success_total", "stop"] == 1
        assert counts["vllm:time_to_first_token_seconds_count",] == 2
        assert counts["vllm:inter_token_latency_seconds_count",] == 4 + 20
        assert counts["vllm:request_time_per_output_token_seconds_count",] == 2
        assert counts["vllm:e2e_request_latency_seconds_count",] == 2
        assert counts["vllm:num_requests_running",] == counts["vllm:num_requests_waiting",] == 0
        assert counts["vllm:kv_cache_usage_perc",] == 0.5
        total = counts["vllm:e2e_request_latency_seconds_sum",]
        first, gaps = (counts[f"vllm:{name}_seconds_sum",] for name in ("time_to_first_token", "inter_token_latency"))
        assert 0 < first + gaps <= total
        assert not any(name[0].startswith("pennyweight_usd_total") for name in counts)

    run(test, session=Scripted(lambda _: [70] * 20))


def test_dollars_by_team_and_project(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        for team, project in (("a", "x"), ("a", "y"), ("a", "x")):
            await world.complete(
                prompt=[70] * 10, max_tokens=5, ignore_eos=True, headers={"X-Team": team, "X-Project": project}
            )
        await world.complete(prompt=[70], max_tokens=1, ignore_eos=True)
        await world.complete(max_tokens=-1)
        counts = await world.counts()
        each = (10 * 2 + 5 * 8) / 1e6
        assert counts["pennyweight_usd_total", "tiny", "x", "a"] == pytest.approx(2 * each)
        assert counts["pennyweight_usd_total", "tiny", "y", "a"] == pytest.approx(each)
        assert counts["pennyweight_usd_total", "tiny", "", ""] == pytest.approx(10 / 1e6)
        for number in range(MOST_PAIRS + 20):
            await world.complete(max_tokens=1, headers={"X-Team": f"t{number}"})
        await world.complete(max_tokens=1, headers={"X-Team": "long" * 50})
        series = [key for key in await world.counts() if key[0] == "pennyweight_usd_total"]
        assert len(series) == MOST_PAIRS + 1
        assert ("pennyweight_usd_total", "tiny", "other", "other") in series

    run(test, prices=Prices(any=(2, 8)))


# --- one model for another --------------------------------------------------------------------------------------------


def test_a_swap_lets_the_old_model_end_its_requests(run: Callable[..., None], tokenizer: Any) -> None:
    old = Scripted(lambda _: [70] * 40, pause=0.005)
    new = Scripted(lambda _: [80] * 3)

    async def test(world: World) -> None:
        flying = [asyncio.create_task(world.complete(max_tokens=40)) for _ in range(6)]
        await until(lambda: old.steps > 3)
        world.put(new, version="2")
        answers = [(await world.complete(max_tokens=9, return_token_ids=True)).json() for _ in range(3)]
        assert all(answer["choices"][0]["token_ids"] == [80, 80, 80, END] for answer in answers)
        assert not old.closed
        for task in flying:
            assert (await task).json()["usage"]["completion_tokens"] == 40
        await until(lambda: old.closed)
        assert old.aborted == []
        assert not new.closed
        assert (await world.client.get("/v1/models")).json()["data"][0]["version"] == "2"

    run(test, session=old)


class Registry:
    """What an alias names, and which versions can be loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **aliases: str) -> None:
        self.aliases: dict[str, str | Exception] = dict(aliases)
        self.broken: dict[str, Exception] = {}
        self.loaded: list[str] = []
        self.swaps: list[Any] = []
        self.said: list[str] = []
        monkeypatch.setattr(tracking, "version_at", self.version_at)

    def version_at(self, model: str, alias: str) -> str | None:
        found = self.aliases.get(alias)
        if isinstance(found, Exception):
            raise found
        return found

    async def load(self, version: str) -> Any:
        self.loaded.append(version)
        if version in self.broken:
            raise self.broken[version]
        return f"model {version}"

    def follower(self, alias: str = "champion") -> Follower:
        return Follower("m", alias, self.load, self.swaps.append, self.said.append)


def test_a_follower_serves_what_the_alias_names(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(monkeypatch, champion="1")
    follower = registry.follower()

    async def follow() -> None:
        assert await follower.start() == "model 1"
        await follower.look()
        registry.aliases["champion"] = "2"
        await follower.look()
        await follower.look()
        assert registry.swaps == ["model 2"]
        registry.aliases["champion"], registry.broken["3"] = "3", StageError("it answers nonsense")
        await follower.look()
        await follower.look()
        assert registry.swaps == ["model 2", None]
        assert registry.loaded == ["1", "2", "3"]
        assert "version 3 cannot be served: it answers nonsense; version 2 is still served" in registry.said[-1]
        registry.aliases["champion"] = "2"
        await follower.look()
        assert registry.loaded == ["1", "2", "3"]

    asyncio.run(follow())


def test_a_registry_that_cannot_be_reached_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(monkeypatch, champion="1")
    follower = registry.follower()

    async def follow() -> None:
        await follower.start()
        registry.aliases["champion"] = TrackingError("the MLflow server does not answer")
        for _ in range(5):
            await follower.look()
        assert len(registry.said) == 1
        registry.aliases["champion"], registry.broken["2"] = "2", TrackingError("the download broke off")
        for _ in range(3):
            await follower.look()
        assert registry.loaded == ["1", "2", "2", "2"]
        assert len(registry.said) == 2
        del registry.broken["2"]
        await follower.look()
        assert registry.swaps == ["model 2"]
        del registry.aliases["champion"]
        await follower.look()
        await follower.look()
        assert "has no champion any more; version 2 is still served" in registry.said[-1]
        assert len(registry.said) == 4

    asyncio.run(follow())


def test_a_champion_that_fails_at_the_start_leaves_its_place_to_previous(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(monkeypatch, champion="5", previous="4")
    registry.broken["5"] = SourceError("its files are not those that were registered")
    follower = registry.follower()

    async def follow() -> None:
        assert await follower.start() == "model 4"
        assert "version 5, the champion, cannot be served: its files" in registry.said[0]
        await follower.look()
        assert registry.loaded == ["5", "4"]
        del registry.aliases["previous"]
        with pytest.raises(SourceError):
            await registry.follower().start()
        registry.aliases.clear()
        with pytest.raises(UsageError, match="m has no champion"):
            await registry.follower().start()

    asyncio.run(follow())


# --- before and around it ---------------------------------------------------------------------------------------------


def candidate(folder: Path, runtime: str = "transformers") -> Candidate:
    checkpoint = Checkpoint(
        path=str(folder), digest="c" * 64, bytes=1, weight_bytes=1, format="safetensors", dtype="bfloat16",
        parameters=1, origin="test",
    )  # fmt: skip
    return Candidate(
        id=f"int8@{runtime}", variant="int8", runtime=runtime, checkpoint=checkpoint, path=str(folder), digest="d" * 64,
        bytes=1, weight_bytes=1, dtype="float32",
    )  # fmt: skip


def test_a_candidate_is_checked_on_the_path_that_requests_take(tiny_model: Path) -> None:
    good = Scripted(lambda prompt: [70, 71, 72, 73])
    check_.check(candidate(tiny_model), good)
    ((prompt, new_tokens, stop, sampling),) = good.submitted
    assert (new_tokens, stop, sampling.logprobs) == (4, False, 0)
    assert len(set(prompt)) == check_.PROMPT_TOKENS
    for bad, says in (
        (Scripted(lambda prompt: [70], logprob=float("nan")), "log-probabilities"),
        (Scripted(lambda prompt: [70], logprob=float("-inf")), "log-probabilities"),
        (Scripted(lambda prompt: [9999]), "tokens"),
    ):
        with pytest.raises(StageError, match=says):
            check_.check(candidate(tiny_model), bad)


def test_where_evidence_lies_beside_it_a_candidate_must_say_what_was_judged(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"weights")
    judged = candidate(tmp_path, "onnxruntime")
    known = bigrams.probe_of(judged)
    assert check_.probe_in(tmp_path) is None
    (tmp_path / EVIDENCE).write_text(json.dumps({"probe": known.model_dump(mode="json")}))
    assert check_.probe_in(tmp_path) == known
    session = bigrams.Bigrams(judged, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_, "answer", lambda candidate, session: None)
        bigrams.install(patch)
        assert "on 510 tokens" in check_.check(judged, session)
        session.table[:, 5] += 1.0
        with pytest.raises(StageError, match="does not say here what the gate judged"):
            check_.check(judged, session)


def test_names() -> None:
    assert name_of("models:/tiny/3") == name_of("models:/tiny@champion") == name_of("tiny@champion") == "tiny"
    assert name_of("/models/smol/") == "smol"
    assert name_of("runs/latest:int8@onnxruntime") == "latest:int8@onnxruntime"


def test_keys_and_prices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENNYWEIGHT_API_KEYS", "a, b,,")
    file = tmp_path / "keys"
    file.write_text("# ours\n\nc \n")
    assert read_keys(file) == (b"a", b"b", b"c")
    file.write_text("# none\n")
    with pytest.raises(UsageError, match="has no keys"):
        read_keys(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_keys(tmp_path / "missing")
    assert read_prices(None, "0.5:$2").of("any@thing") == (0.5, 2)
    for wrong in ("1", "a:b", "-1:2", "nan:1"):
        with pytest.raises(UsageError, match="--price-per-1m"):
            read_prices(None, wrong)
    interval = {"value": 1.5, "low": 1, "high": 2}
    price = parse_price("1", load_prices(None)).model_dump(mode="json")
    card = {
        "price": price, "usd_per_hour": 1.0, "usd_per_1m_input": interval,
        "usd_per_1m_output": interval | {"value": 6}, "usd_per_idle_hour": 1.0, "mixes": [],
    }  # fmt: skip
    file.write_text(
        json.dumps([{"candidate": "a@x", "card": card, "break_even": None}, {"candidate": "b@x", "card": None}])
    )
    prices = read_prices(file, None)
    assert (prices.of("a@x"), prices.of("b@x")) == ((1.5, 6), None)
    file.write_text(json.dumps({"card": card, "api": None}))
    assert read_prices(file, None).of("whatever") == (1.5, 6)
    file.write_text("[]")
    with pytest.raises(UsageError, match="no candidate with a price card"):
        read_prices(file, None)
    file.write_text('{"a": 1}')
    with pytest.raises(UsageError, match="is no price card"):
        read_prices(file, None)


def test_the_command_for_vllm(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENNYWEIGHT_HOME", str(tmp_path))
    monkeypatch.setenv("PENNYWEIGHT_API_KEYS", "secret")
    done = CliRunner().invoke(main, ["serve", str(tiny_model), "--print-command", "--name", "my model", "--port", "99"])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == (
        f"vllm serve {tiny_model} --served-model-name 'my model' --host 127.0.0.1 --port 99 --dtype bfloat16 "
        "--max-model-len 512"
    )
    settings = Settings(str(tiny_model), max_prompt_tokens=100, max_output_tokens=50, keys=(b"secret",))
    with ExitStack() as stack:
        assert vllm.command(settings, Store(), stack)[-1] == "150"
    assert vllm.environment(settings) == {"VLLM_API_KEY": "secret"}
    with pytest.raises(UsageError, match="one API key"):
        vllm.environment(Settings("x", keys=(b"a", b"b")))


def test_a_port_that_is_taken(tiny_model: Path) -> None:
    with contextlib.closing(listen("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(main, ["serve", str(tiny_model), "--port", str(port)])
        assert done.exit_code == 2
        assert f"127.0.0.1:{port} cannot be listened on" in done.stderr


# --- a real process ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def running(folder: Path, home: Path, *options: str) -> AsyncIterator[tuple[str, subprocess.Popen[str]]]:
    """A server in a process of its own, ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pennyweight", "serve", str(folder), "--port", str(port), *options]
    environment = os.environ | {"PENNYWEIGHT_HOME": str(home)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, process.stderr.read()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/ready").close()
                break
            await asyncio.sleep(0.1)
        yield url, process
    finally:
        process.kill()
        process.wait()


def test_a_real_model_from_the_command_line(tiny_model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        options = ("--runtime", "transformers", "--name", "tiny", "--drain-seconds", "60")
        async with (
            running(tiny_model, tmp_path, *options) as (url, process),
            httpx.AsyncClient(base_url=url, timeout=60) as client,
        ):
            body = {"prompt": "the river runs", "max_tokens": 8, "temperature": 0, "return_token_ids": True}
            whole = (await client.post("/v1/completions", json=body)).json()
            (choice,) = whole["choices"]
            assert len(choice["token_ids"]) == 8
            assert below_best(tiny_model, choice["prompt_token_ids"], choice["token_ids"]) < 0.5
            seeded = body | {"temperature": 1, "seed": 3, "max_tokens": 20}
            twice = [(await client.post("/v1/completions", json=seeded)).json() for _ in range(2)]
            assert twice[0]["choices"] == twice[1]["choices"]
            large = await client.post("/v1/completions", content=b"x" * 10_000_000)
            assert large.status_code == 413
            long = {"prompt": "one", "max_tokens": 400, "ignore_eos": True, "stream": True, "temperature": 0}
            async with client.stream("POST", "/v1/completions", json=long) as response:
                lines = response.aiter_lines()
                await anext(lines)
                process.send_signal(signal.SIGTERM)
                rest = [line async for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
            assert await asyncio.to_thread(process.wait, 60) == 0
            told = process.stderr.read()
            assert "continuous batching" in told
            assert "Traceback" not in told

    asyncio.run(test())


def below_best(folder: Path, prompt: list[int], answer: list[int]) -> float:
    """How many nats a token of the answer is below the best at its place, at most."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1], -1)
    return (logprobs.max(-1).values - logprobs[torch.arange(len(answer)), torch.tensor(answer)]).max().item()
