"""Memory and gradients of the chunked losses beside the dense one, each in a process of its own.

    python bench/losses.py [distill|recover] [--tokens 4096] [--vocabulary 49152] [--width 576]

`distill`'s loss gives gradients of states and head, `recover`'s of the states alone. Peak memory is the resident set's
highest mark above what it was before the loss was computed, forward and backward. Bars: a quarter of the dense loss's
memory, gradients within 1e-5 of its.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

MEMORY_BAR, GRADIENT_BAR = 0.25, 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["distill", "recover"], nargs="?", default="distill")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--only", choices=["dense", "chunked"], help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        compute(args)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("dense", "chunked"):
            path = Path(folder) / f"{kind}.pt"
            sizes = [f"--{name}={getattr(args, name)}" for name in ("tokens", "vocabulary", "width")]
            command = [sys.executable, __file__, args.step, *sizes, "--only", kind, "--to", str(path)]
            subprocess.run(command, check=True)
            found[kind] = torch.load(path, weights_only=True)
    for kind, result in found.items():
        print(f"{kind:8} loss {result['loss']:.6f}, {result['bytes'] / 2**20:,.0f} MiB above the start")
    ratio = found["chunked"]["bytes"] / found["dense"]["bytes"]
    print(f"memory chunked/dense {ratio:.3f} (bar: {MEMORY_BAR})")
    for of, expected in found["dense"]["gradients"].items():
        off = ((found["chunked"]["gradients"][of] - expected).norm() / expected.norm()).item()
        print(f"relative difference of the gradients of the {of} {off:.1e} (bar: {GRADIENT_BAR:.0e})")


def compute(args: argparse.Namespace) -> None:
    from pennyweight.distillation.losses import Live, Objective, chunked_loss
    from pennyweight.healing.loss import chunked_kl

    torch.manual_seed(0)
    learns_head = args.step == "distill"
    teacher_head = torch.randn(args.vocabulary, args.width) / args.width**0.5
    head = (teacher_head + 0.01 * torch.randn(args.vocabulary, args.width)).requires_grad_(learns_head)
    teacher = torch.randn(args.tokens, args.width)
    states = (teacher + 0.1 * torch.randn(args.tokens, args.width)).requires_grad_(True)
    before = peak()
    if args.only == "dense":
        expected = torch.log_softmax(teacher @ teacher_head.T, -1)
        found = torch.log_softmax(states @ head.T, -1)
        loss = torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True)
    elif learns_head:
        loss = chunked_loss(states, head, Live(teacher, teacher_head), Objective())
    else:
        loss = chunked_kl(states, teacher, head, teacher_head)
    loss.backward()
    used = peak() - before
    gradients = {"states": states.grad} | ({"head": head.grad} if learns_head else {})
    torch.save({"loss": loss.item() / args.tokens, "bytes": used, "gradients": gradients}, args.to)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
