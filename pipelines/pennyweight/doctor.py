"""What this machine has and lacks, for a person who wonders why something does not work."""

from __future__ import annotations

import os
import sys
from typing import Any

from pennyweight import installed, machine, speed
from pennyweight.errors import StoreError
from pennyweight.store import Store


def doctor(store: Store | None = None, network: bool = False) -> dict[str, Any]:
    """What this machine has and lacks, as JSON. Asks the model hub only when `network` is true."""
    from pennyweight import tracking as tracking_package

    store = store or Store()
    tracking = os.environ.get("MLFLOW_TRACKING_URI")
    return {
        "machine": {**machine.fingerprint(), "threads": machine.threads(), "native_bf16": machine.has_native_bf16()},
        "measured": _ceilings() if installed.installed_version("torch") else None,
        "extras": installed.extras(),
        "conflicts": installed.conflicts(machine.has_gpu()),
        "runtimes": {name: runtime_report(name) for name in installed.RUNTIME_PACKAGES},
        "store": {
            "path": str(store.root),
            "writable": _writable(store),
            "free_disk_gb": round(machine.free_disk_bytes(store.root) / 1e9, 1),
        },
        "tracking": {"uri": tracking_package.redact(tracking) if tracking else "the embedded SQLite store"},
        "hub": _hub(network),
        "versions": machine.environment()["versions"],
        "executable": sys.executable,
    }


def _ceilings() -> dict[str, Any]:
    found = speed.ceilings()
    reads = {f"{size >> 20} MiB": gb_per_s for size, gb_per_s in found.reads.items()}
    return {**found.model_dump(mode="json", exclude={"reads"}), "read_gb_per_s_over_and_over": reads}


def runtime_report(runtime: str) -> dict[str, Any]:
    """What a runtime can do here, what is missing, and the command that gets it."""
    device = machine.resolve_device("auto")
    report: dict[str, Any] = {"installed": not installed.missing_packages(runtime), "can": [], "missing": []}
    if report["installed"]:
        report["can"] = _CAN[runtime]()
    else:
        report["missing"] = installed.missing_packages(runtime, device)
    runs_on_gpu = runtime != "openvino" and machine.has_gpu()
    if report["installed"] and runs_on_gpu and not any(line.startswith("cuda") for line in report["can"]):
        report["missing"] = installed.missing_packages(runtime, device) or ["a build for this machine's GPU and driver"]
    if report["missing"]:
        report["get"] = how_to_get(runtime, device)
    return report


def how_to_get(runtime: str, device: str) -> str:
    """The command that installs what a runtime needs on `device`."""
    if runtime == "transformers":
        return "install torch's CUDA build" if installed.installed_version("torch") else "pip install pennyweight"
    extra = "gpu" if device == "cuda" and runtime != "openvino" else "cpu"
    return f"pip install 'pennyweight[{extra}]'"


def _transformers_can() -> list[str]:
    import torch

    dtype = "bfloat16 in hardware" if machine.has_native_bf16() else "float32 (bfloat16 only emulated, and slow)"
    can = [f"cpu: {dtype}; quantized checkpoints are unpacked, so they judge quality and save nothing"]
    if torch.cuda.is_available():
        can.append(f"cuda: {torch.cuda.get_device_name(0)}")
    return can


def _onnxruntime_can() -> list[str]:
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    wide = {"avx512_vnni", "amx_int8", "asimddp"} & set(machine.fingerprint()["isa"])
    dots = "8-bit dot products in hardware" if wide else "without 8-bit dot products"
    can = [f"cpu: float32, and 4-bit and 8-bit weights ({dots})"] if "CPUExecutionProvider" in providers else []
    if "CUDAExecutionProvider" in providers and machine.has_gpu():
        can.append("cuda: float16, and 4-bit and 8-bit weights")
    return can


def _openvino_can() -> list[str]:
    dtype = "bfloat16" if machine.has_native_bf16() else "float32"
    return [f"cpu: {dtype}, and 4-bit and 8-bit weights; continuous batching, keys and values in 8 bits"]


_CAN = {"transformers": _transformers_can, "onnxruntime": _onnxruntime_can, "openvino": _openvino_can}


def _writable(store: Store) -> bool:
    try:
        store.check_writable()
    except StoreError:
        return False
    return True


def _hub(network: bool) -> dict[str, Any]:
    """The model hub's address, and whether it answers (None: not asked)."""
    from huggingface_hub import constants

    from pennyweight import tracking as tracking_package

    offline = bool(constants.HF_HUB_OFFLINE)
    reachable = _answers(constants.ENDPOINT) if network and not offline else None
    return {"endpoint": tracking_package.redact(constants.ENDPOINT), "offline": offline, "reachable": reachable}


def _answers(endpoint: str) -> bool:
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=5).close()
    except HTTPError:
        return True  # an answer, though not a page
    except (OSError, ValueError):
        return False
    return True
