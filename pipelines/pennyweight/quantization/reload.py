"""What a checkpoint predicts once it is loaded again: `python -m … FOLDER IDS LOGITS DTYPE DEVICE`."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from pennyweight.errors import StageError


def predict_afresh(folder: Path, ids: np.ndarray, dtype: str, device: str) -> np.ndarray:
    """`predict`, in a process that knows nothing of how the checkpoint was made. Raises StageError where it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "ids.npy", Path(scratch) / "logits.npy"
        np.save(asked, ids)
        command = [sys.executable, "-m", __name__, str(folder), str(asked), str(answered), dtype, device]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            print(done.stderr)  # to the run's log
            raise StageError(f"a fresh process cannot load the checkpoint: {_reason(done.stderr)}")
        return np.load(answered)


def _reason(stderr: str) -> str:
    """The first line of the last exception."""
    raised = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", stderr, re.MULTILINE)
    return raised[-1] if raised else (stderr.strip().splitlines() or ["no output"])[-1]


def predict(folder: Path, ids: np.ndarray, dtype: str, device: str) -> np.ndarray:
    """Logits, float32 (batch, tokens, vocabulary), of token ids (batch, tokens)."""
    import torch

    from pennyweight.quantization.unpacked import load_model

    model = load_model(folder, getattr(torch, dtype)).to(device).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids).to(device)).logits.cpu().float().numpy()


def main() -> None:
    import torch

    from pennyweight import machine

    folder, asked, answered, dtype, device = sys.argv[1:]
    torch.set_num_threads(machine.threads())
    np.save(answered, predict(Path(folder), np.load(asked), dtype, device))


if __name__ == "__main__":
    main()
