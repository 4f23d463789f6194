"""Memory and gradient of healing's chunked loss beside the dense one, each in a process of its own.

    python bench/healing_loss.py [--tokens 4096] [--vocabulary 49152] [--width 576]

Peak memory is the resident set's highest mark above what it was before the loss was computed, forward and backward. The
bars are a quarter of the dense loss's memory, and a gradient within 1e-5 of its.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

BAR = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--only", choices=["dense", "chunked"], help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        compute(args.only, args.tokens, args.vocabulary, args.width, args.to)
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("dense", "chunked"):
            path = Path(folder) / f"{kind}.pt"
            sizes = [f"--{name}={getattr(args, name)}" for name in ("tokens", "vocabulary", "width")]
            subprocess.run([sys.executable, __file__, *sizes, "--only", kind, "--to", str(path)], check=True)
            found[kind] = torch.load(path, weights_only=True)
    for kind, result in found.items():
        print(f"{kind:8} loss {result['loss']:.6f}, {result['bytes'] / 2**20:,.0f} MiB above the start")
    ratio = found["chunked"]["bytes"] / found["dense"]["bytes"]
    expected = found["dense"]["gradient"]
    off = ((found["chunked"]["gradient"] - expected).norm() / expected.norm()).item()
    print(f"memory chunked/dense {ratio:.3f} (bar: {BAR}); relative difference of the gradients {off:.1e} (bar: 1e-05)")


def compute(kind: str, tokens: int, vocabulary: int, width: int, path: Path) -> None:
    from pennyweight.healing.loss import chunked_kl

    torch.manual_seed(0)
    head = torch.randn(vocabulary, width) / width**0.5
    teacher = torch.randn(tokens, width)
    student = (teacher + 0.1 * torch.randn(tokens, width)).requires_grad_(True)
    before = peak()
    if kind == "chunked":
        loss = chunked_kl(student, teacher, head, head)
    else:
        expected = torch.log_softmax(teacher @ head.T, -1)
        found = torch.log_softmax(student @ head.T, -1)
        loss = torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True)
    loss.backward()
    torch.save({"loss": loss.item() / tokens, "bytes": peak() - before, "gradient": student.grad}, path)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
