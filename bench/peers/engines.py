"""Engines on the same weights: output tokens a second of the embedded model, in turns, in one run on one machine.

    python bench/peers/engines.py [--concurrency 1 8 32] [--rounds 3] [--input-tokens 64] [--output-tokens 64]

The base and its 4-bit variant (round to nearest, groups of 64, head at 8 bits) in ONNX Runtime GenAI, OpenVINO GenAI
with continuous batching, and llama.cpp; the base also in transformers, through Pennyweight's runtime and through
transformers' own `generate`, which all are compared with: in bfloat16 where the machine multiplies it, else float32.
The first three are Pennyweight's runtimes on candidates made and proved as a recipe's are; llama.cpp's server reads the
very GGUF file that OpenVINO reads, with a slot for each request. transformers would unpack four bits on a CPU, so it
has no such row.

A turn is a wave: all requests start together, have prompts of one length, and get as many tokens, greedily, without an
end of sequence. Its tokens/s count the whole wave, reading of prompts included. A round is every engine in turn and
then back again. Intervals are 95%, over turns; ratios are turn by turn. «First tokens» is the share of answers that
begin as the reference's do: other arithmetic breaks ties otherwise, a misread file breaks almost all.

The first run downloads model and texts and makes the candidates (some minutes, 2 GB in the store). llama.cpp
(xllamacpp, a wheel) is installed into an environment of its own, in `pennyweight-peers` beside the store. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import servers
import turns

from pennyweight import machine, runtimes, stages
from pennyweight.columns import columns
from pennyweight.plan import make_plan
from pennyweight.progress import Progress, output_to
from pennyweight.recipe import Recipe, load_recipe
from pennyweight.records import Candidate
from pennyweight.runtimes.openvino import MODEL
from pennyweight.store import Store

RECIPE, FOUR_BITS = "smollm2-135m-methods-cpu", "int4-rtn"
REFERENCE = "transformers generate"


class Generate:
    """transformers' own `generate`, on the model of a session of ours."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, ids: np.ndarray, new_tokens: int) -> np.ndarray:
        import torch

        prompt = torch.from_numpy(ids)
        with torch.inference_mode():
            tokens = self._model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
                max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            )  # fmt: skip
        return tokens[:, ids.shape[1] :].numpy()


class LlamaCpp:
    """A llama.cpp server, asked for all answers at once."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, ids: np.ndarray, new_tokens: int) -> np.ndarray:
        with ThreadPoolExecutor(len(ids)) as pool:
            return np.array(list(pool.map(lambda prompt: self._ask(prompt, new_tokens), ids.tolist())), np.int64)

    def _ask(self, prompt: list[int], new_tokens: int) -> list[int]:
        body = {"prompt": prompt, "n_predict": new_tokens, "ignore_eos": True, "temperature": 0, "return_tokens": True}
        request = urllib.request.Request(
            f"{self._url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]


@dataclass
class Course:
    """What one engine did at one concurrency."""

    speeds: list[float] = field(default_factory=list)
    """Output tokens a second, turn by turn."""
    first: np.ndarray | None = None
    """The first token of each answer."""


def main() -> None:
    options = parse()
    recipe = make_recipe(options)
    with tempfile.TemporaryDirectory() as scratch, output_to(Path(scratch) / "log") as screen:
        candidates, windows = make(recipe, Store(), Progress(screen))
    kind = machine.fingerprint()
    print(f"{kind['cpu']}, {machine.threads()} threads ({', '.join(kind['isa'])})")
    print(f"{options.input_tokens} tokens in, {options.output_tokens} out; output tokens/s, and over {REFERENCE}'s")
    sessions = {c.id: runtimes.get(c.runtime).load(c, "cpu") for c in candidates}
    for concurrency in options.concurrency:
        with ExitStack() as stack:
            engines = dict(contenders(candidates, sessions, concurrency, options, stack))
            courses = take_turns(engines, windows[:concurrency], options.output_tokens, options.rounds)
        print("", *report(concurrency, courses), sep="\n", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    return parser.parse_args()


def make_recipe(options: Any) -> Recipe:
    """The shipped recipe with one variant, for three engines, at the loads asked for."""
    loads = list(options.concurrency)
    shape = {"input_tokens": options.input_tokens, "output_tokens": options.output_tokens}
    variant = load_recipe(RECIPE).variants[FOUR_BITS]
    overrides = {
        "variants": {
            FOUR_BITS: [{"quantize": step.model_dump(exclude={"kind"}, exclude_unset=True)} for step in variant]
        },
        "runtimes": {"base": ["transformers", "onnxruntime", "openvino"], "variants": ["onnxruntime", "openvino"]},
        "benchmark.workload": shape,
        "benchmark.concurrency": loads,
        "benchmark.decide_at": loads[0],
    }
    return load_recipe(RECIPE, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])


def make(recipe: Recipe, store: Store, progress: Progress) -> tuple[list[Candidate], np.ndarray]:
    """The recipe's candidates, and prompts, int64 (requests, tokens). Finished stages are taken from the store."""
    run = stages.Run(recipe, store, progress, make_plan(recipe, store), "cpu")
    base = stages.fetch_base(run)
    bases = stages.fetch_bases(run, base)
    texts = stages.make_windows(run, base, stages.fetch_data(run))
    checkpoints = {"base": base}
    for variant, steps in recipe.variants.items():
        checkpoints[variant] = stages.make_variant(run, variant, steps, bases, texts)
    made = [
        stages.export(run, variant, runtime, checkpoints[variant], texts) for variant, runtime in recipe.candidates()
    ]
    return made, texts.load("prompts")


