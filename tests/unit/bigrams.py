"""A model whose every number is known: the next token hangs on the last one alone, by a table made of its file's bytes.

It stands in for a runtime where what is loaded matters and how does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pennyweight import probe, runtimes
from pennyweight.evaluate.divergence import likelihoods
from pennyweight.records import Candidate, Probe
from pennyweight.runtimes.waves import Waves
from pennyweight.store import file_digest

VOCABULARY = 40
WINDOWS = np.random.default_rng(7).integers(0, VOCABULARY, (3, 300))


class Bigrams(Waves):
    context = None

    def __init__(self, candidate: Candidate, device: str) -> None:
        super().__init__()
        seed = int(file_digest(Path(candidate.path) / "model.onnx")[:8], 16)
        self.table = np.random.default_rng(seed).normal(0, 2, (VOCABULARY, VOCABULARY)).astype(np.float32)

    def logits(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.table[ids])

    def columns(self, ids: np.ndarray, new_tokens: int, stop: bool) -> Iterator[np.ndarray]:
        token = ids[:, -1]
        for _ in range(new_tokens):
            token = self.table[token].argmax(1)
            yield token

    def ends(self) -> list[int]:
        return []

    def close(self) -> None:
        pass


def install(patch: pytest.MonkeyPatch, load: type[Bigrams] = Bigrams) -> None:
    """Every runtime is this one."""
    patch.setattr(runtimes, "get", lambda name: SimpleNamespace(load=load, version=1, libraries=()))


def probe_of(candidate: Candidate) -> Probe:
    """What it says, as a run would keep it."""
    nll = likelihoods(Bigrams(candidate, "cpu"), WINDOWS, len(WINDOWS))
    return probe.take("text", WINDOWS, nll, runtimes.key(candidate.runtime, "cpu"), tolerance=0.02)
