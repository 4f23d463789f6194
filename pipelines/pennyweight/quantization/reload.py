"""A fresh process that loads a checkpoint and says what it predicts: `python -m … FOLDER IDS LOGITS DTYPE DEVICE`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def main() -> None:
    import torch

    from pennyweight import machine
    from pennyweight.quantization.unpacked import load_model

    folder, asked, answered, dtype, device = sys.argv[1:]
    torch.set_num_threads(machine.threads())
    model = load_model(Path(folder), getattr(torch, dtype)).to(device).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(asked)).to(device)).logits
    np.save(answered, logits.cpu().float().numpy())


if __name__ == "__main__":
    main()
