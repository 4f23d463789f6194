"""What a machine says of itself, from texts of machines that this one is not."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pennyweight import machine, memory, speed
from pennyweight.errors import StageError, UsageError
from pennyweight.memory import out_of_memory_of
from pennyweight.records import Measured

XEON = """\
processor\t: 0
model name\t: Intel(R)  Xeon(R) Platinum 8488C
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu avx2 avx512f avx512_vnni amx_tile amx_bf16

processor\t: 1
model name\t: Intel(R)  Xeon(R) Platinum 8488C
physical id\t: 0
core id\t\t: 1
flags\t\t: fpu avx2

processor\t: 2
model name\t: Intel(R)  Xeon(R) Platinum 8488C
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu avx2
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp bf16\n\nprocessor\t: 1\nFeatures\t: fp asimd asimddp bf16\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_cpu_model_and_flags_of_cpuinfo() -> None:
    assert machine.cpu_model(XEON) == "Intel(R) Xeon(R) Platinum 8488C"
    assert machine.cpu_flags(XEON) == {"fpu", "avx2", "avx512f", "avx512_vnni", "amx_tile", "amx_bf16"}
    assert machine.cpu_model(ARM) is None
    assert "bf16" in machine.cpu_flags(ARM)
    assert machine.cpu_flags("") == set()


@pytest.mark.parametrize(
    ("cpuinfo", "allowed", "cores"),
    [
        (XEON, {0, 1, 2}, 2),  # 0 and 2 are hyperthreads of one core
        (XEON, {0, 2}, 1),
        (XEON, {1}, 1),
        (ARM, {0, 1}, 2),
        ("", {0, 1, 2, 3}, 4),
    ],
)
def test_hyperthreads_are_not_cores(cpuinfo: str, allowed: set[int], cores: int) -> None:
    assert machine.physical_cores(cpuinfo, allowed) == cores


def test_cgroup_v2_limits_come_from_the_tightest_parent(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "a/cpu.max": "150000 100000",
            "a/memory.max": "max",
            "a/b/cpu.max": "max 100000",
            "a/b/memory.max": "4294967296",
        },
    )
    assert machine.cgroup_limits("0::/a/b\n", root) == (1.5, 4 << 30)


def test_cgroup_v1_limits(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "cpu,cpuacct/docker/cpu.cfs_quota_us": "400000",
            "cpu,cpuacct/docker/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "memory/docker/memory.limit_in_bytes": "2147483648",
        },
    )
    assert machine.cgroup_limits("4:memory:/docker\n3:cpu,cpuacct:/docker\n1:name=systemd:/docker\n", root) == (
        4.0,
        2 << 30,
    )


def test_no_cgroup_limit_is_none(tmp_path: Path) -> None:
    root = write(tmp_path, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000", "cpu.max": "max 100000"})
    assert machine.cgroup_limits("2:cpu:/\n0::/\n", root) == (None, None)
    assert machine.cgroup_limits("", root) == (None, None)


@pytest.mark.parametrize(("quota", "cores"), [(1.9, 1), (0.5, 1), (2.0, 2), (64.0, 2), (None, 2)])
def test_quota_caps_the_cores(monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int) -> None:
    monkeypatch.setattr(machine, "_own_cgroup_limits", lambda: (quota, None))
    monkeypatch.setattr(machine, "physical_cores", lambda *_: 2)
    assert machine.usable_cores() == cores


def test_memory_is_the_lower_of_machine_and_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_own_cgroup_limits", lambda: (None, 64 << 20))
    assert machine.memory_bytes() == 64 << 20
    assert machine.available_memory_bytes() <= 64 << 20
    monkeypatch.setattr(machine, "_own_cgroup_limits", lambda: (None, None))
    assert machine.memory_bytes() > 64 << 20


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["NVIDIA L4", "NVIDIA A10G"]),
        ("1", ["NVIDIA A10G"]),
        ("GPU-aa", ["NVIDIA L4"]),
        ("", []),
        ("-1", []),
    ],
)
def test_gpus_that_cuda_would_see(visible: str | None, names: list[str]) -> None:
    shown = "0, GPU-aa11, NVIDIA L4, 23034, 570.1\n1, GPU-bb22, NVIDIA A10G, 24576, 570.1\n"
    found = machine.parse_gpus(shown, visible)
    assert [gpu["name"] for gpu in found] == names
    if names == ["NVIDIA A10G"]:
        assert found == [{"name": "NVIDIA A10G", "memory_gib": 24.0, "driver": "570.1"}]


def test_fingerprint_is_json_and_stable() -> None:
    machine.gpus()
    machine.fingerprint.cache_clear()
    first = machine.fingerprint()
    machine.fingerprint.cache_clear()
    assert machine.fingerprint() == first == json.loads(json.dumps(first))
    assert set(first) == {"cpu", "cores", "isa", "memory_gib", "gpus", "os", "python"}


@pytest.mark.parametrize(
    ("isa", "native"), [(["avx2", "avx512_bf16"], True), (["amx_bf16"], True), (["avx512f"], False)]
)
def test_native_bf16_follows_the_isa(monkeypatch: pytest.MonkeyPatch, isa: list[str], native: bool) -> None:
    monkeypatch.setattr(machine, "fingerprint", lambda: {"isa": isa})
    assert machine.has_native_bf16() is native


