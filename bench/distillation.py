"""Distillation with a live and with a cached teacher, side by side, and its loss beside the dense one.

    python bench/distillation.py MODEL TEXT [--drop 9,10,11] [--steps 40] [--judge TEXT]
    python bench/distillation.py --loss [--tokens 4096] [--vocabulary 49152] [--width 576]

MODEL is a checkpoint's folder, TEXT a JSONL file with `text` in each row. The student is the model without the layers
that `--drop` names. Each kind of teacher trains it alike, in a store of its own that is thrown away, and the median
step counts: what the teacher says is written before, and its seconds and bytes are told apart. Bars: a step with a
cached teacher 1.25 times as fast as with a live one, at a held-out KL within 1%. `--judge` adds how much is regained of
the perplexity that the layers took on other text.

`--loss` measures in processes of their own. Peak memory is the resident set's highest mark above what it was before the
loss was computed, forward and backward, with gradients of states and head. Bars: a quarter of the dense loss's memory,
gradients within 1e-5 of its.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

SPEED_BAR, LOSS_BAR, MEMORY_BAR, GRADIENT_BAR = 1.25, 0.01, 0.25, 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--drop", default="9,10,11")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--kinds", default="live,top_k,sampled")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--set", default="{}", help="more settings of the step, as JSON")
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--loss", action="store_true")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--only", choices=["dense", "chunked"], help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        compute(args.only, args.tokens, args.vocabulary, args.width, args.to)
    elif args.loss:
        compare_losses(args)
    else:
        compare_teachers(args)


# --- teachers ---------------------------------------------------------------------------------------------------------


def compare_teachers(args: argparse.Namespace) -> None:
    from pennyweight import checkpoints

    base = checkpoints.describe(args.model, "base")
    budget = {"minutes": args.minutes} if args.minutes else {"steps": args.steps or 40}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        pruned = prune(args.model, [int(layer) for layer in args.drop.split(",")], Path(folder) / "pruned")
        for kind in args.kinds.split(","):
            settings = {"text": "text", **budget, **json.loads(args.set)}
            if kind != "live":
                settings["teacher"] = {"cache": kind, "k": args.k}
            found[kind] = distill(base, pruned, settings, args.text, Path(folder) / kind)
            print(found[kind]["line"], flush=True)
        if args.judge:
            judge(base, pruned, {kind: Path(folder) / kind / "files" for kind in found}, args.judge)
    if live := found.get("live"):
        for kind, result in found.items():
            if kind != "live":
                faster = live["step"] / result["step"]
                worse = result["kl"] / live["kl"] - 1
                print(
                    f"{kind}: steps {faster:.2f} times as fast as live (bar: {SPEED_BAR}), "
                    f"held-out KL {worse:+.2%} (bar: within {LOSS_BAR:.0%})"
                )


def prune(model: Path, dropped: list[int], folder: Path) -> Any:
    """The model without some layers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pennyweight import checkpoints

    student = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    kept = [layer for index, layer in enumerate(student.model.layers) if index not in dropped]
    student.model.layers = torch.nn.ModuleList(kept)
    student.config.num_hidden_layers = len(kept)
    if kinds := getattr(student.config, "layer_types", None):
        student.config.layer_types = [kind for index, kind in enumerate(kinds) if index not in dropped]
    student.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return checkpoints.describe(folder, "pruned")


