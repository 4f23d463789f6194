"""Tokens a second that healing learns from, as it is and compiled, beside the machine's peak.

    python bench/healing_speed.py RUN:CANDIDATE [--steps 8] [--rounds 2]

Heals the quantized checkpoint of a run's candidate for a few steps on text without meaning, in turn, in processes of
their own that find nothing compiled. The first step, which compiles, is told apart; the later ones count with their
median. A token costs the student there and back, the teacher, and both heads.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from pennyweight import compare, machine, speed
from pennyweight.recipe import Recover
from pennyweight.records import Checkpoint
from pennyweight.steps import StepContext, recover

#: Passes through all weights for a token: the teacher once, the student there, and back to its inputs and its weights.
PASSES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidate", metavar="RUN:CANDIDATE")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=["eager", "compiled"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        heal(args.candidate, args.steps, args.only == "compiled")
        return
    times: dict[str, list[list[float]]] = {"eager": [], "compiled": []}
    for number in range(args.rounds):
        for kind in sorted(times, reverse=bool(number % 2)):
            command = [sys.executable, __file__, args.candidate, f"--steps={args.steps}", f"--only={kind}"]
            with tempfile.TemporaryDirectory() as cache:
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            times[kind].append([float(word) for word in done.stdout.split()])
    settings = Recover(text="none", steps=args.steps)
    tokens = settings.batch * settings.length
    operations = 2 * PASSES * found(args.candidate)[1].parameters
    device = machine.resolve_device("auto")
    ceilings = speed.ceilings(device=device)
    peak = max(value for value in (ceilings.gflops_bf16, ceilings.gflops_fp32) if value)
    steps = {kind: median(step for round_ in rounds for step in round_[1:]) for kind, rounds in times.items()}
    for kind, rounds in times.items():
        rate = tokens / steps[kind]
        gflops = rate * operations / 1e9
        first = max(round_[0] for round_ in rounds)
        print(
            f"{kind:9} {rate:.0f} tokens/s, {gflops:.0f} GFLOP/s, {gflops / peak:.0%} "
            f"of {peak:.0f}; the first step took up to {first:.0f} s"
        )
    gain = steps["eager"] - steps["compiled"]
    extra = max(round_[0] for round_ in times["compiled"]) - steps["compiled"]
    print(f"compiled steps take {steps['compiled'] / steps['eager']:.2f} of the time", end="")
    print(f", which pays from {extra / gain:.0f} steps on" if gain > 0 else ", which never pays")


def found(where: str) -> tuple[Checkpoint, Checkpoint]:
    """The candidate's checkpoint, and that of its base."""
    record, result = compare.locate(where)
    base = next(item for item in record.candidates if item.variant == "base")
    assert result.checkpoint and base.checkpoint
    return result.checkpoint, base.checkpoint


def heal(where: str, steps: int, compiled: bool) -> None:
    """Print the seconds of each step."""
    checkpoint, base = found(where)
    step = Recover(text="none", steps=steps, held_out=4, check_every=steps, compile=compiled)
    windows = np.random.default_rng(0).integers(100, 40_000, (step.held_out + steps * step.batch, step.length))
    moments = [time.perf_counter()]

    def report(detail: str, done: float) -> None:
        moments.append(time.perf_counter())
        print(moments[-1] - moments[-2], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        context = StepContext(machine.resolve_device("auto"), 0, windows, base, report)
        recover.run(checkpoint, step, context, Path(folder))


if __name__ == "__main__":
    main()
