"""A server under clients that misbehave: is any request lost or mixed up, and does memory stay flat?

    python bench/soak.py TARGET [--requests 2000] [--concurrency 64] [--promote VERSION ...] [--rescore 2000]

Of ten requests one hangs up in the middle, one has a body that is no JSON or asks for nonsense, one a prompt that is
too long; the others are plain, some streamed. Every prompt begins with a number of its own, and every answer must carry
the tokens of that prompt. With --promote, `pennyweight promote` makes each of those versions of a NAME@ALIAS the
champion in turn, at even distances, and the server has to swap. What is resident is told for the end of each phase:
engines differ in size, so phases of one version are to be compared. At the end each answer's tokens are scored alone by
the model whose fingerprint the answer carries: none may be more than 0.5 nat less likely than the best. Beside them
stand answers to the same prompts that the model gives alone, scored in the same way: what those are off by is the
engine's own, which multiplies a prompt by other kernels than single tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import psutil
from serving import served

from pennyweight.load import models
from pennyweight.runtimes import Session
from pennyweight.store import Store

BAR = 0.5
KINDS = ("plain",) * 4 + ("streamed",) * 3 + ("hangs up", "malformed", "too long")
MALFORMED: tuple[Any, ...] = (
    b"{", b"[1, 2", {"prompt": "x", "max_tokens": -1}, {"prompt": "x", "stop": ["s"] * 1000}, {"prompt": 5},
    {"model": "nobody", "prompt": "x"},
)  # fmt: skip
#: Statuses that those may be refused with.
REFUSALS = {"malformed": (400, 404), "too long": (400, 413)}
WORDS = "river stone light garden bridge winter letter quiet small bread copper window seven northern glass".split()  # noqa: SIM905
SECONDS_TO_LOOK = 0.5


@dataclass
class Soak:
    url: str
    requests: int
    draw: random.Random
    decode: Any
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    answers: list[tuple[str, list[int], list[int]]] = field(default_factory=list)
    """(fingerprint, prompt, answer), in tokens."""
    done: int = 0

    async def one(self, session: aiohttp.ClientSession, number: int) -> None:
        kind = self.draw.choice(KINDS)
        words = " ".join(self.draw.choice(WORDS) for _ in range(self.draw.randint(5, 40)))
        prompt = f"Number {number:06d}: {words}"
        body: Any = {
            "prompt": prompt, "max_tokens": self.draw.randint(4, 48), "temperature": 0, "return_token_ids": True,
            "ignore_eos": True, "stream": kind in ("streamed", "hangs up"),
        }  # fmt: skip
        if kind == "malformed":
            body = self.draw.choice(MALFORMED)
        elif kind == "too long":
            body["prompt"] = prompt * self.draw.choice((2_000, 50_000))
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            async with session.post(f"{self.url}/v1/completions", data=data) as response:
                await self._check(kind, number, body, response)
        except Exception as error:
            self.wrong.append(f"{number} ({kind}): {type(error).__name__}: {error}")
        self.done += 1

    async def _check(self, kind: str, number: int, body: Any, response: aiohttp.ClientResponse) -> None:
        if kind in REFUSALS:
            error = (await response.json(content_type=None))["error"]
            assert response.status in REFUSALS[kind], f"HTTP {response.status}: {error}"
            self.outcomes[f"{kind}: refused with {response.status}"] += 1
            return
        assert response.status == 200, f"HTTP {response.status}: {await response.text()}"
        if kind == "hangs up":
            await response.content.readany()
            response.close()
            self.outcomes["hung up"] += 1
            return
        chunks = await _chunks(response) if kind == "streamed" else [await response.json()]
        choices = [chunk["choices"][0] for chunk in chunks]
        prompt = choices[0]["prompt_token_ids"]
        answer = [token for choice in choices for token in choice["token_ids"]]
        assert f"Number {number:06d}:" in self.decode(prompt), f"the answer is to {self.decode(prompt)!r}"
        assert len(answer) == body["max_tokens"], f"{len(answer)} tokens of {body['max_tokens']}"
        assert choices[-1]["finish_reason"] == "length"
        self.outcomes[f"{kind}: complete"] += 1
        self.answers.append((chunks[0]["system_fingerprint"], prompt, answer))


async def _chunks(response: aiohttp.ClientResponse) -> list[Any]:
    blocks = (await response.text()).removesuffix("\n\n").split("\n\n")
    assert blocks[-1] == "data: [DONE]", f"the stream ends with {blocks[-1]!r}"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


@dataclass
class Phase:
    """A part of the soak: up to the promotion that ends it."""

    version: str | None
    fingerprint: str
    resident: list[int] = field(default_factory=list)
    """Bytes of the server, look by look."""

    def __str__(self) -> str:
        late = np.median(self.resident[len(self.resident) // 2 :]) / 2**20
        return f"{f'version {self.version}' if self.version else self.fingerprint}: {late:.0f} MiB"


async def load(soak: Soak, concurrency: int, promotions: list[list[str]], process: psutil.Process) -> list[Phase]:
    """Send all requests; `promotions` are commands that each end a phase."""
    numbers = iter(range(soak.requests))
    connector = aiohttp.TCPConnector(limit=0)
    phases = [Phase(*await _versions(soak.url))]
    watching = asyncio.create_task(watch(process, phases))
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def user() -> None:
            for number in numbers:
                await soak.one(session, number)

        users = [asyncio.create_task(user()) for _ in range(concurrency)]
        for number, promote in enumerate(promotions, 1):
            while soak.done < soak.requests * number // (len(promotions) + 1):
                await asyncio.sleep(0.1)
            if promote[-1] == phases[-1].version:
                raise SystemExit(f"version {promote[-1]} is served already; promote another one first")
            await asyncio.to_thread(subprocess.run, promote, check=True)
            while (served := await _versions(soak.url)) == (phases[-1].version, phases[-1].fingerprint):
                await asyncio.sleep(0.2)
            phases.append(Phase(*served))
        await asyncio.gather(*users)
    watching.cancel()
    return [phase for phase in phases if phase.resident]  # the last promotion may come after the last request


async def watch(process: psutil.Process, phases: list[Phase]) -> None:
    while True:
        phases[-1].resident.append(process.memory_info().rss)
        await asyncio.sleep(SECONDS_TO_LOOK)


def rescore(session: Session, answers: list[tuple[list[int], list[int]]]) -> list[float]:
    """How many nats each token is below the best at its place, every answer alone."""
    import torch

    below = []
    for prompt, answer in answers:
        logits = session.logits(np.array([prompt + answer], np.int64))[0, len(prompt) - 1 : -1].float()
        logprobs = torch.log_softmax(logits, -1)
        tokens, ends = torch.tensor(answer), torch.tensor(session.ends())
        chosen = logprobs[torch.arange(len(answer)), tokens]
        best = logprobs.max(-1).values
        # As answers are to go on, one runtime goes on after an end, and another leaves ends out of its choice.
        logprobs[:, ends] = -torch.inf
        best = torch.where(torch.isin(tokens, ends), best, logprobs.max(-1).values)
        below += (best - chosen).tolist()
    return below


def alone(session: Session, answers: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
    """The same prompts, with what the model answers to one at a time."""
    said = [session.generate(np.array([prompt], np.int64), len(answer)).tokens[0] for prompt, answer in answers]
    return [(prompt, list(map(int, tokens))) for (prompt, _), tokens in zip(answers, said)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--runtime")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--promote", metavar="VERSION", nargs="+", default=[], help="of the model in NAME@ALIAS")
    parser.add_argument("--rescore", type=int, default=2000, help="answers that are scored again, at most")
    parser.add_argument("--port", type=int, default=8124)
    args = parser.parse_args()
    name = args.target.partition("@")[0]
    runtime = ["--runtime", args.runtime] if args.runtime else []
    promotion = [sys.executable, "-m", "pennyweight", "promote", name, "--version"]
    promotions = [[*promotion, version] for version in args.promote]
    with ExitStack() as stack:
        model = models.find(args.target, Store(), stack)
        tokenizer = models.load_tokenizer(model)
        before = len(psutil.Process().children())
        arguments = [args.target, *runtime, "--max-prompt-tokens", "1024", "--follow-seconds", "2"]
        with served(arguments, args.port) as url:
            process = psutil.Process().children()[before:][0]
            soak, begun = Soak(url, args.requests, random.Random(0), tokenizer.decode), time.perf_counter()

            async def run() -> tuple[list[Phase], float]:
                phases = await load(soak, args.concurrency, promotions, process)
                await asyncio.sleep(1)
                return phases, await _left(url)

            phases, left = asyncio.run(run())
            seconds = time.perf_counter() - begun
        print(f"{soak.done} requests in {seconds:.0f} s")
        for outcome, count in sorted(soak.outcomes.items()):
            print(f"  {count:5} {outcome}")
        print(f"lost or wrong: {len(soak.wrong)}", *soak.wrong[:10], sep="\n  ")
        print(f"requests left in the server: {left:g}")
        print(f"resident: {'; '.join(map(str, phases))}; peak {max(max(p.resident) for p in phases) / 2**20:.0f} MiB")
        for version, fingerprint in {
            phase.fingerprint: (phase.version, phase.fingerprint) for phase in phases
        }.values():
            mine = [answer[1:] for answer in soak.answers if answer[0] == fingerprint][: args.rescore]
            target = f"models:/{name}/{version}" if version else args.target
            session = _session(target, args.runtime, stack)
            print(f"{fingerprint} {f'version {version}, ' if version else ''}{len(mine)} answers, tokens scored alone:")
            for how, pairs in (("served", mine), ("alone", alone(session, mine))):
                below = rescore(session, pairs)
                over = sum(value > BAR for value in below)
                worst = f"at most {max(below):.3f} nat below the best"
                print(f"  {how}: {len(below)} tokens, {worst}, {over} above the bar of {BAR}")


async def _versions(url: str) -> tuple[str | None, str]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/models") as response:
        (entry,) = (await response.json())["data"]
    return entry["version"], entry["system_fingerprint"]


async def _left(url: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(names))


def _session(target: str, runtime: Any, stack: ExitStack) -> Session:
    model = models.find(target, Store(), stack)
    demand = models.Demand([(64, 8)], users=1)
    return models.open_engine(model, runtime, demand, True, Store(), stack, print).session


if __name__ == "__main__":
    main()
