"""Whether what a killed training left can be gone on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError, safe_open

from pennyweight.distillation.train import BEST, Lessons

#: Folders of states that TRL's trainer saved, and the file that it writes last.
TRL, LAST = "trl/checkpoint-*", "trainer_state.json"


def clean(workspace: Path) -> str | None:
    """Remove what is half-written, and saved states that cannot be gone on from; what is wrong with one of those, None
    where nothing is."""
    for partial in workspace.glob("*.partial"):
        _remove(partial)
    for folder in workspace.glob(TRL):
        if not (folder / LAST).exists():
            _remove(folder)
    said = None
    for path in _states(workspace):
        if fault := _fault(path, workspace):
            _remove(path)
            said = f"the saved state {path} {fault}"
    if said is None:
        return None
    return f"{said}: " + ("it goes on from another one" if _states(workspace) else "it begins again")


def course_of(folder: Path) -> Lessons:
    """The course in a folder of TRL's trainer. Raises OSError, ValueError or KeyError where it is not there."""
    kept = json.loads((folder / LAST).read_text())["stateful_callbacks"]["OnPolicy"]
    return Lessons.load(kept["attributes"]["course"])


def _states(workspace: Path) -> list[Path]:
    return sorted([*workspace.glob("state-*.pt"), *workspace.glob(TRL)])


def _fault(path: Path, workspace: Path) -> str | None:
    try:
        course = _read(path)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, BadZipFile, UnpicklingError, SafetensorError):
        return "is damaged"
    best = workspace / BEST.format(course.kept)
    return None if any(best.glob("*.safetensors")) else f"counts on {best.name}, which is gone"


def _read(path: Path) -> Lessons:
    """The course of a saved state, all of whose files are whole as far as it can be seen."""
    for file in [path] if path.is_file() else [*path.glob("*.pt"), *path.glob("*.pth")]:
        with ZipFile(file) as archive:  # torch.load checks no sums
            if archive.testzip():
                raise ValueError(file.name)
    if path.is_file():
        return Lessons.load(json.loads(torch.load(path, "cpu", weights_only=True, mmap=True)["course"]))
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt"):
            pass
    return course_of(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
