"""What to say when memory runs out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from pennyweight import machine
from pennyweight.errors import StageError


@contextmanager
def out_of_memory_of(work: str, remedy: str) -> Iterator[None]:
    """Turn a failure to allocate into a StageError that says how much was asked for, and what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        asked = re.search(r"allocate ([\d.]+ [KMGT]?i?B|[\d.]+ bytes)", str(error))
        free = f"{machine.available_memory_bytes() / 2**30:.1f} GiB of this machine's are free"
        wanted = f" when it asked for {asked[1]} more" if asked else ""
        raise StageError(
            f"{work} ran out of memory{wanted}; {free:.1f} GiB of the machine's are free", remedy
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return "not enough memory" in str(error) or "can't allocate memory" in str(error)
