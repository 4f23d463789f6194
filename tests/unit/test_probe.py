"""What is kept of the winner, and where it can be asked again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bigrams
import numpy as np
import pytest

from pennyweight import installed, machine, probe, runtimes, stages
from pennyweight.errors import StageError
from pennyweight.evaluate.divergence import likelihoods
from pennyweight.evaluate.evidence import Evidence, ScoredText
from pennyweight.records import Candidate, Checkpoint
from pennyweight.stages import Texts
from pennyweight.stages.run import Stage
from pennyweight.store import Store

ENGINE = {"runtime": "onnxruntime", "device": "cpu"}


@pytest.fixture
def candidate(tmp_path: Path) -> Candidate:
    (tmp_path / "model.onnx").write_bytes(b"weights")
    checkpoint = Checkpoint(
        path=str(tmp_path), digest="c" * 64, bytes=7, weight_bytes=7, format="safetensors", dtype="float32",
        parameters=7, origin="test",
    )  # fmt: skip
    return Candidate(
        id="int8@onnxruntime", variant="int8", runtime="onnxruntime", checkpoint=checkpoint, path=str(tmp_path),
        digest="d" * 64, bytes=7, weight_bytes=7, dtype="float32",
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """As much of a run as a stage needs; `began` are the stages that began."""
    began: list[str] = []

    @contextmanager
    def stage(name: str, subject: str) -> Iterator[Stage]:
        began.append(f"{name} {subject}")
        yield Stage()

    return SimpleNamespace(store=Store(tmp_path / "store"), device="cpu", stage=stage, began=began)


def test_what_was_judged_is_kept_and_no_more_of_it_than_is_asked_again() -> None:
    windows, nll = np.arange(3 * 300).reshape(3, 300), np.full((3, 299), 0.25, np.float32)
    kept = probe.take("news", windows, nll, ENGINE, 0.02)
    assert np.array(kept.windows).shape == (2, 256)
    assert kept.windows[1][:3] == [300, 301, 302]
    assert np.array(kept.log_probs).shape == (2, 255)
    assert set(np.ravel(kept.log_probs)) == {-0.25}
    short = probe.take("news", windows[:1, :8], nll[:1, :7], ENGINE, 0.02)
    assert (len(short.windows), len(short.log_probs[0])) == (1, 7)


def test_a_suite_with_text_needs_no_other_look_at_the_winner(run: Any, candidate: Candidate) -> None:
    windows = np.ones((4, 16), np.int64)
    judged = ScoredText(np.full((4, 15), 2.0, np.float32), np.zeros((4, 15)), np.zeros((4, 16), np.int32))
    kept = stages.probe(run, candidate, {"divergence": windows}, Evidence({"divergence": judged}), Texts({}, {}))
    assert (kept.text, kept.tolerance, kept.log_probs[0][0]) == ("divergence", stages.PARITY_TOLERANCE, -2.0)
    assert kept.engine == runtimes.key("onnxruntime", "cpu")
    assert run.began == []


def test_a_suite_without_text_is_helped_out_with_another(
    run: Any, candidate: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bigrams.install(monkeypatch)
    np.save(tmp_path / "windows.npy", bigrams.WINDOWS)
    texts = Texts({"parity": tmp_path}, {"parity": "e" * 64})
    kept = stages.probe(run, candidate, {}, Evidence(), texts)
    expected = likelihoods(bigrams.Bigrams(candidate, "cpu"), bigrams.WINDOWS[:2, :256], 2)
    assert np.allclose(kept.log_probs, -expected, atol=1e-6)
    assert probe.try_out(candidate, kept).divergence < 1e-10
    assert stages.probe(run, candidate, {}, Evidence(), texts) == kept
    assert run.began == ["probe int8@onnxruntime"] * 2
    with pytest.raises(StageError, match="no text to ask the winner about"):
        stages.probe(run, candidate, {}, Evidence(), Texts({}, {}))


def test_where_a_candidate_cannot_be_asked(candidate: Candidate, monkeypatch: pytest.MonkeyPatch) -> None:
    probe.check_available(candidate, "cpu")
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    on_gpu = candidate.model_copy(update={"runtime": "transformers"})
    with pytest.raises(probe.UnavailableError, match="it was judged on a GPU, and this machine has none"):
        probe.check_available(on_gpu, "cuda")
    monkeypatch.setattr(installed, "missing_packages", lambda runtime, device: ["openvino-genai"])
    with pytest.raises(probe.UnavailableError, match="openvino is not installed, it needs openvino-genai") as caught:
        probe.check_available(candidate.model_copy(update={"runtime": "openvino"}), "cpu")
    assert (caught.value.hint, caught.value.exit_code) == ("pip install 'pennyweight[cpu]'", 2)
