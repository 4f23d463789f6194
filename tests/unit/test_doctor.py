"""What is installed, what is missing, and how to get it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pennyweight import doctor, installed, machine, speed
from pennyweight.plan.records import Measured
from pennyweight.store import Store


def pretend(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(installed, "installed_version", lambda name: "1.0" if name in names else None)


def test_both_onnxruntimes_are_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai")
    (message,) = installed.conflicts(gpu=False)
    assert "onnxruntime and onnxruntime-gpu" in message
    assert "pennyweight[cpu]" in message
    pretend(monkeypatch, "onnxruntime", "onnxruntime-genai")
    assert installed.conflicts(gpu=False) == []


def test_missing_packages_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "onnxruntime", "onnxruntime-genai", "onnx-ir", "torch")
    assert installed.missing_packages("onnxruntime", "cpu") == []
    assert installed.missing_packages("onnxruntime", "cuda") == ["onnxruntime-gpu", "onnxruntime-genai-cuda"]
    assert installed.missing_packages("transformers") == ["transformers"]
    pretend(monkeypatch, "onnxruntime-gpu", "onnxruntime-genai-cuda", "onnx-ir")
    assert installed.missing_packages("onnxruntime", "cpu") == []


def test_runtime_report_says_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", list)
    pretend(monkeypatch, "onnxruntime")
    assert doctor.runtime_report("onnxruntime") == {
        "installed": False,
        "can": [],
        "missing": ["onnxruntime-genai", "onnx-ir"],
        "get": "pip install 'pennyweight[cpu]'",
    }


def test_extras_name_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = [
        "click>=8",
        "onnxruntime>=1.31; extra == 'cpu'",
        "onnx-ir==1.1.0; extra == 'cpu'",
        "ruff>=1; extra == 'dev'",
    ]
    monkeypatch.setattr(installed.importlib.metadata, "requires", lambda _: requires)
    versions = {"onnxruntime": "1.30", "onnx-ir": "1.1.0", "ruff": "1.2"}
    monkeypatch.setattr(installed, "installed_version", versions.get)
    found = installed.extras()
    assert found["cpu"] == {"installed": False, "missing": ["onnxruntime>=1.31"]}
    assert found["dev"] == {"installed": True, "missing": []}


def test_doctor_is_json_and_asks_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        speed,
        "ceilings",
        lambda: Measured(
            threads=1, read_gb_per_s=1, gflops_fp32=2, gflops_bf16=3, gops_int8=4, reads={1 << 20: 9, 1 << 28: 1}
        ),
    )
    monkeypatch.setattr(doctor, "_answers", lambda _: pytest.fail("the hub was asked"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example")
    found = doctor.doctor(Store(tmp_path / "not" / "there"))
    text = json.dumps(found)
    speeds = ("read_gb_per_s", "gflops_fp32", "gflops_bf16", "gops_int8")
    assert [found["measured"][name] for name in speeds] == [1, 2, 3, 4]
    assert found["measured"]["read_gb_per_s_over_and_over"] == {"1 MiB": 9, "256 MiB": 1}
    assert "secret" not in text
    assert found["tracking"]["uri"] == "https://***@mlflow.example"
    assert found["hub"]["reachable"] is None
    assert found["store"]["writable"] is True
    assert set(found["runtimes"]) == {"transformers", "onnxruntime", "openvino"}
