"""What this machine is, what it can do, and what of it is free."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, Literal

import psutil

from pennyweight.errors import UsageError
from pennyweight.installed import installed_version

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
    "pennyweight", "safetensors", "tokenizers", "torch", "transformers", "trl",
)  # fmt: skip

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 writes «no limit» as a number near 2^63


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


def has_cpp_compiler() -> bool:
    """One that torch.compile finds: the one that CXX names, else g++ or clang++."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)


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


def free_disk_bytes(folder: Path) -> int:
    """Free bytes on the disk that holds `folder`, or that would hold it."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
