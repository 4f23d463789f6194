"""How fast this machine is: reads from memory, and matrix products."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pennyweight import machine
from pennyweight.records import Measured

if TYPE_CHECKING:
    import torch

#: Bytes that are read to measure memory itself: beyond the caches of most machines.
LARGE_READ = 256 << 20
#: Bytes that `ceilings` reads over and over: what a cache holds is read faster, and so is a model that fits in it.
READ_SIZES = {
    "cpu": tuple(1 << power for power in range(20, 29)),
    "cuda": tuple(1 << power for power in (24, 26, 28, 30)),
}
#: Bytes that one trial reads at least.
TRIAL_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}
#: (rows, inner, columns) of a product like those of a small decoder's MLP.
PRODUCT = (1024, 1024, 4096)
#: The same of those that `ceilings` times: large enough to keep the device busy, and short enough for many trials.
LARGE_PRODUCT = {"cpu": (512, 1024, 4096), "cuda": (8192, 8192, 8192)}
CEILING_SECONDS = 1.5

Timer = Callable[[Callable[[], object], float], float]
"""(work, seconds to try for) → seconds of one call."""


def measure(seconds: float = 2.0, device: Literal["cpu", "cuda"] = "cpu") -> Measured:
    """What memory reads and matrix products usually take, measured for about `seconds` in all. Needs torch, and for
    `cuda` a GPU."""
    return _measured(seconds, device, (LARGE_READ,), PRODUCT, _usual_time, kernels=1)


def ceilings(seconds: float = CEILING_SECONDS, device: Literal["cpu", "cuda"] = "cpu") -> Measured:
    """The fastest that the same work was done at by any kernel, for bounds on what a model can do; reads of less
    memory too.

    The best of many trials is what STREAM reports (McCalpin, 1995): what disturbs a trial can only slow it down.
    """
    return _measured(seconds, device, READ_SIZES[device], LARGE_PRODUCT[device], _least_time)


def fastest(one: Measured, other: Measured) -> Measured:
    """The larger of each of two measurements of the same machine."""
    int8 = [speed for speed in (one.gops_int8, other.gops_int8) if speed is not None]
    return Measured(
        threads=one.threads,
        read_gb_per_s=max(one.read_gb_per_s, other.read_gb_per_s),
        gflops_fp32=max(one.gflops_fp32, other.gflops_fp32),
        gflops_bf16=max(one.gflops_bf16, other.gflops_bf16),
        gops_int8=max(int8, default=None),
        reads={size: max(speed, other.reads.get(size, speed)) for size, speed in one.reads.items()},
    )


def _measured(
    seconds: float, device: str, sizes: tuple[int, ...], shape: tuple[int, int, int], timer: Timer,
    kernels: int | None = None,
) -> Measured:  # fmt: skip
    """`sizes` of memory to read, in bytes; `shape` (rows, inner, columns) of the products; the fastest of so many
    `kernels` counts."""
    import torch

    def least(works: list[Callable[[], object]], seconds: float) -> float:
        return min(timer(work, seconds / len(works[:kernels])) for work in works[:kernels])

    def read(size: int) -> float:
        passes = max(1, TRIAL_BYTES[device] // size)
        return passes * size / least(_reads(size, passes, device), seconds / 4 / len(sizes)) / 1e9

    def multiply(dtype: torch.dtype) -> float:
        return 2 * math.prod(shape) / least(_products(dtype, shape, device), seconds / 4) / 1e9

    count, before = machine.threads(), torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        reads = {size: read(size) for size in sizes}
        int8 = None
        with contextlib.suppress(RuntimeError):  # torch has no kernel for it on some devices
            int8 = multiply(torch.int8)
        return Measured(
            threads=count,
            read_gb_per_s=reads[max(sizes)],
            gflops_fp32=multiply(torch.float32),
            gflops_bf16=multiply(torch.bfloat16),
            gops_int8=int8,
            reads=reads,
        )
    finally:
        torch.set_num_threads(before)


def _reads(size: int, passes: int, device: str) -> list[Callable[[], object]]:
    """Ways to read `size` bytes, `passes` times over: as a sum, and as a matrix that a vector is multiplied with."""
    import torch

    matrix = torch.ones(1024, size // 4 // 1024, device=device)
    vector = torch.ones(matrix.shape[1], device=device)

    def again(work: Callable[[], torch.Tensor]) -> object:
        for _ in range(passes - 1):
            work()
        return work().view(-1)[0].item()  # makes the device finish

    return [lambda: again(matrix.sum), lambda: again(lambda: matrix @ vector)]


def _products(dtype: torch.dtype, shape: tuple[int, int, int], device: str) -> list[Callable[[], object]]:
    """Ways to multiply (rows, inner) with (inner, columns), first the one that models call. Each ends by reading a
    number, which makes the device finish."""
    import torch

    rows, inner, columns = shape
    if dtype == torch.int8:
        left = torch.randint(-127, 128, (rows, inner), dtype=dtype, device=device)
        weight = torch.randint(-127, 128, (columns, inner), dtype=dtype, device=device).T
        sums = torch.empty(rows, columns, dtype=torch.int32, device=device)
        return [lambda: torch._int_mm(left, weight, out=sums)[0, 0].item()]
    left = torch.randn(rows, inner, device=device).to(dtype)
    weight = torch.randn(columns, inner, device=device).to(dtype)
    into = torch.empty(rows, columns, dtype=dtype, device=device)
    works: list[Callable[[], object]] = [
        lambda: torch.nn.functional.linear(left, weight)[0, 0].item(),
        lambda: torch.mm(left, weight.T, out=into)[0, 0].item(),
    ]
    if device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        opaque = left.to_mkldnn()  # oneDNN, where torch's own choice is another library
        works.append(lambda: torch.nn.functional.linear(opaque, weight))
    return works


def _times(work: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, after a warm-up."""
    work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def _usual_time(work: Callable[[], object], seconds: float) -> float:
    """Seconds of one call: the lower quartile, as others on a shared machine slow some calls down."""
    times = _times(work, seconds)
    return sorted(times)[len(times) // 4]


def _least_time(work: Callable[[], object], seconds: float) -> float:
    return min(_times(work, seconds))
