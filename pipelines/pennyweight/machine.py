"""What this machine is, what it can do, and how fast it is."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import psutil

from pennyweight.errors import UsageError
from pennyweight.installed import installed_version
from pennyweight.records import Measured

if TYPE_CHECKING:
    import torch

#: CPU features that change which kernels run, and so numbers and speed.
ISA_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
)

#: Libraries whose versions belong in a record.
LIBRARIES = (
    "accelerate", "auto-round", "compressed-tensors", "datasets", "gguf", "gptqmodel", "llmcompressor", "lm-eval",
    "mlflow", "numpy", "onnx-ir", "onnxruntime", "onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-gpu",
    "openvino", "openvino-genai",
    "pennyweight", "safetensors", "tokenizers", "torch", "transformers",
)  # fmt: skip

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 writes «no limit» as a number near 2^63

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


# --- what it is -------------------------------------------------------------------------------------------------------


@cache
def fingerprint() -> dict[str, Any]:
    """What decides numbers and speed on this machine, as JSON; the same in every process on it."""
    text = _read(Path("/proc/cpuinfo"))
    present = cpu_flags(text)
    return {
        "cpu": cpu_model(text) or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "isa": [flag for flag in ISA_FLAGS if flag in present],
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "gpus": gpus(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def environment() -> dict[str, Any]:
    """The fingerprint, the threads in use, and the versions of the libraries that matter."""
    versions = {name: version for name in LIBRARIES if (version := installed_version(name))}
    return {**fingerprint(), "threads": threads(), "versions": versions}


def threads() -> int:
    """Threads that compute: the usable physical cores, or PENNYWEIGHT_THREADS. Raises UsageError for a bad count."""
    text = os.environ.get("PENNYWEIGHT_THREADS")
    if not text:
        return usable_cores()
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"PENNYWEIGHT_THREADS must be a whole number above 0, not {text!r}")
    return int(text)


def has_native_bf16() -> bool:
    """The CPU multiplies bfloat16 matrices in hardware (AVX-512 BF16, AMX, or Arm's BF16)."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(fingerprint()["isa"]))


def has_gpu() -> bool:
    """An NVIDIA GPU is there for this process to use."""
    return bool(gpus())


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """`auto` as the GPU where there is one, else the CPU."""
    if device != "auto":
        return device
    return "cuda" if has_gpu() else "cpu"


def cpu_model(cpuinfo: str) -> str | None:
    """The `model name` in the text of /proc/cpuinfo."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return " ".join(found[1].split()) if found else None


def cpu_flags(cpuinfo: str) -> set[str]:
    """Features of the first CPU in the text of /proc/cpuinfo (`flags` on x86, `Features` on Arm)."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return set(found[1].split()) if found else set()


def physical_cores(cpuinfo: str, allowed: set[int]) -> int:
    """Distinct cores among the `allowed` logical CPUs; each counts as one where /proc/cpuinfo names no cores."""
    cores: set[tuple[str, str]] = set()
    for block in cpuinfo.strip().split("\n\n"):
        fields = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", block, re.MULTILINE))
        number = fields.get("processor", "")
        if number.isdigit() and int(number) in allowed:
            cores.add((fields.get("physical id", "0"), fields.get("core id", f"cpu{number}")))
    return len(cores) or len(allowed)


def usable_cores() -> int:
    """Physical cores that this process may use: its affinity, then the cgroup's quota rounded down, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    else:
        allowed = set(range(psutil.cpu_count(logical=False) or 1))
    cores = physical_cores(_read(Path("/proc/cpuinfo")), allowed)
    quota, _ = _own_cgroup_limits()
    return max(1, min(cores, math.floor(quota))) if quota else cores


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or the cgroup's limit where that is lower."""
    _, limit = _own_cgroup_limits()
    total = psutil.virtual_memory().total
    return min(total, limit) if limit else total


def available_memory_bytes() -> int:
    """Memory that is free for this process now, without swapping."""
    return min(psutil.virtual_memory().available, memory_bytes())


def free_memory(device: Literal["cpu", "cuda"]) -> int:
    """Bytes free for models on `device`; of this machine where it has no such device."""
    if device == "cuda" and has_gpu():
        import torch

        if torch.cuda.is_available():
            return torch.cuda.mem_get_info()[0]
    return available_memory_bytes()


def cgroup_limits(membership: str, root: Path) -> tuple[float | None, int | None]:
    """(CPUs, bytes) that control groups v1 and v2 allow, None where there is no limit.

    `membership` is the text of /proc/self/cgroup; every group from the process's own up to `root` counts, the tightest
    wins.
    """
    cpus: list[float] = []
    memory: list[int] = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",") if controllers else [""]
        for folder in _groups(root, names, path):
            cpus += _cpu_limit(folder)
            memory += _memory_limit(folder)
    return min(cpus, default=None), min(memory, default=None)


