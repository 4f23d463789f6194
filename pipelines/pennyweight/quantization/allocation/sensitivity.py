"""What rounding a unit costs in divergence, predicted from one backward pass.

A layer y = W x whose weights change by ΔW moves its output by ΔW x. For small changes the divergence of what the model
then predicts is half a quadratic form in them, whose matrix is Fisher's: KL ≈ ½ E[(g·ΔW x)²], with g the gradient at y
of the log-likelihood of tokens that the model itself draws (Kunstner, Hennig and Balles, NeurIPS 2019, on why its own).
Each position's term is computed as it stands, without factoring the expectation into those of g and x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pennyweight.quantization.allocation.units import Choice, Unit

if TYPE_CHECKING:
    import torch

#: Tokens that go through the model together; activations of all its layers are kept for the way back.
BATCH_TOKENS = 1024
#: Positions whose logits exist at once.
CHUNK = 256

Rounder = Callable[[str, Choice], "torch.Tensor"]


def predict(model: Any, units: Sequence[Unit], windows: torch.Tensor, rounder: Rounder, seed: int) -> list[list[float]]:
    """Predicted KL in nats per token of rounding each unit alone, for each of its choices.

    `windows` are token ids (windows, tokens). `rounder` gives what a choice leaves of a layer's weight. `seed` draws
    the tokens.
    """
    import torch

    generator = torch.Generator(windows.device).manual_seed(seed)
    totals = [[0.0] * len(unit.choices) for unit in units]
    with _observed(model, units, rounder, totals):
        for ids in windows.split(max(1, BATCH_TOKENS // windows.shape[1])):
            states = model.base_model(ids, use_cache=False).last_hidden_state
            states.backward(_gradient(model, states.detach(), generator))
    return [[total / (2 * windows.numel()) for total in unit] for unit in totals]


def _gradient(model: Any, states: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gradient at the last hidden states of the log-likelihood of tokens drawn from what they predict."""
    import torch

    head = model.get_output_embeddings()
    parts = []
    for part in states.flatten(0, 1).split(CHUNK):
        probabilities = torch.softmax(head(part).float(), -1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        at_logits = -probabilities
        at_logits.scatter_add_(1, drawn, torch.ones_like(at_logits[:, :1]))
        parts.append(at_logits.to(part.dtype) @ head.weight)
    return torch.cat(parts).view_as(states)


@contextmanager
def _observed(model: Any, units: Sequence[Unit], rounder: Rounder, totals: list[list[float]]) -> Iterator[None]:
    """Add Σ (g·ΔW x)² to `totals` for every unit and choice whenever gradients pass through its layers."""
    handles = [model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())]
    for unit, total in zip(units, totals):
        if unit.block is not None:
            for name in unit.names:
                hook = _watch(name, unit.choices, total, rounder)
                handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(name: str, choices: Sequence[Choice], total: list[float], rounder: Rounder) -> Callable[..., None]:
    import torch

    def hook(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        seen = inputs[0].detach().flatten(0, -2)

        def add(gradient: torch.Tensor) -> None:
            back = gradient.flatten(0, -2).float()
            for at, choice in enumerate(choices):
                if choice is not None:
                    change = rounder(name, choice) - module.weight.data
                    moved = (seen @ change.T).float()
                    total[at] += torch.linalg.vecdot(moved, back).square().sum().item()

        output.register_hook(add)

    return hook
