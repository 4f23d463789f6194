"""What bits given layer by layer are worth: the embedded model, at exactly the bytes of two fixed rules.

    python bench/allocation.py [--method rtn] [--choices 3 4 8] [--group-sizes 32 64 96 192] [--trials 40]

The rules are W4 in groups of 64 for every layer, and that with the first and the last block at 8 bits. Allocation sees
BoolQ's passages; everything is judged on XSum's articles, which are text of another kind. Embedding and head stay as
they are in all of them. KL is in nats per token from the unquantized model; ± is the standard error over windows of the
paired difference to the rule. Bars: at the second rule's bytes ≥ 10% less KL, at the first one's never more.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from pennyweight import checkpoints, datasets, machine, shipped
from pennyweight.plan.allocation import allocated_bytes
from pennyweight.plan.sizes import model_shape
from pennyweight.quantization import decoder, methods
from pennyweight.quantization.allocation import allocate
from pennyweight.quantization.grid import Grid
from pennyweight.recipe import DataSource, Quantize, load_recipe
from pennyweight.records import Checkpoint
from pennyweight.sources import fetch_base
from pennyweight.store import Store

RECIPE = "smollm2-135m-cpu"
CALIBRATION, JUDGED = "boolq-passages", "xsum-documents"
SEED = 0


def main() -> None:
    import torch

    options = parse()
    torch.set_num_threads(machine.threads())
    base, texts = material(options)
    shape = model_shape(checkpoints.read_config(Path(base.path)), base.dtype)
    judge = Judge(decoder.load(base, "cpu"), texts[JUDGED])
    names = list(decoder.linears(judge.base))
    _, blocks = decoder.blocks(judge.base)
    print(f"{options.method}, scales by {options.scales}; {texts[JUDGED].size:,} tokens of {JUDGED}", flush=True)
    print(f"{'':44}{'MB':>9}{'KL':>9}{'against the rule':>24}", flush=True)
    for rule in options.rules:
        ends = {f".{at}." for at in (0, len(blocks) - 1)} if rule == "first-last-8" else set()
        grids = {name: Grid(8 if any(end in name for end in ends) else 4, 64) for name in names}
        step = auto(options, {"bytes": 1})
        size = allocated_bytes(shape, step, {name: (grid.bits, grid.group_size) for name, grid in grids.items()})
        fixed = judge(quantized(base, grids, step, texts[CALIBRATION]))
        row(rule, size, fixed.mean())
        step, begin = auto(options, {"bytes": size}), time.monotonic()
        model = decoder.load(base, "cpu")
        windows = torch.from_numpy(texts[CALIBRATION])
        grids, found = allocate(model, shape, step, windows, getattr(torch, base.dtype), SEED, lambda *_: None)
        del model
        seconds = time.monotonic() - begin
        ours = judge(quantized(base, grids, step, texts[CALIBRATION]))
        change, error = paired(ours, fixed)
        row(f"auto at {rule}'s bytes", found.bytes, ours.mean(), f"{change:+.1%} ± {error:.1%}")
        held = ", ".join(f"{name} {kl:.4f}" for name, kl in found.uniform_kl.items())
        print(f"  held-out {CALIBRATION}: {found.measured_kl:.4f} (predicted {found.predicted_kl:.4f}; {held})")
        print(f"  {found.trials} trials, {seconds:.0f} s; layers: {kinds(found.layers)}", flush=True)


def parse() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("rtn", "gptq"), default="rtn")
    parser.add_argument("--scales", choices=("max", "mse"), default="mse")
    parser.add_argument(
        "--rules", nargs="+", choices=("uniform-4", "first-last-8"), default=("uniform-4", "first-last-8")
    )
    parser.add_argument("--choices", nargs="+", type=int, default=(3, 4, 8))
    parser.add_argument("--group-sizes", nargs="+", type=int, default=(32, 64, 96, 192))
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--samples", type=int, default=64, help="windows of calibration text (default 64)")
    parser.add_argument("--windows", type=int, default=16, help="windows of the text that is judged on (default 16)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window (default 256)")
    return parser.parse_args()


def material(options: Any) -> tuple[Checkpoint, dict[str, Any]]:
    """The embedded base, and windows of both texts, int64 (windows, length)."""
    from transformers import AutoTokenizer

    store = Store()
    base, _ = fetch_base(load_recipe(RECIPE).base, store)
    tokenizer, texts = AutoTokenizer.from_pretrained(base.path), {}
    for name, count in ((CALIBRATION, options.samples), (JUDGED, options.windows)):
        path, _ = datasets.fetch(name, DataSource.model_validate(shipped.sources()[name]), store)
        texts[name], _ = datasets.windows(tokenizer, datasets.texts(path), count, options.length, SEED)
    return base, texts


def auto(options: Any, budget: dict[str, int]) -> Quantize:
    return Quantize.model_validate(
        {
            "scheme": "auto",
            "method": options.method,
            "scales": options.scales,
            "budget": budget,
            "choices": list(options.choices),
            "group_sizes": list(options.group_sizes),
            "calibrate": {"source": CALIBRATION, "samples": options.samples, "length": options.length},
            "search": {"trials": options.trials, "windows": 8},
        }
    )


def quantized(base: Checkpoint, grids: dict[str, Grid], step: Quantize, windows: Any) -> Any:
    """The base with its layers rounded; windows that the allocation was measured on calibrate nothing."""
    import torch

    model = decoder.load(base, "cpu")
    settings = methods.Settings(step.method, step.scale_search, step.dampening, getattr(torch, base.dtype))
    calibration = torch.from_numpy(windows[: -step.search.held_out])
    methods.quantize(model, grids, settings, calibration, lambda *_: None)
    return model


class Judge:
    """KL of a model from the base, window by window."""

    def __init__(self, base: Any, windows: Any):
        self.base, self._windows = base, windows

    def __call__(self, model: Any) -> Any:
        import numpy as np
        import torch

        found = []
        with torch.inference_mode():
            for ids in torch.from_numpy(self._windows):
                expected, ours = (torch.log_softmax(m(ids[None]).logits[0].float(), -1) for m in (self.base, model))
                found.append((expected.exp() * (expected - ours)).sum(-1).mean().item())
        return np.array(found)


def paired(ours: Any, fixed: Any) -> tuple[float, float]:
    """Relative change of the mean, and its standard error over windows."""
    change = ours.mean() / fixed.mean() - 1
    residual = ours - (1 + change) * fixed
    return change, residual.std(ddof=1) / len(residual) ** 0.5 / fixed.mean()


def row(name: str, size: int, kl: float, change: str = "") -> None:
    print(f"{name:44}{size / 1e6:>9.3f}{kl:>9.4f}{change:>24}", flush=True)


def kinds(layers: dict[str, str]) -> str:
    counts: dict[str, int] = {}
    for kind in layers.values():
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} × {kind}" for kind, count in sorted(counts.items()))


if __name__ == "__main__":
    main()
