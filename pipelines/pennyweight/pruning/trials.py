"""What a decoder loses without some of its blocks: KL from the whole model on windows of text, many trials at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pennyweight.pruning.config import BATCH_TOKENS
from pennyweight.quantization import decoder
from pennyweight.quantization.walk import at_the_first_block

#: Positions whose logits exist at once.
CHUNK = 256

Removed = frozenset[int]


class Trials:
    """Measures removals on windows of text, batch by batch. What was measured is remembered."""

    def __init__(self, model: Any, windows: torch.Tensor, batch: int):
        """`windows` are token ids (windows, tokens), `batch` of them go through together; as many batches as are
        full."""
        self.model, self.blocks = model, decoder.blocks(model)[1]
        self._ids = [ids for ids in windows.split(batch) if len(ids) == min(batch, len(windows))]
        self._states, self._keywords = at_the_first_block(model, self.blocks, self._ids)
        self._expected = [Expected(self, index) for index in range(len(self._ids))]
        self._known: dict[tuple[Removed, int], torch.Tensor] = {}
        self._influence: list[float] = []
        self.passes = 0
        """Blocks that were run on a batch."""

    @property
    def batches(self) -> int:
        return len(self._ids)

    def influence(self) -> list[float]:
        """1 − the mean cosine of each block's inputs and outputs over all tokens (Men et al., 2024: ShortGPT)."""
        if self._influence:
            return self._influence
        sums = [0.0] * len(self.blocks)
        for batch in range(self.batches):
            state = self._states[batch]
            for index in range(len(self.blocks)):
                after = self._through(index, state)
                sums[index] += torch.cosine_similarity(state.float(), after.float(), dim=-1).mean().item()
                state = after
        self._influence = [1 - total / self.batches for total in sums]
        return self._influence

    def kl(self, removed: Iterable[int], batches: int | None = None) -> float:
        """Mean KL(whole ‖ without `removed`) in nats per token over the first `batches`, all by default."""
        return self.of([frozenset(removed)], self.batches if batches is None else batches)[0].mean().item()

    def now(self) -> float:
        """The same of the model as it is, once it was changed."""
        found = [expected.kl(self.whole(batch)) for batch, expected in enumerate(self._expected)]
        return torch.cat(found).mean().item()

    def of(self, trials: list[Removed], batches: int) -> list[torch.Tensor]:
        """The KL of each window of the first `batches`, nats per token, float32 (windows,), for each trial."""
        for batch in range(batches):
            self._measure([trial for trial in trials if (trial, batch) not in self._known], batch)
        return [torch.cat([self._known[trial, batch] for batch in range(batches)]) for trial in trials]

    def _measure(self, trials: list[Removed], batch: int) -> None:
        """Trials in the order in which each shares most of its first blocks with the one before, whose hidden states
        are kept: what two have in common is computed once."""
        path: list[int] = []
        states = [self._states[batch]]
        for trial in sorted(set(trials), key=self._kept):
            kept = self._kept(trial)
            common = next((at for at, (a, b) in enumerate(zip(path, kept)) if a != b), min(len(path), len(kept)))
            del path[common:], states[common + 1 :]
            for index in kept[common:]:
                states.append(self._through(index, states[-1]))
                path.append(index)
            self._known[trial, batch] = self._expected[batch].kl(self.finish(batch, states[-1]))

    def _kept(self, removed: Removed) -> list[int]:
        return [index for index in range(len(self.blocks)) if index not in removed]

    @torch.no_grad()
    def _through(self, index: int, state: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        found = self.blocks[index](state, **self._keywords[index])
        return found[0] if isinstance(found, tuple) else found

    def whole(self, batch: int) -> torch.Tensor:
        """What the head of the model is applied to, as it is, (windows, tokens, width)."""
        with torch.no_grad():
            return self.model.base_model(self._ids[batch], use_cache=False).last_hidden_state

    @torch.no_grad()
    def finish(self, batch: int, state: torch.Tensor) -> torch.Tensor:
        """What the head is applied to where `state` is what the blocks hand on. The model itself does what comes after
        its blocks."""
        with _handing_on(self.blocks, state):
            return self.model.base_model(self._ids[batch], use_cache=False).last_hidden_state


class Expected:
    """What the whole model predicts of one batch. Its probabilities are kept: many trials are compared with them.

    A loss to train by, as in `healing.loss`, has one comparison for each batch and gives a gradient. It computes the
    teacher's logits every time, which would double the head's work here.
    """

    def __init__(self, trials: Trials, batch: int):
        self._head = trials.model.get_output_embeddings()
        self._cap = getattr(trials.model.config.get_text_config(), "final_logit_softcapping", None)
        states = trials.whole(batch)
        self._windows = len(states)
        stored = trials.model.dtype  # all trials are compared with the same, so what it rounds off cancels
        self._probabilities = torch.cat([torch.softmax(logits, -1).to(stored) for _, logits in self._logits(states)])
        self._mass = self._probabilities.sum(-1, dtype=torch.float32)
        self._best = self._cross_entropy(states)

    def kl(self, states: torch.Tensor) -> torch.Tensor:
        """Mean KL of each window, float32 (windows,), of what the head is applied to, (windows, tokens, width)."""
        return (self._cross_entropy(states) - self._best).view(self._windows, -1).mean(1).cpu()

    def _cross_entropy(self, states: torch.Tensor) -> torch.Tensor:
        """−Σ p ln q of each token, (tokens,), with ln q = z − ln Σ exp z for logits z."""
        return torch.cat(
            [
                self._mass[span] * torch.logsumexp(logits, -1) - (self._probabilities[span] * logits).sum(-1)
                for span, logits in self._logits(states)
            ]
        )

    @torch.no_grad()
    def _logits(self, states: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """(which positions, their logits in float32), some at a time."""
        flat = states.flatten(0, 1)
        for at in range(0, len(flat), CHUNK):
            span = slice(at, at + CHUNK)
            logits = self._head(flat[span]).float()
            yield span, logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap


@contextmanager
def _handing_on(blocks: Any, state: torch.Tensor) -> Iterator[None]:
    kept = [block.forward for block in blocks]
    try:
        for block in blocks:
            block.forward = lambda *_, **__: state
        yield
    finally:
        for block, forward in zip(blocks, kept):
            block.forward = forward


def batch_of(windows: torch.Tensor) -> int:
    """How many windows (windows, tokens) go through together."""
    return max(1, min(len(windows), BATCH_TOKENS // windows.shape[1]))
