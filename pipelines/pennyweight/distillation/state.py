"""Whether what a killed training left can be gone on from."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import torch

from pennyweight.distillation.train import BEST, Lessons


def clean(workspace: Path) -> str | None:
    """Remove what is half-written, and a saved state that cannot be gone on from; what is wrong with that, None where
    nothing is."""
    for partial in workspace.glob("*.partial"):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    for path in sorted(workspace.glob("state-*.pt")):
        if fault := _fault(path):
            path.unlink()
            return f"the saved state {path} {fault}"
    return None


def _fault(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as file:  # torch.load checks no sums
            if file.testzip():
                return "is damaged"
        course = Lessons.load(json.loads(torch.load(path, "cpu", weights_only=True, mmap=True)["course"]))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, zipfile.BadZipFile, pickle.UnpicklingError):
        return "is damaged"
    best = path.parent / BEST.format(course.kept)
    return None if any(best.glob("*.safetensors")) else f"counts on {best.name}, which is gone"