def _groups(root: Path, controllers: list[str], path: str) -> list[Path]:
    """Folders of the group `path` and its parents, in every mount that carries one of the controllers."""
    mounts = (
        [root / "unified", root]
        if controllers == [""]
        else [root / name for name in [",".join(controllers), *controllers]]
    )
    relative = Path(path.lstrip("/"))
    return [mount / part for mount in mounts if mount.is_dir() for part in (relative, *relative.parents)]


def _cpu_limit(folder: Path) -> list[float]:
    """Quota over period, in CPUs: `cpu.max` of cgroup v2, `cpu.cfs_*_us` of v1."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    if not quota.strip().isdigit() or not period.strip().isdigit():
        return []  # `max`, `-1`, or no such file
    return [int(quota) / int(period)]


def _memory_limit(folder: Path) -> list[int]:
    texts = (_read(folder / "memory.max"), _read(folder / "memory.limit_in_bytes"))
    return [int(text) for text in texts if text.strip().isdigit() and int(text) < _UNLIMITED]


def _own_cgroup_limits() -> tuple[float | None, int | None]:
    return cgroup_limits(_read(Path("/proc/self/cgroup")), _CGROUP_ROOT)


@cache
def gpus() -> list[dict[str, Any]]:
    """NVIDIA GPUs that CUDA programs of this process would see: name, memory in GiB, driver."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(shown, os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(shown: str, visible: str | None) -> list[dict[str, Any]]:
    """GPUs in nvidia-smi's CSV (index, uuid, name, MiB, driver) that CUDA_VISIBLE_DEVICES lets through."""
    found = []
    for line in shown.strip().splitlines():
        index, uuid, name, memory, driver = (part.strip() for part in line.split(","))
        if visible is None or any(
            index == wanted or (wanted and uuid.startswith(wanted)) for wanted in visible.split(",")
        ):
            found.append({"name": name, "memory_gib": round(float(memory) / 1024, 1), "driver": driver})
    return found


# --- how fast it is ---------------------------------------------------------------------------------------------------


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

    count, before = threads(), torch.get_num_threads()
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


# --- the memory that work takes ---------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """Resident memory of this process and its children. Pages that they share count once for each of them."""
    process, total = psutil.Process(), 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_info().rss
        except psutil.Error:
            continue  # it ended between being listed and being asked
    return total


def device_bytes() -> int:
    """Memory of the current GPU that is in use, by this process and all others."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


class PeakMemory:
    """The most memory in use while the block runs, sampled every `interval` seconds: as `used` counts it.

    >>> with PeakMemory() as memory:
    ...     work()
    >>> memory.peak_bytes, memory.start_bytes, memory.end_bytes
    """

    def __init__(self, interval: float = 0.05, used: Callable[[], int] = resident_bytes):
        self.interval = interval
        self.start_bytes = self.end_bytes = self.peak_bytes = 0
        self._used = used
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self.start_bytes = self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.end_bytes = self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self._sample()

    def _sample(self) -> int:
        used = self._used()
        self.peak_bytes = max(self.peak_bytes, used)
        return used


# --- what is free -----------------------------------------------------------------------------------------------------


def release_memory() -> None:
    """Give back to the system what the last stage freed; the C library keeps it otherwise, and the next stage adds."""
    import ctypes
    import gc

    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


def free_disk_bytes(folder: Path) -> int:
    """Free bytes on the disk that holds `folder`, or that would hold it."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
