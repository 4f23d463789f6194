"""The parts of a decoder, whatever its architecture: blocks, linear layers, embedding and head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pennyweight import machine
from pennyweight.errors import StageError

if TYPE_CHECKING:
    import torch

    from pennyweight.records import Checkpoint


def load(checkpoint: Checkpoint, device: str) -> Any:
    """The model, in evaluation mode and without gradients, in the dtype that this machine computes it in."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=compute_dtype(checkpoint.dtype, device))
    return model.to(device).eval().requires_grad_(False)


def compute_dtype(stored: str, device: str) -> torch.dtype:
    """The dtype that a checkpoint is stored in, unless this CPU would only emulate it."""
    import torch

    native = device == "cuda" or (stored == "bfloat16" and machine.has_native_bf16())
    return getattr(torch, stored) if native else torch.float32


def blocks(model: Any) -> tuple[str, Any]:
    """(name, list) of the decoder's blocks: the heaviest list of modules. Raises StageError if there is none."""
    import torch

    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    if not lists:
        raise StageError(f"{type(model).__name__} has no list of decoder blocks, so it cannot be gone through by block")
    return max(lists, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))


def all_linears(module: Any) -> dict[str, Any]:
    """Linear layers by name."""
    import torch

    return {name: part for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)}


def linears(model: Any) -> dict[str, Any]:
    """Linear layers by name, without the head. Raises StageError if there are none."""
    head = model.get_output_embeddings()
    found = {name: part for name, part in all_linears(model).items() if part is not head}
    if not found:
        raise StageError(f"{type(model).__name__} has no linear layers to quantize")
    return found


def head_name(model: Any) -> str:
    return _name(model, model.get_output_embeddings())


def embedding_name(model: Any) -> str:
    return _name(model, model.get_input_embeddings())


def is_tied(model: Any) -> bool:
    """Whether the head computes with the embedding itself."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def untie(model: Any) -> None:
    """Give the head a weight of its own, so that rounding it leaves the embedding alone."""
    import torch

    head = model.get_output_embeddings()
    if is_tied(model):
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def tie(model: Any) -> None:
    """Undo `untie`."""
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.config.tie_word_embeddings = True


def _name(model: Any, wanted: Any) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
