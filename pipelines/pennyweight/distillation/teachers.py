"""Whom a student asks: the teacher itself, batch by batch, or what it said once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pennyweight.distillation.cache import Cached, last_states, select
from pennyweight.distillation.losses import Live, Target
from pennyweight.distillation.trunk import overheard
from pennyweight.quantization import decoder
from pennyweight.records import Checkpoint


@dataclass(frozen=True)
class LiveTeacher:
    """The teacher reads every batch. What it says to the held-out text is computed once."""

    model: Any
    windows: torch.Tensor
    """Held out."""
    shared: int = 0
    """Its first blocks that are the student's, too."""
    _held: dict[int, Live] = field(default_factory=dict)

    @property
    def head(self) -> torch.Tensor:
        return self.model.get_output_embeddings().weight

    def target(self, ids: torch.Tensor, numbers: list[int], chosen: torch.Tensor | None) -> Target:
        said = self._read(ids)
        return replace(said, states=select(said.states, chosen))

    def held_out(self, numbers: list[int], length: int, chosen: torch.Tensor | None) -> Target:
        for number in numbers:
            if number not in self._held:
                self._held[number] = self._read(self.windows[number : number + 1])
        said = [self._held[number] for number in numbers]
        states = torch.cat([each.states for each in said])
        trunks = [each.trunk for each in said if each.trunk is not None]
        return Live(select(states, chosen), self.head, torch.cat(trunks) if trunks else None)

    def _read(self, ids: torch.Tensor) -> Live:
        if not self.shared:
            return Live(last_states(self.model, ids), self.head)
        with overheard(decoder.blocks(self.model)[1][self.shared]) as heard:
            states = last_states(self.model, ids)
        return Live(states, self.head, heard[0])


@dataclass(frozen=True)
class CachedTeacher:
    cached: Cached
    head: torch.Tensor

    def target(self, ids: torch.Tensor, numbers: list[int], chosen: torch.Tensor | None) -> Target:
        return self.cached.target(numbers, chosen)

    def held_out(self, numbers: list[int], length: int, chosen: torch.Tensor | None) -> Target:
        states = self.cached.held_out.view(-1, length, self.head.shape[1])[numbers].flatten(0, 1)
        return Live(select(states.to(self.head.device), chosen), self.head)


def head_of(checkpoint: Checkpoint) -> torch.Tensor:
    """A checkpoint's output matrix (vocabulary, width), without the rest of the model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint.path))
    name = decoder.embedding_name(model) if decoder.is_tied(model) else decoder.head_name(model)
    return _read_tensor(Path(checkpoint.path), f"{name}.weight")


def _read_tensor(folder: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118
                return file.get_tensor(name)
    raise KeyError(name)
