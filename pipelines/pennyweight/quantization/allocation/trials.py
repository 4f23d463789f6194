"""Measuring an assignment: how far the model that it makes is from the base, on text that nothing was fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pennyweight.quantization import decoder
from pennyweight.quantization.allocation.units import Choice, Unit
from pennyweight.quantization.grid import find_scales, round_to_nearest

if TYPE_CHECKING:
    import torch

#: Positions whose logits exist at once.
CHUNK = 256


class Trials:
    """A model whose units are rounded and restored, and its divergence from the model as it came.

    What each block hands on is kept for the present assignment, so a change is measured from its first block on.
    """

    def __init__(
        self,
        model: Any,
        units: Sequence[Unit],
        windows: torch.Tensor,
        search: Literal["max", "mse"],
        dtype: torch.dtype,
    ):
        """`windows` are token ids (windows, tokens); scales are searched by `search` and stored in `dtype`."""
        self._model, self._units, self._windows = model, units, windows
        self._search, self._dtype = search, dtype
        self._blocks = list(decoder.blocks(model)[1])
        self._dense = {name: model.get_submodule(name).weight.data for unit in units for name in unit.names}
        self._scales: dict[tuple[str, Choice], tuple[torch.Tensor, torch.Tensor]] = {}
        self._handed_on: list[Any] = [None] * len(self._blocks)
        self.assignment: list[Choice] = [None] * len(units)
        self._probabilities, self._negative_entropy = self._base(self._run(0, keep=True))

    def assign(self, assignment: Sequence[Choice]) -> float:
        """Round all units as given, for good. Returns the mean KL(base ‖ model) in nats per token."""
        self._put({at: choice for at, choice in enumerate(assignment) if choice != self.assignment[at]})
        self.assignment = list(assignment)
        return self._divergence(self._run(0, keep=True))

    def measure(self, changes: Mapping[int, Choice]) -> float:
        """Mean KL in nats per token with some units, by number, rounded otherwise for once."""
        kept = {name: self._weight(name).data for at in changes for name in self._units[at].names}
        self._put(changes)
        try:
            return self._divergence(self._run(min(self._first(at) for at in changes), keep=False))
        finally:
            for name, weight in kept.items():
                self._weight(name).data = weight

    def restore(self) -> None:
        """Leave the model as it came."""
        self._put(dict.fromkeys(range(len(self._units))))

    def rounded(self, name: str, choice: Choice) -> torch.Tensor:
        """A layer's weight (out, in) as a choice leaves it."""
        weight = self._dense[name]
        if choice is None:
            return weight
        if (name, choice) not in self._scales:
            self._scales[name, choice] = find_scales(weight, choice, self._dtype, self._search)
        return round_to_nearest(weight, *self._scales[name, choice], choice).dequantize().to(weight.dtype)

    def _put(self, changes: Mapping[int, Choice]) -> None:
        for at, choice in changes.items():
            for name in self._units[at].names:
                self._weight(name).data = self.rounded(name, choice)

    def _weight(self, name: str) -> Any:
        return self._model.get_submodule(name).weight

    def _first(self, at: int) -> int:
        """Number of the first block that a unit's change reaches."""
        unit = self._units[at]
        if unit.block is not None:
            return unit.block
        return len(self._blocks) if decoder.head_name(self._model) in unit.names else 0

    def _run(self, first: int, keep: bool) -> torch.Tensor:
        """Last hidden states (tokens, width), computed from block `first` on."""
        import torch

        with torch.no_grad(), self._hooked(first, keep):
            return self._model.base_model(self._windows, use_cache=False).last_hidden_state.flatten(0, 1)

    @contextmanager
    def _hooked(self, first: int, keep: bool) -> Iterator[None]:
        def skip(handed_on: Any) -> Callable[..., Any]:
            return lambda *_, **__: handed_on

        def note(at: int) -> Callable[..., None]:
            def hook(_: Any, __: Any, output: Any) -> None:
                self._handed_on[at] = output

            return hook

        forwards = {at: self._blocks[at].forward for at in range(first)}
        handles = [block.register_forward_hook(note(at)) for at, block in enumerate(self._blocks) if keep]
        try:
            for at in forwards:
                self._blocks[at].forward = skip(self._handed_on[first - 1])
            yield
        finally:
            for at, forward in forwards.items():
                self._blocks[at].forward = forward
            for handle in handles:
                handle.remove()

    def _base(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The base's probabilities (tokens, vocabulary) and Σ p log p (tokens,), float32."""
        import torch

        head = self._model.get_output_embeddings()
        with torch.no_grad():
            logs = torch.cat([torch.log_softmax(head(part).float(), -1) for part in states.split(CHUNK)])
            probabilities = logs.exp()
            return probabilities, torch.linalg.vecdot(probabilities, logs)

    def _divergence(self, states: torch.Tensor) -> float:
        """Mean of Σ p log p − Σ p z + log Σ exp z, which is the KL for logits z."""
        import torch

        head, total = self._model.get_output_embeddings(), 0.0
        parts = zip(states.split(CHUNK), self._probabilities.split(CHUNK), self._negative_entropy.split(CHUNK))
        with torch.no_grad():
            for part, probabilities, negative_entropy in parts:
                logits = head(part).float()
                expected = torch.linalg.vecdot(probabilities, logits)
                total += (negative_entropy - expected + torch.logsumexp(logits, -1)).sum().item()
        return total / len(states)
