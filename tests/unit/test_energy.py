"""Energy counters, from folders and libraries of machines that this one is not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pennyweight.benchmark.energy import Counter, EnergyMeter, nvml_counters, rapl_counters


def domain(root: Path, folder: str, name: str, energy: int, largest: int = 262_143_328_850) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    for file, value in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", largest)):
        (path / file).write_text(f"{value}\n")
    return path / "energy_uj"


def test_packages_alone_are_counted(tmp_path: Path) -> None:
    first = domain(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    second = domain(tmp_path, "intel-rapl:1", "package-1", 5_000_000)
    domain(tmp_path, "intel-rapl:0:0", "core", 400_000)
    domain(tmp_path, "intel-rapl:2", "psys", 9_000_000)
    domain(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000)
    (tmp_path / "intel-rapl").mkdir()
    counters = rapl_counters(tmp_path)
    assert [counter.name for counter in counters] == ["package-0", "package-1"]
    meter = EnergyMeter(counters)
    with meter:
        first.write_text("3500000\n")
        second.write_text("5250000\n")
    assert meter.joules == pytest.approx(2.5 + 0.25)


def test_a_counter_that_starts_again(tmp_path: Path) -> None:
    counter = domain(tmp_path, "intel-rapl:0", "package-0", 262_143_000_000)
    meter = EnergyMeter(rapl_counters(tmp_path))
    with meter:
        counter.write_text("671150\n")
    assert meter.joules == pytest.approx(0.328850 + 0.671150)
    assert Counter("endless", lambda: 0.0).between(2.0, 5.0) == 3.0


def test_no_counter_gives_no_energy(tmp_path: Path) -> None:
    unreadable = domain(tmp_path, "intel-rapl:0", "package-0", 1)
    unreadable.unlink()
    unreadable.mkdir()  # root may read every file, but not a folder
    assert rapl_counters(tmp_path) == rapl_counters(tmp_path / "absent") == []
    meter = EnergyMeter([])
    with meter:
        pass
    assert meter.joules is None


def test_a_file_that_may_not_be_read_is_no_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = domain(tmp_path, "intel-rapl:0", "package-0", 1)
    read = Path.read_text

    def guarded(path: Path, *args: Any, **kwargs: Any) -> str:
        if path == denied:
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", guarded)
    assert rapl_counters(tmp_path) == []


class Nvml(SimpleNamespace):
    """NVML of one GPU that has used 7 J since its driver was loaded, and uses 1.5 J between two readings."""

    class NVMLError(Exception):
        pass

    used = 7000

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "GPU-aa11":
            raise self.NVMLError("not found")
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        assert handle == "handle"
        self.used += 1500
        return self.used

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        return "NVIDIA L4"


def test_a_gpu_counts_in_millijoules() -> None:
    meter = EnergyMeter(nvml_counters(Nvml(), "GPU-aa11"))
    with meter:
        pass
    assert [counter.name for counter in meter.counters] == ["NVIDIA L4"]
    assert meter.joules == pytest.approx(1.5)
    assert nvml_counters(Nvml(), "GPU-bb22") == []
