"""What is allocated: units of layers that are rounded alike, the grids that they may get, and the bytes of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pennyweight.quantization import decoder
from pennyweight.quantization.grid import Grid

if TYPE_CHECKING:
    import torch

#: A unit's choice: a grid, or None where its layers stay as they are.
Choice = Grid | None


@dataclass(frozen=True)
class Unit:
    """Layers that read one input, such as q, k and v, and so share one choice: runtimes can then merge them."""

    names: tuple[str, ...]
    block: int | None
    """Number of its decoder block; None for the embedding and the head."""
    kind: str
    """What it is called in every block: `self_attn.q_proj`."""
    choices: tuple[Choice, ...]
    bytes: tuple[int, ...]
    """What each choice stores."""


def alike(model: Any, names: list[str], window: torch.Tensor) -> list[tuple[str, ...]]:
    """The layers of `names` in groups that read one tensor, in the order that they are called in.

    `window` is token ids, (1, tokens).
    """
    import torch

    readers: dict[int, list[str]] = {}
    held: list[Any] = []  # so that no tensor's identity is used twice

    def note(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Any, ...]) -> None:
            held.append(inputs[0])
            readers.setdefault(id(inputs[0]), []).append(name)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        with torch.no_grad():
            model.base_model(window, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    groups = [tuple(dict.fromkeys(group)) for group in readers.values()]
    called = {name for group in groups for name in group}
    return groups + [(name,) for name in names if name not in called]


def place(model: Any, name: str) -> tuple[int | None, str]:
    """(number of the block that a layer is in, its name there); (None, its name) outside of the blocks."""
    stack, _ = decoder.blocks(model)
    if not name.startswith(f"{stack}."):
        return None, name
    number, _, kind = name.removeprefix(f"{stack}.").partition(".")
    return int(number), kind
