"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pennyweight.errors import StoreError


def write_whole(path: Path, text: str) -> None:
    """Write a text file, in folders that are made where they miss; what was there before stays until all is written.

    Raises StoreError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StoreError(
            f"{path} cannot be written: {error.strerror}",
            "free some disk, or make the folder writable, and run the same command again: finished stages are kept",
        ) from error