def contenders(
    candidates: list[Candidate], sessions: Mapping[str, Any], concurrency: int, options: Any, stack: ExitStack
) -> Iterator[tuple[str, Any]]:
    """(name, prompts and a number → tokens), the reference first."""
    for candidate in candidates:
        session = sessions[candidate.id]
        if candidate.runtime == "transformers":
            yield f"{REFERENCE}, {candidate.dtype}", Generate(session.model)
        yield candidate.id, lambda ids, new, session=session: session.generate(ids, new).tokens
        if candidate.runtime == "openvino":
            file, context = Path(candidate.path) / MODEL, options.input_tokens + options.output_tokens
            cores = os.sched_getaffinity(0)
            url = stack.enter_context(servers.llama_cpp(file, concurrency, context, machine.threads(), cores))
            yield f"{candidate.variant}@llama.cpp", LlamaCpp(url)


def take_turns(engines: Mapping[str, Any], ids: np.ndarray, new_tokens: int, rounds: int) -> dict[str, Course]:
    for engine in engines.values():
        engine(ids, 2)
    courses = {name: Course() for name in engines}
    for number, name in turns.order(list(engines), rounds):
        begin = time.perf_counter()
        tokens = engines[name](ids, new_tokens)
        seconds = time.perf_counter() - begin
        if tokens.shape != (len(ids), new_tokens):
            raise SystemExit(f"{name} made {tokens.shape} tokens of {len(ids)} × {new_tokens}")
        courses[name].speeds.append(tokens.size / seconds)
        courses[name].first = tokens[:, 0]
        print(f"{len(ids)} at once, round {number}: {name} {tokens.size / seconds:.1f}", file=sys.stderr, flush=True)
    return courses


def report(concurrency: int, courses: Mapping[str, Course]) -> list[str]:
    reference, *_ = courses.values()
    rows = [[f"{concurrency} at once", "tokens/s", "ratio", "first tokens"]]
    for name, course in courses.items():
        rows.append(
            [
                name,
                turns.show(turns.mean(course.speeds)),
                "1" if course is reference else turns.show(turns.ratio(course.speeds, reference.speeds)),
                f"{np.mean(course.first == reference.first):.0%}",
            ]
        )
    return columns(rows)


if __name__ == "__main__":
    main()
