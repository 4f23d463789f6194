"""The servers that are measured, each a process of its own, on cores of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from environments import python_of

LLAMA_CPP = "xllamacpp==2026.10.11549"
HERE = Path(__file__).parent


@contextmanager
def llama_cpp(model: Path, slots: int, context: int, threads: int, cores: set[int]) -> Iterator[str]:
    """The address of llama.cpp's server on a GGUF file: `slots` requests at once, of `context` tokens each."""
    python = python_of("llama.cpp", [LLAMA_CPP])
    settings = [str(number) for number in (slots, context, threads)]
    with _running([python, HERE / "llama_server.py", model, *settings], cores) as (address, _):
        yield address


@contextmanager
def known(ttft_ms: float, tpot_ms: float, cores: set[int]) -> Iterator[tuple[str, int]]:
    """The address of the server of known behaviour, and a descriptor to read from what it tells of its requests."""
    with _running([sys.executable, HERE / "known_server.py", str(ttft_ms), str(tpot_ms)], cores) as found:
        yield found


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """What is started in here runs on these logical CPUs."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _running(command: Sequence[str | Path], cores: set[int]) -> Iterator[tuple[str, int]]:
    """A process that prints its address when it serves, and serves until its standard input ends. Also yields the
    descriptor of what it prints later."""
    with on_cores(cores):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    try:
        address = process.stdout.readline().decode().strip()
        if not address:
            raise SystemExit(f"the server did not start: {' '.join(map(str, command))}")
        yield address, process.stdout.fileno()
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
