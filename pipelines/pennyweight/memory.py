"""The memory that work takes, and what to say when it runs out."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import psutil

from pennyweight import machine
from pennyweight.errors import StageError

#: Seconds for which a list of child processes serves.
LISTED_SECONDS = 1.0


class _Family:
    """This process and its children. Pages that they share count once for each of them. To list them, every process of
    the machine is read, so a list serves a while."""

    def __init__(self) -> None:
        self._members: list[psutil.Process] = []
        self._listed = -math.inf

    def resident_bytes(self) -> int:
        now = time.monotonic()
        if now - self._listed >= LISTED_SECONDS:
            process = psutil.Process()
            self._members, self._listed = [process, *process.children(recursive=True)], now
        return sum(map(_resident_bytes_of, self._members))


def _resident_bytes_of(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0  # it ended after it was listed


def device_bytes() -> int:
    """Memory of the current GPU that is in use, by this process and all others."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


class PeakMemory:
    """The most memory in use while the block runs: as `used` counts it, by default that of this process and its
    children.

    It is sampled every `interval` seconds. Of this process the kernel keeps the peak as well, where it lets it be
    reset: a library that holds the interpreter's lock for seconds keeps samples from being taken.

    >>> with PeakMemory() as memory:
    ...     work()
    >>> memory.peak_bytes, memory.start_bytes, memory.end_bytes
    """

    _on_mark: ClassVar[list[PeakMemory]] = []
    """Those that the kernel's peak since its last reset counts for."""

    def __init__(self, interval: float = 0.05, used: Callable[[], int] | None = None):
        self.interval = interval
        self.start_bytes = self.end_bytes = self.peak_bytes = 0
        self._used = used or _Family().resident_bytes
        self._of_process = used is None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._read_mark()
        if self._of_process and _reset_mark():
            self._on_mark.append(self)
        self.start_bytes = self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._read_mark()
        if self in self._on_mark:
            self._on_mark.remove(self)
        self.end_bytes = self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self._sample()

    def _sample(self) -> int:
        used = self._used()
        self.peak_bytes = max(self.peak_bytes, used)
        return used

    @classmethod
    def _read_mark(cls) -> None:
        """Note the kernel's peak for all that it counts for: those that go on would lose it by a reset."""
        peak = _mark() if cls._on_mark else 0
        for watching in cls._on_mark:
            watching.peak_bytes = max(watching.peak_bytes, peak)


def _reset_mark() -> bool:
    """Let the kernel's peak of this process begin anew (https://man7.org/linux/man-pages/man5/proc_pid_clear_refs.5.html);
    whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _mark() -> int:
    """The most resident memory of this process since then, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def release_memory() -> None:
    """Give back to the system what the last stage freed; the C library keeps it otherwise, and the next stage adds."""
    gc.collect()
    _c_library("malloc_trim", 0)


@contextlib.contextmanager
def reused_memory() -> Iterator[None]:
    """Let the C library keep what is freed in here for what is asked for next.

    It would hand blocks above 32 MiB back to the system, which clears their pages when they are asked for again: that
    takes a third of the time of a loss over a vocabulary. `release_memory` gives back what is left.
    """
    try:
        for option, value in _REUSED.items():
            _c_library("mallopt", option, value)
        yield
    finally:
        for option, value in _USUAL.items():
            _c_library("mallopt", option, value)


#: Options of glibc's mallopt. Once set they no longer adapt, so the usual ones are those that a process adapts to which
#: has freed large blocks.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_REUSED = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 2**28}
_USUAL = {_MMAP_MAX: 2**16, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26, _TOP_PAD: 2**17}


def _c_library(function: str, *values: int) -> None:
    """Call a function of glibc's; nothing where another C library lacks it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            getattr(ctypes.CDLL(None), function)(*values)


@contextlib.contextmanager
def out_of_memory_of(work: str, remedy: str) -> Iterator[None]:
    """Turn a failure to allocate into a StageError that says how much was asked for, and what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        asked = re.search(r"allocate ([\d.]+ [KMGT]?i?B|[\d.]+ bytes)", str(error))
        free = machine.available_memory_bytes() / 2**30
        wanted = f" when it asked for {asked[1]} more" if asked else ""
        raise StageError(
            f"{work} ran out of memory{wanted}; {free:.1f} GiB of the machine's are free", remedy
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return "not enough memory" in str(error) or "can't allocate memory" in str(error)
