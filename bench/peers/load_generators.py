"""Our load generator beside guidellm's: the same load on the same server, in turns, in one run.

    python bench/peers/load_generators.py --fake                               a server that sleeps: the truth is known
    python bench/peers/load_generators.py                                      llama.cpp's, on the embedded model
    python bench/peers/load_generators.py --rate 1.2                           the same, in an open loop
    python bench/peers/load_generators.py --server-url URL                     one that runs already

Each turn is a process of its own, as a user would start it: `pennyweight bench`, `guidellm run` (twice: as it comes,
with a worker process for each stream up to 10, and with one, which suits one core), and `vllm bench serve` where vLLM
is installed beside Pennyweight (that command has not been tried). A round is A B C C B A. All get the same prompts, cut
by words, greedy decoding, `ignore_eos`, and answers of one length; prompts differ from turn to turn, and llama.cpp
keeps no cache of them. In a closed loop the users of a real server drift in and out of step, each turn otherwise, and
the medians with them; with `--rate` requests arrive evenly spaced instead, at the same moments in every turn. With two
cores or more the server has the first half of them and the clients the other.

Shown are the medians of TTFT and TPOT and the output tokens/s that each states, and its CPU time from start to end.
Ratios are ours over theirs, turn by turn, with 95% intervals. With `--fake`, also its CPU time while it was served, how
far each is off what the server itself saw, and the share of what the server could have served that each made it serve.
The bars: within 5% of theirs, with less CPU time.

guidellm and llama.cpp (xllamacpp, a wheel) are installed from the package index into environments of their own, in
`pennyweight-peers` beside the store. Linux only, as it pins cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import servers
import turns
from clients import Load, Turn, clients, take_turn

from pennyweight import datasets, formats, shipped
from pennyweight.columns import columns
from pennyweight.load.bench import read_texts
from pennyweight.load.http import served_model
from pennyweight.load.workload import Prompts
from pennyweight.recipe import DataSource, load_recipe
from pennyweight.sources import fetch_base
from pennyweight.store import Store

TEXT = "xsum-documents"
AGREEMENT = 0.05


@dataclass(frozen=True)
class Truth:
    """What a server of known behaviour saw of one turn."""

    ttft_ms: float
    tpot_ms: float
    output_tokens_per_second: float
    """From the first arrival to the last token."""

    @classmethod
    def of(cls, seen: Sequence[Sequence[float]]) -> Truth:
        """`seen`: (arrived, first token, last token, tokens) of each request, in seconds."""
        begin, end = min(row[0] for row in seen), max(row[2] for row in seen)
        return cls(
            statistics.median(1000 * (first - arrived) for arrived, first, _, _ in seen),
            statistics.median(1000 * (last - first) / (tokens - 1) for _, first, last, tokens in seen),
            sum(tokens for *_, tokens in seen) / (end - begin),
        )


@dataclass(frozen=True)
class Outcome:
    """One turn of one load generator."""

    turn: Turn
    truth: Truth | None = None

    def cpu_ms(self, seconds: float | None) -> float:
        """Of a request."""
        return 1000 * (seconds or 0.0) / self.turn.stated.requests


#: What is compared: its name, and where it stands in an outcome.
Measures = dict[str, Callable[[Outcome], float]]
STATED: Measures = {
    "TTFT, ms": lambda outcome: outcome.turn.stated.ttft_ms,
    "TPOT, ms": lambda outcome: outcome.turn.stated.tpot_ms,
    "output tokens/s": lambda outcome: outcome.turn.stated.output_tokens_per_second,
}
TRUE: Measures = {
    "TTFT, ms": lambda outcome: outcome.truth.ttft_ms,
    "TPOT, ms": lambda outcome: outcome.truth.tpot_ms,
    "output tokens/s": lambda outcome: outcome.truth.output_tokens_per_second,
}
CPU: Measures = {"CPU, ms a request": lambda outcome: outcome.cpu_ms(outcome.turn.cpu_seconds)}
SERVING: Measures = {"while served": lambda outcome: outcome.cpu_ms(outcome.turn.serving_cpu_seconds)}


def main() -> None:
    options = parse()
    all_cores = sorted(os.sched_getaffinity(0))
    half = len(all_cores) // 2
    cores = set(all_cores[:half] or all_cores), set(all_cores[half:])
    store = Store()
    base = Path(fetch_base(load_recipe("smollm2-135m-cpu").base, store)[0].path)
    tokenizer = options.tokenizer or base
    contenders = clients()
    with (
        tempfile.TemporaryDirectory() as scratch,
        server(options, base, Path(scratch), cores[0]) as (url, events, what),
    ):
        where = "wherever it is" if options.server_url else f"on core {spelled(cores[0])}"
        load = f"{options.concurrency} users" if options.rate is None else f"{options.rate:g} requests a second"
        print(f"{what} {where}, clients on core {spelled(cores[1])}; {load}")
        print(f"{options.requests} requests of about {options.input_tokens} tokens in, {options.output_tokens} out")
        model = options.model or asyncio.run(served_model(url, None))
        texts = written_texts(store, Path(scratch), options)

        def turn(name: str, requests: int) -> Outcome:
            load = Load(
                url, model, tokenizer, *next(texts), options.input_tokens, options.output_tokens, options.concurrency,
                requests, options.rate,
            )  # fmt: skip
            taken = take_turn(contenders[name], load, cores[1], events)
            return Outcome(taken, Truth.of(seen(url)) if options.fake else None)

        for name in contenders:  # what is only slow once: a new environment, files not yet in memory
            turn(name, options.concurrency)
        outcomes: dict[str, list[Outcome]] = {name: [] for name in contenders}
        for number, name in turns.order(list(contenders), options.rounds):
            outcomes[name].append(turn(name, options.requests))
            print(f"round {number}: {name}: {told(outcomes[name][-1])}", file=sys.stderr, flush=True)
    print("", *report(outcomes, ideal(options) if options.fake else None), sep="\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--fake", action="store_true", help="a server that sleeps, and knows what it did")
    where.add_argument("--server-url", help="a server that runs already, without /v1")
    parser.add_argument("--ttft-ms", type=float, default=200.0, help="of --fake (default 200)")
    parser.add_argument("--tpot-ms", type=float, default=20.0, help="of --fake (default 20)")
    parser.add_argument("--model", help="name at the server")
    parser.add_argument("--tokenizer", type=Path, help="its folder, for vLLM (default: the embedded model's)")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--rate", type=float, help="requests a second, evenly spaced, in place of users")
    parser.add_argument("--requests", type=int, default=160, help="a multiple of the concurrency (default 160)")
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.requests % options.concurrency or options.requests == options.concurrency:
        parser.error("--requests must be a multiple of --concurrency, and more: else the last users wait alone")
    if options.rate and options.fake:
        parser.error("--fake is for a closed loop: its truth is what users who never wait would be served")
    if options.output_tokens < 2:
        parser.error("a single token has no TPOT")
    return options


@contextmanager
def server(options: Any, base: Path, scratch: Path, cores: set[int]) -> Iterator[tuple[str, int | None, str]]:
    """(address, where it tells of its requests, what it is)"""
    if options.server_url:
        yield options.server_url.rstrip("/"), None, options.server_url
    elif options.fake:
        with servers.known(options.ttft_ms, options.tpot_ms, cores) as (url, events):
            yield url, events, f"a server that sleeps for {options.ttft_ms:g} ms, then {options.tpot_ms:g} ms a token,"
    else:
        file = Path(formats.export(str(base), "gguf", scratch / "base.gguf").path)
        context = 2 * options.input_tokens + options.output_tokens  # prompts are cut by words
        with servers.llama_cpp(file, options.concurrency, context, len(cores), cores) as url:
            yield url, None, f"llama.cpp ({servers.LLAMA_CPP}), the embedded model in 16 bits,"


def written_texts(store: Store, scratch: Path, options: Any) -> Iterator[tuple[Path, Path]]:
    """(text, prompts) for one turn after the other: the same prompts for every load generator's way to read them."""
    source = DataSource.model_validate(shipped.sources()[TEXT])
    documents = list(datasets.texts(datasets.fetch(TEXT, source, store)[0]))
    for number in count():
        text, prompts = scratch / f"{number}.txt", scratch / f"{number}.jsonl"
        first = 97 * number % len(documents)  # documents away from the last turn's
        text.write_text("\n\n".join(documents[first:] + documents[:first]))
        cut = Prompts(read_texts(text))
        with prompts.open("w") as stream:
            for _ in range(options.requests):
                asked = cut.ask(options.input_tokens, options.output_tokens)
                row = {"prompt": asked.prompt, "output_tokens_count": asked.output_tokens}
                stream.write(json.dumps(row) + "\n")
        yield text, prompts


