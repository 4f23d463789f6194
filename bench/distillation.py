"""Distillation with a live and with a cached teacher, side by side.

    python bench/distillation.py MODEL TEXT [--drop 9,10,11] [--steps 40] [--judge TEXT]

MODEL is a checkpoint's folder, TEXT a JSONL file with `text` in each row. The student is the model without the layers
that `--drop` names. Each kind of teacher trains it alike, in a store of its own that is thrown away, and the median
step counts: what the teacher says is written before, and its seconds and bytes are told apart. Bars: a step with a
cached teacher 1.25 times as fast as with a live one, at a held-out KL within 1%. `--judge` adds how much is regained of
the perplexity that the layers took on other text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

SPEED_BAR, LOSS_BAR = 1.25, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--drop", default="9,10,11")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--kinds", default="live,top_k,sampled")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--set", default="{}", help="more settings of the step, as JSON")
    parser.add_argument("--judge", type=Path)
    args = parser.parse_args()
    compare_teachers(args)


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
    from pennyweight.memory import reused_memory
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
    with reused_memory():  # as in a run
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


if __name__ == "__main__":
    main()
