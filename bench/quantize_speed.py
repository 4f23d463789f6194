"""Our GPTQ beside llm-compressor's: the same layers of the embedded base, the same text, in one process.

    python bench/quantize_speed.py [--layers 3] [--samples 16] [--rounds 3]

A round is ours, theirs, theirs, ours, so that a machine that gets slower or faster by the minute favours neither. Both
calibrate and round the same linear layers to 4 bits, symmetric, in groups of 64; the model is loaded outside the clock.
The error is that of the last hidden states on text that neither has seen. The bar is a ratio of at most 1.05.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
from typing import Any

from pennyweight import datasets, shipped
from pennyweight.recipe import DataSource, load_recipe
from pennyweight.sources import fetch_base
from pennyweight.store import Store

BAR = 1.05
BITS, GROUP, LENGTH, DAMPENING = 4, 64, 256, 0.01


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    model, windows = job(args.layers, args.samples + 4)
    text, unseen = windows[: args.samples], windows[args.samples :]
    print(
        f"{args.layers} decoder layers, {args.samples} × {LENGTH} tokens, {torch.get_num_threads()} threads, seconds:"
    )
    ratios = []
    for number in range(1, args.rounds + 1):
        turns = [timed(run, model, text) for run in (ours, theirs, theirs, ours)]
        a, b, c, d = (seconds for seconds, _ in turns)
        ratios += [a / b, d / c]
        print(f"round {number}: ours {a:.2f} {d:.2f}, llm-compressor {b:.2f} {c:.2f}", flush=True)
    print(f"median of {len(ratios)} ratios ours/llm-compressor: {statistics.median(ratios):.3f} (bar: {BAR})")
    errors = [error(made, model, unseen) for _, made in turns[:2]]
    print(f"relative error of hidden states on unseen text: ours {errors[0]:.4f}, llm-compressor {errors[1]:.4f}")


def job(layers: int, samples: int) -> tuple[Any, Any]:
    """The embedded base cut to its first layers, in float32, and windows of calibration text, int64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    store = Store()
    checkpoint, _ = fetch_base(load_recipe("smollm2-135m-cpu").base, store)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval().requires_grad_(False)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    source = DataSource.model_validate(shipped.sources()["boolq-passages"])
    documents = datasets.texts(datasets.fetch("boolq-passages", source, store)[0])
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    return model, torch.from_numpy(datasets.windows(tokenizer, documents, samples, LENGTH, 0)[0])


def timed(run: Any, model: Any, text: Any) -> tuple[float, Any]:
    copied = copy.deepcopy(model)
    begin = time.perf_counter()
    run(copied, text)
    return time.perf_counter() - begin, copied


def ours(model: Any, text: Any) -> None:
    import torch

    from pennyweight.quantization import decoder, methods
    from pennyweight.quantization.grid import Grid

    grids = dict.fromkeys(decoder.linears(model), Grid(BITS, GROUP))
    settings = methods.Settings("gptq", "mse", DAMPENING, torch.bfloat16)
    methods.quantize(model, grids, settings, text, lambda *_: None)


def theirs(model: Any, text: Any) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    weights = QuantizationArgs(num_bits=BITS, type="int", symmetric=True, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    rows = {"input_ids": text.tolist(), "attention_mask": [[1] * text.shape[1]] * len(text)}
    oneshot(
        model=model,
        recipe=[GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], dampening_frac=DAMPENING)],
        dataset=Dataset.from_dict(rows),
        num_calibration_samples=len(text),
        max_seq_length=text.shape[1],
        batch_size=8,
        shuffle_calibration_samples=False,
    )


def error(made: Any, model: Any, windows: Any) -> float:
    """‖h' − h‖ / ‖h‖ of the last hidden states."""
    import torch

    with torch.no_grad():
        found, expected = (part.model(windows).last_hidden_state for part in (made, model))
    return float((found - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
