"""What bits given layer by layer are worth: the embedded model, at exactly the bytes of two fixed rules.

    python bench/allocation.py [--method rtn] [--choices 3 4 8] [--group-sizes 32 64 192] [--trials 40]

The rules are W4 in groups of 64 for every layer, and that with the first and the last block at 8 bits. Allocation sees
BoolQ's passages; everything is judged on XSum's articles, which are text of another kind. Embedding and head stay as
they are in all of them. KL is in nats per token from the unquantized model; ± is the standard error over windows of the
paired difference to the rule. Bars: at the second rule's bytes ≥ 10% less KL, at the first one's never more.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
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
    judge = Judge(decoder.load(base, "cpu"), texts[JUDGED])
    print(f"{options.method}, scales by {options.scales}; {texts[JUDGED].size:,} tokens of {JUDGED}")
    print(f"{'':36}{'MB':>9}{'KL':>9}{'against the rule':>20}", flush=True)
    for rule in options.rules:
        compare(rule, base, texts[CALIBRATION], judge, options)


def compare(rule: str, base: Checkpoint, calibration: Any, judge: Judge, options: Any) -> None:
    """The rule, and what allocation makes of its bytes."""
    import torch

    shape = model_shape(checkpoints.read_config(Path(base.path)), base.dtype)
    grids = rule_grids(rule, judge.base)
    widths = {name: (grid.bits, grid.group_size) for name, grid in grids.items()}
    size = allocated_bytes(shape, auto(options, 1), widths)
    step = auto(options, size)
    fixed = judge(quantized(base, grids, step, calibration))
    row(rule, size, fixed.mean())
    begin, model = time.monotonic(), decoder.load(base, "cpu")
    windows, dtype = torch.from_numpy(calibration), getattr(torch, base.dtype)
    grids, found = allocate(model, shape, step, windows, dtype, SEED, lambda *_: None)
    seconds = time.monotonic() - begin
    del model
    ours = judge(quantized(base, grids, step, calibration))
    change, error = paired(ours, fixed)
    row(f"auto at {rule}'s bytes", found.bytes, ours.mean(), f"{change:+.1%} ± {error:.1%}")
    held = ", ".join(f"{name} {kl:.4f}" for name, kl in found.uniform_kl.items())
    print(f"  on {CALIBRATION}: {found.measured_kl:.4f}, predicted {found.predicted_kl:.4f}; {held}")
    print(f"  {found.trials} trials, {seconds:.0f} s; {kinds(found.layers)}", flush=True)


def rule_grids(rule: str, model: Any) -> dict[str, Grid]:
    """4 bits in groups of 64 for every layer, but for 8 bits in the first and the last block where the rule says so."""
    stack, blocks = decoder.blocks(model)
    ends = tuple(f"{stack}.{at}." for at in (0, len(blocks) - 1)) if rule == "first-last-8" else ()
    return {name: Grid(8 if name.startswith(ends) else 4, 64) for name in decoder.linears(model)}


def parse() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("rtn", "gptq"), default="rtn")
    parser.add_argument("--scales", choices=("max", "mse"), default="mse")
    parser.add_argument(
        "--rules", nargs="+", choices=("uniform-4", "first-last-8"), default=("uniform-4", "first-last-8")
    )
    parser.add_argument("--choices", nargs="+", type=int, default=(3, 4, 8))
    parser.add_argument("--group-sizes", nargs="+", type=int, default=(32, 64, 192))
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


def auto(options: Any, size: int) -> Quantize:
    """The step that allocates `size` bytes."""
    return Quantize.model_validate(
        {
            "scheme": "auto",
            "method": options.method,
            "scales": options.scales,
            "budget": {"bytes": size},
            "choices": list(options.choices),
            "group_sizes": list(options.group_sizes),
            "calibrate": {"source": CALIBRATION, "samples": options.samples, "length": options.length},
            "search": {"trials": options.trials},
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
        self._expected = list(self._predictions(base))

    def __call__(self, model: Any) -> Any:
        import numpy as np

        pairs = zip(self._expected, self._predictions(model))
        return np.array([(a.exp() * (a - b)).sum(-1).mean().item() for a, b in pairs])

    def _predictions(self, model: Any) -> Iterator[Any]:
        """Log-probabilities of each window, float32 (tokens, vocabulary)."""
        import torch

        for ids in torch.from_numpy(self._windows):
            with torch.inference_mode():
                yield torch.log_softmax(model(ids[None]).logits[0].float(), -1)


def paired(ours: Any, fixed: Any) -> tuple[float, float]:
    """Relative change of the mean, and its standard error over windows."""
    change = ours.mean() / fixed.mean() - 1
    residual = ours - (1 + change) * fixed
    return change, residual.std(ddof=1) / len(residual) ** 0.5 / fixed.mean()


def row(name: str, size: int, kl: float, change: str = "") -> None:
    print(f"{name:36}{size / 1e6:>9.3f}{kl:>9.4f}{change:>20}", flush=True)


def kinds(layers: dict[str, str]) -> str:
    counts: dict[str, int] = {}
    for kind in layers.values():
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} × {kind}" for kind, count in sorted(counts.items()))


if __name__ == "__main__":
    main()
