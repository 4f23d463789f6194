"""Time to first token of `pennyweight serve` beside llama.cpp's server: the same weights at the same open-loop rate.

    python bench/peers/ttft.py [--rate 1.5] [--workload 64:32] [--requests 160] [--rounds 2]

Both serve the embedded model in 16 bits from the same GGUF tensors, Pennyweight through OpenVINO, llama.cpp (xllamacpp,
a wheel) with `--slots` requests at once. Both may use all cores, and the load generator takes what it needs of them;
the server that is not asked waits. A turn is one Poisson course of arrivals, the same in every turn, of prompts of one
length in tokens, others in every turn; a round is A B B A. Ratios are ours over theirs, turn by turn. The bar for p95
of TTFT is 1.2.

The first run downloads model and text. llama.cpp is installed into an environment of its own, in `pennyweight-peers`
beside the store. Linux only.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import servers
import turns
from serving import Tokens, served

from pennyweight import formats, machine
from pennyweight.columns import columns
from pennyweight.load import bench
from pennyweight.load.bench import Load
from pennyweight.load.command import Options, prepare
from pennyweight.load.report import LoadReport
from pennyweight.recipe import load_recipe
from pennyweight.sources import fetch_base
from pennyweight.store import Store

BAR = 1.2
OURS, THEIRS = "pennyweight", "llama.cpp"

MEASURES: dict[str, Callable[[LoadReport], float]] = {
    "TTFT p50, ms": lambda load: load.ttft_ms.p50,
    "TTFT p95, ms": lambda load: load.ttft_ms.p95,
    "TPOT p50, ms": lambda load: load.tpot_ms.p50,
    "latency p95, ms": lambda load: load.latency_ms.p95,
    "output tokens/s": lambda load: load.output_tokens_per_second.value,
}


def main() -> None:
    options = parse()
    store = Store()
    base = Path(fetch_base(load_recipe("smollm2-135m-cpu").base, store)[0].path)
    prompt, _, answer = options.workload.partition(":")
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        file = Path(formats.export(str(base), "gguf", Path(scratch) / "base.gguf").path)
        cores, context = os.sched_getaffinity(0), int(prompt) + int(answer) + 8
        theirs = stack.enter_context(servers.llama_cpp(file, options.slots, context, machine.threads(), cores))
        ours = stack.enter_context(served([str(base), "--name", "served", "--runtime", "openvino"], options.port))
        asked = Options(
            ours, model="served", workload=options.workload, rate=(options.rate,), requests=options.requests,
            tokenizer=str(base),
        )  # fmt: skip
        settings = prepare(asked, store, stack, print)
        places = {OURS: Tokens(ours, "served"), THEIRS: Tokens(theirs, "served")}
        for place in places.values():  # whatever is done once, is done
            bench.run(replace(settings, place=place, loads=(Load(4),), requests=8), lambda _: None)
        print(f"{options.rate:g} requests a second, Poisson, {options.workload} tokens, {options.requests} in a turn")
        found: dict[str, list[LoadReport]] = {name: [] for name in places}
        for number, name in turns.order(list(places), options.rounds):
            report = bench.run(replace(settings, place=places[name]), lambda _: None).report
            (load,) = report.loads
            if load.failed or load.saturated:
                raise SystemExit(f"{name} did not keep up: {load.failed or 'lower --rate'}")
            found[name].append(load)
            share = report.client_cpu_share / machine.usable_cores()
            told = ", ".join(f"{measure} {read(load):.4g}" for measure, read in MEASURES.items())
            print(f"round {number} {name}: {told}; load generator {share:.1%} of the cores", flush=True)
    rows = [["", *MEASURES]]
    for name, loads in found.items():
        rows.append([name, *(turns.show(turns.mean([read(load) for load in loads])) for read in MEASURES.values())])
    ratios = {
        measure: turns.ratio([read(load) for load in found[OURS]], [read(load) for load in found[THEIRS]])
        for measure, read in MEASURES.items()
    }
    rows.append(["ratio", *map(turns.show, ratios.values())])
    print("", *columns(rows), sep="\n")
    print(f"p95 of TTFT: {turns.show(ratios['TTFT p95, ms'])} of {THEIRS}'s; bar {BAR}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=1.5, help="requests a second (default 1.5)")
    parser.add_argument("--workload", default="64:32")
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--slots", type=int, default=32, help="of llama.cpp (default 32)")
    parser.add_argument("--port", type=int, default=8124)
    return parser.parse_args()


if __name__ == "__main__":
    main()