def test_threads_can_be_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENNYWEIGHT_THREADS", raising=False)
    assert machine.threads() == machine.usable_cores()
    monkeypatch.setenv("PENNYWEIGHT_THREADS", "7")
    assert machine.threads() == 7
    for wrong in ("0", "-2", "two"):
        monkeypatch.setenv("PENNYWEIGHT_THREADS", wrong)
        with pytest.raises(UsageError, match="PENNYWEIGHT_THREADS"):
            machine.threads()


@pytest.mark.parametrize(
    ("asked", "gpus", "device"),
    [("auto", [], "cpu"), ("auto", [{"name": "L4"}], "cuda"), ("cpu", [{"name": "L4"}], "cpu"), ("cuda", [], "cuda")],
)
def test_resolve_device(monkeypatch: pytest.MonkeyPatch, asked: str, gpus: list, device: str) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    assert machine.resolve_device(asked) == device


def alone(code: str) -> Any:
    """What a process of its own prints: memory that other tests freed would serve what is asked for here, and hide
    it."""
    return json.loads(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout)


SAMPLED = """
import json, time
from pennyweight.memory import PeakMemory
with PeakMemory(interval=0.01) as memory:
    block = b"x" * (200 << 20)
    time.sleep(0.1)
    del block
print(json.dumps([memory.peak_bytes - memory.start_bytes, memory.end_bytes - memory.start_bytes]))
"""


def test_peak_memory_sees_a_passing_allocation() -> None:
    peak, end = alone(SAMPLED)
    assert 190 << 20 < peak < 220 << 20
    assert end < 20 << 20


UNSAMPLED = """
import json
from pennyweight.memory import PeakMemory
with PeakMemory(interval=60) as whole:
    block = b"x" * (200 << 20)
    del block
    with PeakMemory(interval=60) as part:
        block = b"x" * (100 << 20)
        del block
    with PeakMemory(interval=60) as calm:
        pass
print(json.dumps([memory.peak_bytes - memory.start_bytes for memory in (whole, part, calm)]))
"""


@pytest.mark.skipif(not memory._reset_mark(), reason="no kernel that keeps a peak")
def test_peaks_are_seen_where_no_sample_is_taken() -> None:
    whole, part, calm = alone(UNSAMPLED)
    assert 190 << 20 < whole < 220 << 20
    assert 90 << 20 < part < 120 << 20
    assert calm < 20 << 20


KEPT = """
import json
from contextlib import nullcontext
import numpy as np
import psutil
from pennyweight.memory import release_memory, reused_memory
resident = lambda: psutil.Process().memory_info().rss
start, left = resident(), []
for kept in (True, False):
    with reused_memory() if kept else nullcontext():
        array = np.ones(100 << 20, np.uint8)
        del array
        left.append(resident() - start)
    release_memory()
    left.append(resident() - start)
print(json.dumps(left))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library decides for itself")
def test_freed_memory_is_kept_while_it_is_asked_for_again() -> None:
    reused, released, usual, at_last = alone(KEPT)
    assert reused > 90 << 20
    assert max(released, usual, at_last) < 50 << 20


def test_measured_speed_is_plausible() -> None:
    measured = speed.measure(seconds=0.15)
    assert measured.threads == machine.threads()
    assert 0.5 < measured.read_gb_per_s < 5000
    assert 1 < measured.gflops_fp32 < 1e5
    assert 0.1 < measured.gflops_bf16 < 1e6


def test_ceilings_are_plausible_and_reach_into_the_caches() -> None:
    found = speed.ceilings(seconds=0.2)
    assert tuple(found.reads) == speed.READ_SIZES["cpu"]
    assert found.read_gb_per_s == found.reads[256 << 20]
    assert all(0 < gb_per_s < 50_000 for gb_per_s in found.reads.values())
    assert found.gops_int8 is None or 0.1 < found.gops_int8 < 1e7


def test_the_faster_of_two_measurements() -> None:
    one = Measured(threads=2, read_gb_per_s=10, gflops_fp32=90, gflops_bf16=200, gops_int8=None, reads={1: 50, 2: 10})
    other = Measured(threads=2, read_gb_per_s=12, gflops_fp32=80, gflops_bf16=210, gops_int8=400, reads={1: 40, 2: 12})
    assert speed.fastest(one, other) == Measured(
        threads=2, read_gb_per_s=12, gflops_fp32=90, gflops_bf16=210, gops_int8=400, reads={1: 50, 2: 12}
    )
    assert speed.fastest(one, one) == one
    old = '{"threads": 2, "read_gb_per_s": 10, "gflops_fp32": 90, "gflops_bf16": 200}'
    assert Measured.model_validate_json(old).gops_int8 is None
    assert Measured.model_validate_json(one.model_dump_json()) == one


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes"),
            "4096 bytes more",
        ),
        (RuntimeError("CUDA: not enough memory; Tried to allocate 2.50 GiB"), "2.50 GiB more"),
        (MemoryError(), "ran out of memory; 3.0 GiB of the machine's are free"),
    ],
)
def test_running_out_of_memory_says_what_was_asked_for_and_what_to_do(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 3 << 30)
    with pytest.raises(StageError) as raised, out_of_memory_of("recover", "lower `batch`"):
        raise error
    assert says in raised.value.message
    assert raised.value.hint == "lower `batch`"


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_of("recover", ""):
        raise RuntimeError("shapes do not match")
