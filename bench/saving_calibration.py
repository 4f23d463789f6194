"""Does a claimed saving exist? Candidates that are the base itself, on machines that make noise.

python bench/saving_calibration.py                  simulations: no model, a minute
python bench/saving_calibration.py --real 200       two copies of a tiny model through the benchmark stage, with a noisy
                                                    neighbour on the same cores; --model CHECKPOINT takes another model

A saving is claimed where the lower end of its 95% interval is above 0. The base saves nothing against itself: that
is promised in 2.5% of cases at most, and accepted in 5%.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np

from pennyweight import benchmark
from pennyweight.benchmark import cost
from pennyweight.recipe import Benchmark

ROUNDS = (3, 8, 16)
#: Resamples of a bootstrap.
RESAMPLES = 1999
#: (base candidates, variants) of the runs in the last table.
SHAPES = ((1, 1), (2, 1), (1, 4), (2, 4))

Intervals = tuple[np.ndarray, np.ndarray]
"""Lower and upper ends of savings, (runs,) each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=4000, help="of each row (default 4000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", type=int, metavar="N", help="measure N times instead")
    parser.add_argument("--model", type=Path, help="--real: a checkpoint that transformers loads")
    options = parser.parse_args()
    if options.real:
        real(options.real, options.model, options.seed)
    else:
        simulated(options.simulations, options.seed)


def settings(rounds: int) -> Benchmark:
    return Benchmark.model_validate(
        {
            "workload": {"input_tokens": 16, "output_tokens": 4},
            "concurrency": [1],
            "decide_at": 1,
            "decide_rounds": rounds,
            "price": {"name": "any", "usd_per_hour": 1.0},
        }
    )


# --- intervals, each from log ratios (runs, rounds) -------------------------------------------------------------------


def student(logs: np.ndarray, generator: np.random.Generator | None = None, confidence: float = 0.95) -> Intervals:
    """What the benchmark stage reports."""
    found = [cost.saving_of(list(one), confidence) for one in logs]
    return np.array([one.low for one in found]), np.array([one.high for one in found])


def percentile(logs: np.ndarray, generator: np.random.Generator) -> Intervals:
    """Percentiles of the resampled mean (Efron and Tibshirani, 1993, chapter 13)."""
    means, _ = resampled(logs, generator)
    return 1 - np.exp(np.quantile(means, 0.975, axis=1)), 1 - np.exp(np.quantile(means, 0.025, axis=1))


