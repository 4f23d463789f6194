"""Levers of an engine: what is compared with what, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from pennyweight import checkpoints, runtimes
from pennyweight.benchmark import levers
from pennyweight.recipe import Benchmark
from pennyweight.records import Candidate, LeverReport
from pennyweight.runtimes import Generation

PROMPTS = np.arange(3 * 40).reshape(3, 40)
#: Seconds of a wave with a lever on; without, a second.
SECONDS = {"prefix_caching": 0.8, "small_cache": 1.0, "small_steps": 1.1}


class Session:
    seen: ClassVar[list[tuple[str, np.ndarray]]] = []

    def __init__(self, lever: str = "off") -> None:
        self._lever, self._waves = lever, 0

    def generate(self, ids: np.ndarray, new_tokens: int, stop: bool = False) -> Generation:
        Session.seen.append((self._lever, ids))
        self._waves += 1
        seconds = SECONDS.get(self._lever, 1.0) * (1 + 0.001 * (self._waves % 3) * (self._lever != "off"))
        return Generation(seconds / 2, [seconds / 2 / (new_tokens - 1)] * (new_tokens - 1), np.zeros((1, 1), np.int64))

    def close(self) -> None:
        pass


def fails(candidate: Candidate, device: str, draft: Candidate | None) -> Session:
    raise RuntimeError("no such kernel")


def tried(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, **workload: int) -> dict[str, LeverReport]:
    Session.seen = []
    real = runtimes.get("transformers")
    known = {name: (lambda candidate, device, draft, name=name: Session(name)) for name in SECONDS}
    known["prompt_lookup"] = fails
    kind = runtimes.RuntimeKind(
        **{**vars(real), "load": lambda candidate, device: Session(), "levers": known}
    )  # fmt: skip
    monkeypatch.setattr(runtimes, "get", lambda name: kind)
    settings = Benchmark.model_validate(
        {
            "workload": {"input_tokens": 40, "output_tokens": 4, **workload}, "concurrency": [2], "decide_at": 2,
            "decide_rounds": 4, "price": {"name": "mine", "usd_per_hour": 1.0}, "draft": "small",
            "levers": [*SECONDS, "prompt_lookup", "draft"],
        }
    )  # fmt: skip
    checkpoint = checkpoints.describe(tiny_model, "here")
    candidate = Candidate(
        id="a@transformers", variant="a", runtime="transformers", checkpoint=checkpoint, path="", digest="", bytes=1,
        weight_bytes=1, dtype="float32",
    )  # fmt: skip
    found = levers.measure(candidate, settings, PROMPTS, "cpu", lambda detail, done: None)
    return {report.lever: report for report in found}


def test_what_surely_saves_is_kept(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tried(tiny_model, monkeypatch)
    assert found["prefix_caching"].kept
    assert found["prefix_caching"].saving.value == pytest.approx(0.2, abs=0.002)
    assert not found["small_cache"].kept
    assert not found["small_steps"].kept
    assert found["small_steps"].saving.high < 0


def test_what_cannot_be_tried_says_why(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tried(tiny_model, monkeypatch)
    assert (found["prompt_lookup"].kept, found["prompt_lookup"].reason) == (False, "RuntimeError: no such kernel")
    assert (found["draft"].saving, found["draft"].reason) == (None, "transformers does not have it")


def test_off_and_on_get_the_same_prompts_and_take_turns(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried(tiny_model, monkeypatch, shared_prefix=16)
    turns = [(name, ids) for name, ids in Session.seen][:10]
    assert [name == "off" for name, _ in turns] == [True, False, True, False, False, True, False, True, True, False]
    for first, second in zip(turns[::2], turns[1::2]):
        assert np.array_equal(first[1], second[1])
    rounds = [ids for _, ids in turns[::2]]
    for number, ids in enumerate(rounds):
        assert ids.shape == (2, 40)
        assert np.array_equal(ids[:, :16], PROMPTS[:2, :16])
        assert sorted(ids[0, 16:]) == sorted(PROMPTS[0, 16:])
        assert not any(np.array_equal(ids, other) for other in rounds[:number])
