"""Energy, where the machine counts it: RAPL's package domains of the CPU, NVML's total of the GPU in use.

Counters are of the whole machine: what others do on it meanwhile counts too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """Joules since some moment. It starts again at 0 after `wraps_at`; None: never."""

    name: str
    read: Callable[[], float]
    wraps_at: float | None = None

    def between(self, before: float, after: float) -> float:
        """Joules from one reading to a later one, at most one wrap apart."""
        if after < before and self.wraps_at is not None:
            return self.wraps_at - before + after
        return after - before


class EnergyMeter:
    """Joules that the counters of a machine count while a block runs; None where it has none.

    >>> meter = EnergyMeter(rapl_counters())
    >>> with meter:
    ...     work()
    >>> meter.joules
    """

    def __init__(self, counters: list[Counter]):
        self.counters = counters
        self.joules: float | None = None
        self._before: list[float] = []

    def __enter__(self) -> EnergyMeter:
        self.joules, self._before = None, [counter.read() for counter in self.counters]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.counters:
            after = [counter.read() for counter in self.counters]
            self.joules = sum(c.between(*pair) for c, *pair in zip(self.counters, self._before, after))


def counters(device: str) -> list[Counter]:
    """All counters that can be read here: the CPU's packages, and on `cuda` the GPU in use."""
    return [*rapl_counters(), *(nvml_counters() if device == "cuda" else [])]


def rapl_counters(root: Path = POWERCAP) -> list[Counter]:
    """One counter for each CPU package that Linux' powercap shows below `root` and lets this user read.

    `energy_uj` counts microjoules up to `max_energy_range_uj` and starts again
    (https://docs.kernel.org/power/powercap/powercap.html). A package's cores are counted in it; memory, where it has a
    domain of its own, is not. What the kernel shows a second time, under `intel-rapl-mmio`, is left out.
    """
    found = []
    for folder in sorted(root.glob("intel-rapl:*")):
        try:
            name = (folder / "name").read_text().strip()
            wraps_at = int((folder / "max_energy_range_uj").read_text())
            (folder / "energy_uj").read_text()
        except (OSError, ValueError):
            continue
        if name.startswith("package"):
            found.append(Counter(name, lambda path=folder / "energy_uj": int(path.read_text()) / 1e6, wraps_at / 1e6))
    return found


def nvml_counters(nvml: Any = None, uuid: str | None = None) -> list[Counter]:
    """The counter of the GPU that CUDA uses, or of the one with that `uuid`; none without NVML, or before Volta.

    `nvmlDeviceGetTotalEnergyConsumption` gives millijoules since the driver was loaded (NVML API reference).
    """
    try:
        if nvml is None:
            import pynvml as nvml
        if uuid is None:
            import torch

            uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    except (ImportError, RuntimeError, AssertionError):
        return []
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        name = nvml.nvmlDeviceGetName(handle)
    except nvml.NVMLError:
        return []
    return [Counter(name, lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)]