def bootstrap_t(logs: np.ndarray, generator: np.random.Generator) -> Intervals:
    """Percentiles of the resampled t (ibid., chapter 12). Resamples of one round only have no t: they count as ±∞."""
    means, errors = resampled(logs, generator)
    mean, error = logs.mean(1, keepdims=True), logs.std(1, ddof=1, keepdims=True) / np.sqrt(logs.shape[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num((means - mean) / errors, nan=0.0, posinf=np.inf, neginf=-np.inf)
    high, low = (np.quantile(t, level, axis=1, method="inverted_cdf")[:, None] for level in (0.975, 0.025))
    return tuple((1 - np.exp(np.minimum(mean - side * error, 700.0)))[:, 0] for side in (low, high))


def resampled(logs: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard errors of resampled rounds, (runs, resamples)."""
    rounds = logs.shape[1]
    counts = generator.multinomial(rounds, np.full(rounds, 1 / rounds), size=RESAMPLES).T
    means = logs @ counts / rounds
    variances = np.maximum(logs**2 @ counts / rounds - means**2, 0.0)
    variances[:, counts.max(0) == rounds] = 0.0
    return means, np.sqrt(variances / (rounds - 1))


METHODS = {"Student's": student, "percentile bootstrap": percentile, "bootstrap-t": bootstrap_t}


def intervals(method: Callable[..., Intervals], logs: np.ndarray, generator: np.random.Generator) -> Intervals:
    """In blocks that share their resamples."""
    found = [method(logs[start : start + 100], generator) for start in range(0, len(logs), 100)]
    low, high = (np.concatenate(side) for side in zip(*found))
    return low, high


def cell(low: np.ndarray, high: np.ndarray) -> str:
    width = np.median(100 * (high - low))
    shown = f"{width:.1f}" if width < 1000 else "∞"
    return f"{np.mean(low > 0):.1%}, {np.mean((low <= 0) & (high >= 0)):.1%}, {shown}"


def head(*first: str) -> str:
    names = [*first, *(f"{name}: claimed, covers, width" for name in METHODS)]
    return f"| {' | '.join(names)} |\n|---|{'---:|' * (len(names) - 1)}"


# --- simulated --------------------------------------------------------------------------------------------------------

Machine = Callable[[np.random.Generator, int, int], np.ndarray]
"""(generator, runs, turns) → logarithms of how much slower each turn is, (runs, turns), in the order of time."""


def steady(generator: np.random.Generator, runs: int, turns: int) -> np.ndarray:
    return generator.normal(0, 0.05, (runs, turns))


def drifting(generator: np.random.Generator, runs: int, turns: int) -> np.ndarray:
    return np.cumsum(generator.normal(0, 0.03, (runs, turns)), axis=1) + generator.normal(0, 0.03, (runs, turns))


def momentary(generator: np.random.Generator, runs: int, turns: int) -> np.ndarray:
    """Noise of 10% that lasts about a turn: half of what slows one turn is still there at the next."""
    found = generator.normal(0, 0.1, (runs, turns))
    for turn in range(1, turns):
        found[:, turn] = 0.5 * found[:, turn - 1] + 0.75**0.5 * found[:, turn]
    return found


def bursts(generator: np.random.Generator, runs: int, turns: int) -> np.ndarray:
    """One turn in ten begins a burst, which lasts three turns on average and slows them by 20 to 100%."""
    found, slow = np.empty((runs, turns)), np.zeros(runs)
    for turn in range(turns):
        goes_on = (slow > 0) & (generator.random(runs) < 2 / 3)
        begins = generator.random(runs) < 0.1
        slow = np.where(goes_on, slow, np.where(begins, np.log(generator.uniform(1.2, 2.0, runs)), 0.0))
        found[:, turn] = slow
    return found + generator.normal(0, 0.03, (runs, turns))


def neighbour(generator: np.random.Generator, runs: int, turns: int) -> np.ndarray:
    """Comes at any turn, stays for half of them (from the end it goes on at the beginning), and costs 50%."""
    since = (np.arange(turns) - generator.integers(0, turns, (runs, 1))) % turns
    return np.where(since < turns // 2, np.log(1.5), 0.0) + generator.normal(0, 0.03, (runs, turns))


MACHINES: dict[str, Machine] = {
    "steady, 5% noise": steady,
    "noise that lasts about a turn": momentary,
    "drifts slowly": drifting,
    "bursts over neighbouring turns": bursts,
    "a neighbour half of the time": neighbour,
}


def simulated(simulations: int, seed: int) -> None:
    print(head("machine", "rounds"))
    for name, machine in MACHINES.items():
        for rounds in ROUNDS:
            generator = np.random.default_rng([seed, rounds])
            logs = measure(machine, generator, simulations, turns_of(2, rounds), bases=1)[:, 0]
            cells = (cell(*intervals(method, logs, generator)) for method in METHODS.values())
            print(f"| {name} | {rounds} | {' | '.join(cells)} |", flush=True)
    compare_orders(simulations, seed)
    compare_several(simulations, seed)


def compare_orders(simulations: int, seed: int) -> None:
    """The first candidate against the last, in the benchmark's order and in one that is reversed in every round."""
    print("\n| machine | candidates | reversed every round: claimed, covers, width | the benchmark's order |")
    print("|---|---:|---:|---:|")
    for name, machine in MACHINES.items():
        for candidates in (2, 5):
            ids = list(range(candidates))
            reversing = [(number, one) for number in range(8) for one in (ids[::-1] if number % 2 else ids)]
            cells = []
            for order in (reversing, turns_of(candidates, 8)):
                generator = np.random.default_rng([seed, candidates])
                cells.append(cell(*student(measure(machine, generator, simulations, order, bases=1)[:, -1])))
            print(f"| {name} | {candidates} | {' | '.join(cells)} |", flush=True)


def compare_several(simulations: int, seed: int) -> None:
    """Savings against the base that looks cheapest, and of several variants; in 8 rounds."""
    print("\n| machine | base candidates | variants | one claimed | any claimed | at 1 − 0.05/variants | mean saving |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, machine in MACHINES.items():
        for bases, variants in SHAPES:
            generator = np.random.default_rng([seed, bases, variants])
            logs = measure(machine, generator, simulations, turns_of(bases + variants, 8), bases)
            claimed, sure = (
                np.stack([student(logs[:, one], confidence=level)[0] > 0 for one in range(variants)], axis=1)
                for level in (0.95, 1 - 0.05 / variants)
            )
            shares = (claimed.mean(), claimed.any(1).mean(), sure.any(1).mean(), np.mean(1 - np.exp(logs.mean(2))))
            cells = (f"{share:.1%}" for share in shares)
            print(f"| {name} | {bases} | {variants} | {' | '.join(cells)} |", flush=True)


Order = list[tuple[int, int]]
"""(round, candidate) of every turn, in the order of time."""


def turns_of(candidates: int, rounds: int) -> Order:
    """The benchmark's own."""
    ids = [str(number) for number in range(candidates)]
    return [(number, int(name)) for _, number, name in benchmark.turns(settings(rounds), ids) if number >= 0]


def measure(machine: Machine, generator: np.random.Generator, runs: int, order: Order, bases: int) -> np.ndarray:
    """Log ratios of every variant to the base that looks cheapest, (runs, variants, rounds): all take equally long."""
    rounds, candidates = (1 + max(side) for side in zip(*order))
    slower = machine(generator, runs, len(order))
    logs = np.empty((runs, candidates, rounds))
    for turn, (number, candidate) in enumerate(order):
        logs[:, candidate, number] = slower[:, turn]
    cheapest = np.exp(logs[:, :bases]).mean(2).argmin(1)
    return logs[:, bases:] - logs[np.arange(runs), cheapest][:, None]


# --- real -------------------------------------------------------------------------------------------------------------

#: Works and sleeps for random times, as long as a turn or so, while its parent lives.
NOISE = """
import os, random, time
parent = os.getppid()
while os.getppid() == parent:
    end = time.perf_counter() + random.expovariate(1 / 0.02)
    while time.perf_counter() < end:
        pass
    time.sleep(random.expovariate(1 / 0.04))
"""


def real(repeats: int, model: Path | None, seed: int) -> None:
    """Two copies of one model, one of them called the base, measured by the benchmark stage's own code."""
    from transformers.utils import logging

    from pennyweight.records import Candidate, Checkpoint

    logging.disable_progress_bar()

    ceilings = benchmark.speed.ceilings()
    with (
        tempfile.TemporaryDirectory() as folder,
        noise(),
        patch.object(benchmark.speed, "ceilings", lambda **_: ceilings),
    ):
        path = str(model or tiny_model(Path(folder)))
        checkpoint = Checkpoint(
            path=path, digest="", bytes=1, weight_bytes=1, format="safetensors", dtype="float32", parameters=0,
            origin="a copy",
        )  # fmt: skip
        candidates = [
            Candidate(
                id=f"{variant}@transformers", variant=variant, runtime="transformers", checkpoint=checkpoint, path=path,
                digest="", bytes=1, weight_bytes=1, dtype="float32",
            )
            for variant in ("base", "copy")
        ]  # fmt: skip
        draw = np.random.default_rng(seed)
        logs = []
        for done in range(repeats):
            if done % 20 == 0:
                print(f"{done} of {repeats}", file=sys.stderr)
            found = benchmark.run_benchmark(
                candidates, settings(8), lambda requests, tokens: draw.integers(1, 256, (requests, tokens)), "cpu",
                lambda what, done: None,
            )  # fmt: skip
            logs.append(found.reports["copy@transformers"].points[0].log_ratios)
    ratios, generator = np.array(logs), np.random.default_rng(seed)
    print(head("A/A, 8 rounds", "runs"))
    cells = (cell(*intervals(method, ratios, generator)) for method in METHODS.values())
    print(f"| {model.name if model else 'a tiny model'}, with a noisy neighbour | {repeats} | {' | '.join(cells)} |")


@contextmanager
def noise() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", NOISE])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def tiny_model(folder: Path) -> Path:
    """A random Llama of two layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