def distill(base: Any, pruned: Any, settings: dict[str, Any], text: Path, folder: Path) -> dict[str, Any]:
    from pennyweight import datasets, machine
    from pennyweight.recipe import Distill
    from pennyweight.stages.texts import load_tokenizer
    from pennyweight.steps import StepContext
    from pennyweight.steps import distill as step_module
    from pennyweight.store import Store

    step = Distill.model_validate(settings)
    windows, _ = datasets.windows(
        load_tokenizer(base), datasets.texts(text), step.calibrate.samples, step.calibrate.length, 0
    )
    moments: list[float] = []

    def report(detail: str, done: float) -> None:
        if detail.startswith("loss"):
            moments.append(time.perf_counter())

    (folder / "files").mkdir(parents=True)
    context = StepContext(
        machine.resolve_device("auto"),
        0,
        windows,
        base,
        report,
        teacher=base,
        store=Store(folder / "store"),
        key="0" * 64,
    )
    begin = time.perf_counter()
    made = step_module.run(pruned, step, context, folder / "files")
    whole = time.perf_counter() - begin
    second = median(b - a for a, b in itertools.pairwise(moments))
    kept = f", {made.cache_bytes_per_token} bytes a token" if made.cache_bytes_per_token else ""
    line = (
        f"{step.describe()}: {made.steps} steps, {second:.2f} s each, {step.step_tokens / second:.0f} tokens/s; "
        f"held-out KL {made.kl_before:.4f} → {made.kl_after:.4f} (step {made.kept_step}); {whole:.0f} s in all, "
        f"{made.training_seconds:.0f} s of training{kept}; ended by {made.ended_by}"
    )
    return {"step": second, "kl": made.kl_after, "line": line}


def judge(base: Any, pruned: Any, students: dict[str, Path], text: Path) -> None:
    """Perplexity of all on 32 windows of 256 tokens."""
    from pennyweight import checkpoints, datasets
    from pennyweight.stages.texts import load_tokenizer

    documents = datasets.texts(text) if text.suffix == ".jsonl" else [text.read_text()]
    windows = torch.from_numpy(datasets.windows(load_tokenizer(base), documents, 32, 256, 0)[0])
    full, cut = perplexity(base, windows), perplexity(pruned, windows)
    print(f"perplexity on {text.name}: base {full:.2f}, pruned {cut:.2f}")
    for kind, folder in students.items():
        found = perplexity(checkpoints.describe(folder, kind), windows)
        print(f"  {kind}: {found:.2f}, {(cut - found) / (cut - full):.1%} of the loss regained")


@torch.no_grad()
def perplexity(checkpoint: Any, windows: torch.Tensor) -> float:
    from pennyweight import machine
    from pennyweight.quantization import decoder

    device = machine.resolve_device("auto")
    model, total, count = decoder.load(checkpoint, device), 0.0, 0
    for ids in windows.to(device).split(8):
        logits = model(ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        total += torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    return math.exp(total / count)


# --- the loss ---------------------------------------------------------------------------------------------------------


def compare_losses(args: argparse.Namespace) -> None:
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
    print(f"memory chunked/dense {ratio:.3f} (bar: {MEMORY_BAR})")
    for of in ("states", "head"):
        expected = found["dense"][of]
        off = ((found["chunked"][of] - expected).norm() / expected.norm()).item()
        print(f"relative difference of the gradients of the {of} {off:.1e} (bar: {GRADIENT_BAR:.0e})")


def compute(kind: str, tokens: int, vocabulary: int, width: int, path: Path) -> None:
    from pennyweight.distillation.losses import Live, Objective, chunked_loss

    torch.manual_seed(0)
    teacher_head = torch.randn(vocabulary, width) / width**0.5
    head = (teacher_head + 0.01 * torch.randn(vocabulary, width)).requires_grad_(True)
    teacher = torch.randn(tokens, width)
    states = (teacher + 0.1 * torch.randn(tokens, width)).requires_grad_(True)
    before = peak()
    if kind == "chunked":
        loss = chunked_loss(states, head, Live(teacher, teacher_head), Objective())
    else:
        expected = torch.log_softmax(teacher @ teacher_head.T, -1)
        found = torch.log_softmax(states @ head.T, -1)
        loss = torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True)
    loss.backward()
    used = peak() - before
    torch.save({"loss": loss.item() / tokens, "bytes": used, "states": states.grad, "head": head.grad}, path)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
