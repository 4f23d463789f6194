"""What engines predict from exported GGUF files of the embedded model, beside the checkpoints they were made from.

    python bench/export_engines.py [--windows 4] [--length 128] [--llama-tokens 96]

For each checkpoint and engine: the largest and the mean |Δ log p| of the tokens that follow, in nats, against the same
checkpoint in transformers in float32. Engines compute as exactly as they can be asked to; llama.cpp rounds activations
to 8 bits where weights are integers, and goes token by token, so it reads the first tokens of one window.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np

from pennyweight import datasets, formats, machine, shipped
from pennyweight.recipe import DataSource, load_recipe
from pennyweight.sources import fetch_base
from pennyweight.store import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/integration"))
import engines
from quantized import make

TEXT = "xsum-documents"
CHECKPOINTS = {
    "unquantized": None,
    "8 bits": {"scheme": "w8a16", "head": "w8a16"},
    "4 bits, 8-bit head": {"scheme": "w4a16", "head": "w8a16"},
    "4 bits with zero points": {"scheme": "w4a16", "symmetric": False},
    "3 bits": {"scheme": "w3a16"},
}


def main() -> None:
    import torch
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--llama-tokens", type=int, default=96)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(machine.threads())
    store = Store()
    base = Path(fetch_base(load_recipe("smollm2-135m-cpu").base, store)[0].path)
    path, _ = datasets.fetch(TEXT, DataSource.model_validate(shipped.sources()[TEXT]), store)
    ids, _ = datasets.windows(
        AutoTokenizer.from_pretrained(base), datasets.texts(path), args.windows, args.length, seed=0
    )
    for name, settings in CHECKPOINTS.items():
        with tempfile.TemporaryDirectory() as scratch:
            compare(name, settings, base, Path(scratch), ids, args.llama_tokens)


def compare(name: str, settings: dict | None, base: Path, scratch: Path, ids: np.ndarray, llama_tokens: int) -> None:
    folder = base if settings is None else make(base, scratch / "checkpoint", group_size=64, **settings)
    written = formats.export(str(folder), "gguf", scratch / "model.gguf")
    file, ours = Path(written.path), engines.transformers(folder, ids)
    head = ids[:1, :llama_tokens]
    found = {
        "transformers": engines.transformers(file, ids) - ours,
        "OpenVINO GenAI": engines.openvino(file, ids) - ours,
        "llama.cpp": engines.LlamaCpp(file).follow(head) - ours[:1, : llama_tokens - 1],
    }
    sizes = ", ".join(f"{count} {kind}" for kind, count in sorted(written.tensors.items()))
    print(f"{name} ({sizes}; {written.bytes / 1e6:.1f} MB)")
    for engine, difference in found.items():
        print(f"  {engine:16} {np.abs(difference).max():.4f} / {np.abs(difference).mean():.5f}", flush=True)


if __name__ == "__main__":
    main()
