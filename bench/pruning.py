"""KL from the whole model on other text, by what chose the layers, before and after the rest is fitted; and width.

    python bench/pruning.py CHECKPOINT CHOSEN_ON JUDGED_ON [--layers 3 6] [--windows 32] [--samples 512]

CHECKPOINT is a folder; the texts are JSONL files with a `text` in each line, such as the store keeps. Layers are taken
out by influence (Men et al., 2024), greedily by KL, and by the step's own search; width by the fraction of the channels
that frees as many parameters as the layers do.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch

from pennyweight import checkpoints, datasets
from pennyweight.pruning import depth
from pennyweight.pruning.config import SEARCHED, cut_config, kept_channels, text_model
from pennyweight.pruning.reduce import Cut, become, reduce
from pennyweight.pruning.trials import Trials, batch_of
from pennyweight.quantization import decoder
from pennyweight.recipe import Prune
from pennyweight.stages.texts import load_tokenizer

SILENT = lambda *_: None  # noqa: E731


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("chosen_on", type=Path)
    parser.add_argument("judged_on", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--windows", type=int, default=32, help="to judge on")
    parser.add_argument("--samples", type=int, default=Prune.model_fields["samples"].default, help="as in a recipe")
    args = parser.parse_args()
    checkpoint = checkpoints.describe(args.checkpoint, str(args.checkpoint))
    config, model = checkpoints.read_config(args.checkpoint), decoder.load(checkpoint, "cpu")
    step = Prune(layers=1, text="any", samples=args.samples)
    length = step.length
    text = windows(checkpoint, args.chosen_on, step.samples - step.held_out, length)
    other = windows(checkpoint, args.judged_on, args.windows, length)
    judged = Trials(model, other, batch_of(other))
    trials = Trials(model, text[:SEARCHED], batch_of(text[:SEARCHED]))
    greedy = depth.by_divergence(trials, max(args.layers), SILENT, beam=1, exchange=False)

    def fitted(cut: Cut, after: dict) -> float:
        judged.model = copy.deepcopy(model)
        reduce(judged.model, cut, text, SILENT)
        become(judged.model, cut.removed, text_model(config), text_model(after))
        found = judged.now()
        judged.model = model
        return found

    for count in args.layers:
        chosen = {
            "influence": depth.least_influential(trials, count),
            "greedy": greedy[count - 1].removed,
            "search": depth.by_divergence(trials, count, SILENT)[-1].removed,
        }
        for name, removed in chosen.items():
            after = fitted(Cut(removed=removed), cut_config(config, sorted(removed)))
            print(f"{count} by {name}: {sorted(removed)}: KL {judged.kl(removed):.4f}, fitted {after:.4f}", flush=True)
        known = text_model(config)
        block = sum(value.numel() for value in judged.blocks[0].parameters())
        share = count * block / (3 * known.hidden_size * known.intermediate_size * known.num_hidden_layers)
        kept = kept_channels(known.intermediate_size, share)
        cut = Cut(channels=known.intermediate_size, kept_channels=kept)
        after = fitted(cut, cut_config(config, [], ffn=share))
        print(f"as many parameters of width: {kept} of {cut.channels} channels: fitted {after:.4f}", flush=True)


def windows(checkpoint: checkpoints.Checkpoint, path: Path, count: int, length: int) -> torch.Tensor:
    return torch.from_numpy(datasets.windows(load_tokenizer(checkpoint), datasets.texts(path), count, length, 0)[0])


if __name__ == "__main__":
    main()