def seen(url: str) -> Any:
    with urllib.request.urlopen(f"{url}/seen") as answer:
        return json.load(answer)


def ideal(options: Any) -> float:
    """Tokens a second of users who never wait between two requests."""
    seconds = (options.ttft_ms + (options.output_tokens - 1) * options.tpot_ms) / 1000
    return options.concurrency * options.output_tokens / seconds


def told(outcome: Outcome) -> str:
    measures = STATED | CPU | (SERVING if outcome.truth else {})
    return (
        ", ".join(f"{name} {read(outcome):.4g}" for name, read in measures.items()) + f", {outcome.turn.seconds:.0f} s"
    )


def report(outcomes: Mapping[str, Sequence[Outcome]], could: float | None) -> Iterator[str]:
    """Lines: what each stated, ours against theirs, and against the truth where it is known.

    `could`: tokens a second that a server of known behaviour could have served.
    """
    measures = STATED | CPU | ({} if could is None else SERVING)
    rows = [["", *measures]]
    for name, found in outcomes.items():
        rows.append([name, *(turns.show(turns.mean([read(o) for o in found])) for read in measures.values())])
    yield from (*columns(rows), "")
    ours, *others = outcomes
    rows = [[f"{ours} over", *measures, f"within {AGREEMENT:.0%}", "less CPU"]]
    for name in others:
        ratios = {
            measure: turns.ratio([read(o) for o in outcomes[ours]], [read(o) for o in outcomes[name]])
            for measure, read in measures.items()
        }
        agrees = all(abs(ratios[measure].value - 1) <= AGREEMENT for measure in STATED)
        cheaper = all(ratios[measure].high < 1 for measure in measures if measure not in STATED)
        rows.append([name, *map(turns.show, ratios.values()), *("yes" if met else "NO" for met in (agrees, cheaper))])
    yield from columns(rows)
    if could is None:
        return
    rows = [["stated less what the server saw", *STATED, "of what it could serve"]]
    for name, found in outcomes.items():
        share = statistics.median(o.truth.output_tokens_per_second / could for o in found)
        rows.append([name, *(error(found, measure) for measure in STATED), f"{share:.1%}"])
    yield from ("", *columns(rows))


def error(outcomes: Sequence[Outcome], measure: str) -> str:
    """The median over turns: in the measure's own unit, and relative."""
    pairs = [(STATED[measure](o), TRUE[measure](o)) for o in outcomes]
    off = statistics.median(stated - true for stated, true in pairs)
    return f"{off:+.2f} ({statistics.median(stated / true - 1 for stated, true in pairs):+.1%})"


def spelled(cores: set[int]) -> str:
    return ", ".join(map(str, sorted(cores)))


if __name__ == "__main__":
    main()
