"""Quantized checkpoints of tiny models, without the step's verification, which starts a process for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pennyweight import checkpoints
from pennyweight.quantization import decoder, methods, packed
from pennyweight.recipe import Quantize
from pennyweight.steps import quantize


def make(base: Path, folder: Path, windows: np.ndarray | None = None, **settings: Any) -> Path:
    """A checkpoint quantized as `settings` say, on calibration `windows` where the method needs them."""
    step = Quantize(**{"group_size": 32, "scheme": "w4a16", **settings})
    model = decoder.load(checkpoints.describe(base, "test"), "cpu")
    grids = quantize.layer_grids(model, step)
    if decoder.head_name(model) in grids:
        decoder.untie(model)
    rounding = methods.Settings(step.method, step.scale_search, step.dampening, torch.bfloat16)
    text = None if windows is None else torch.from_numpy(windows)
    folder.mkdir()
    packed.write(base, folder, model, methods.quantize(model, grids, rounding, text, lambda *_: None))
    return folder
