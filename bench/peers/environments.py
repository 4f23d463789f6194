"""Virtual environments for programs that must not share ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pennyweight.store import default_root

#: Written last, so that an environment that was half made is made again.
READY = "installed.txt"


def python_of(name: str, packages: Sequence[str]) -> Path:
    """The Python of an environment with these packages, made with uv or pip where it is missing.

    It lies in a folder beside the store. Raises SystemExit where it cannot be made.
    """
    folder = default_root().with_name("pennyweight-peers") / name
    python, wanted = folder / "bin" / "python", "\n".join(packages) + "\n"
    if (folder / READY).exists() and (folder / READY).read_text() == wanted:
        return python
    print(f"making {folder}: {', '.join(packages)}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    for command in _commands(folder, python, packages):
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise SystemExit(f"{folder} could not be made: {' '.join(map(str, command))}")
    (folder / READY).write_text(wanted)
    return python


def _commands(folder: Path, python: Path, packages: Sequence[str]) -> list[list[str | Path]]:
    beside = Path(sys.executable).with_name("uv")
    uv = beside if beside.exists() else shutil.which("uv")
    if not uv:
        return [[sys.executable, "-m", "venv", folder], [python, "-m", "pip", "install", "--quiet", *packages]]
    # uv ignores pip's folders of wheels; without any, it picks the torch build that needs no GPU's libraries.
    links = os.environ.get("PIP_FIND_LINKS", "").split()
    options = [word for link in links for word in ("--find-links", link)] or ["--torch-backend", "cpu"]
    return [
        [uv, "venv", "--quiet", "--python", sys.executable, folder],
        [uv, "pip", "install", "--quiet", "--python", python, *options, *packages],
    ]
