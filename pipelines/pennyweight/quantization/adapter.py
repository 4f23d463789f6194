"""A LoRA adapter beside a checkpoint: y += x · downᵀ · upᵀ for each layer that has one (Hu et al., 2022).

It lies in the checkpoint's folder as PEFT lays adapters out, so PEFT and vLLM load it as one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.checkpoints import ADAPTER

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def write(folder: Path, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], rank: int) -> None:
    """Put an adapter into a checkpoint's folder. `pairs`: layer → down (rank, in), up (out, rank)."""
    from safetensors.torch import save_file

    target = folder / ADAPTER
    target.mkdir()
    tensors = {}
    for name, (down, up) in pairs.items():
        tensors[f"{_PREFIX}{name}{_DOWN}"] = down.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}{_UP}"] = up.detach().cpu().contiguous()
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # their quotient scales the product
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({name.rpartition(".")[2] for name in pairs}),
    }
    (target / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def read(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The adapter of a checkpoint: layer → down (rank, in), up (out, rank). Empty where it has none."""
    from safetensors.torch import load_file

    path = folder / ADAPTER / "adapter_model.safetensors"
    tensors = load_file(path) if path.is_file() else {}
    names = [name.removeprefix(_PREFIX).removesuffix(_DOWN) for name in tensors if name.endswith(_DOWN)]
    return {name: (tensors[f"{_PREFIX}{name}{_DOWN}"], tensors[f"{_PREFIX}{name}{_UP}"]) for name in names}


def attach(model: Any, folder: Path) -> None:
    """Let a loaded model compute with its checkpoint's adapter, if it has one."""
    for name, pair in read(folder).items():
        model.get_submodule(name).register_forward_hook(_Correction(*pair))


class _Correction:
    """A forward hook that adds x · downᵀ · upᵀ to what a layer gives, in the dtype and on the device of its input."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        self._down, self._up = down, up

    def __call__(self, _: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        given = inputs[0]
        self._down, self._up = self._down.to(given), self._up.to(given)
        return output + (given @ self._down.T) @ self._up.T
