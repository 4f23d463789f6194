"""`recover`: heal a quantized checkpoint by training what is not an integer against its own base.

The integers stay as they are. Group scales and norm weights learn to predict what the base predicts (Hinton et al.,
2015; for quantized weights: Chen et al., EfficientQAT, 2024), so the result has exactly the same size and format.
"""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.checkpoints import read_tensors
from pennyweight.errors import StageError
from pennyweight.recipe import Recover
from pennyweight.records import Checkpoint, Healing
from pennyweight.runtimes.gptq_layout import QuantizedLinear, read_quantized

if TYPE_CHECKING:
    import torch

    from pennyweight.steps import StepContext

#: Positions whose logits exist at once, of teacher and student: the loss's memory does not grow with the batch.
CHUNK = 256


def run(checkpoint: Checkpoint, step: Recover, context: StepContext, files: Path) -> Healing:
    """Write the healed checkpoint to `files`. Raises StageError if nothing is quantized or the loss is not finite."""
    import torch

    if context.calibration is None or context.base is None:
        raise StageError("recover needs text and the base")
    layers = read_quantized(Path(checkpoint.path))
    if not layers:
        raise StageError("recover heals quantized checkpoints, and nothing in this one is quantized")
    torch.manual_seed(context.seed)
    teacher = _load(context.base.path, context.device)
    student = _student(checkpoint, layers, teacher, context.device)
    trained = _trainables(student, step)
    windows = torch.from_numpy(context.calibration).to(context.device)
    held_out, text = windows[: step.held_out], windows[step.held_out :]
    healing = _train(student, teacher, trained, text, held_out, step, context)
    _write(checkpoint, student, layers, files)
    return healing


def _load(path: str, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device)
    return model.eval().requires_grad_(False)


def _student(checkpoint: Checkpoint, layers: dict[str, QuantizedLinear], teacher: Any, device: str) -> Any:
    """The base's architecture with the checkpoint's weights, its quantized layers as integers and scales."""
    import copy

    student = copy.deepcopy(teacher)
    stored = read_tensors(Path(checkpoint.path))
    for name, value in {**dict(student.named_parameters()), **dict(student.named_buffers())}.items():
        if name in stored:
            value.data.copy_(stored[name])
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        bias = stored.get(f"{name}.bias")
        setattr(student.get_submodule(parent), child, _scaled_linear(layer, bias).to(device))
    return student


def _scaled_linear(layer: QuantizedLinear, bias: torch.Tensor | None) -> Any:
    import torch

    class ScaledLinear(torch.nn.Module):
        """y = x · (scale ∘ integers)ᵀ + bias. `change` multiplies the stored scales: exp(0) = 1 at the start."""

        def __init__(self) -> None:
            super().__init__()
            groups = layer.scales.shape[1]
            centred = layer.integers.to(torch.int16) - layer.zeros.to(torch.int16).repeat_interleave(
                layer.group_size, dim=1
            )
            self.register_buffer("integers", centred.to(torch.bfloat16).view(layer.integers.shape[0], groups, -1))
            self.register_buffer("scales", layer.scales.float())
            self.change = torch.nn.Parameter(torch.zeros_like(layer.scales, dtype=torch.float32))
            self.bias = None if bias is None else torch.nn.Parameter(bias.clone(), requires_grad=False)

        def healed_scales(self) -> torch.Tensor:
            return self.scales * self.change.exp()

        @property
        def weight(self) -> torch.Tensor:
            scaled = self.integers * self.healed_scales().to(torch.bfloat16).unsqueeze(-1)
            return scaled.flatten(1)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(inputs, self.weight, self.bias)

    return ScaledLinear()


def _trainables(student: Any, step: Recover) -> list[torch.nn.Parameter]:
    """What learns. Norms get a float32 copy to learn in, since bfloat16 swallows small steps."""
    head = student.get_output_embeddings()
    found = []
    for module in student.modules():
        if hasattr(module, "change"):
            module.change.requires_grad_("scales" in step.train and module is not head)
            found += [module.change] if module.change.requires_grad else []
        elif "norms" in step.train and type(module).__name__.lower().endswith("norm"):
            module.float()
            for parameter in module.parameters():
                found.append(parameter.requires_grad_(True))
    return found


def _train(
    student: Any,
    teacher: Any,
    trained: list[torch.nn.Parameter],
    text: torch.Tensor,
    held_out: torch.Tensor,
    step: Recover,
    context: StepContext,
) -> Healing:
    """AdamW with a warm-up and a cosine; the state with the smallest held-out divergence is kept."""
    import torch

    optimizer = torch.optim.AdamW(trained, lr=step.learning_rate, weight_decay=0.0, betas=(0.9, 0.95))
    begin = time.monotonic()
    before = best = _held_out_kl(student, teacher, held_out, step.batch)
    kept = [parameter.detach().clone() for parameter in trained]
    curve = [(0, before)]
    for number in range(step.steps):
        for group in optimizer.param_groups:
            group["lr"] = step.learning_rate * _schedule(number, step.steps)
        batch = text[number * step.batch : (number + 1) * step.batch]
        loss = _divergence(student, teacher, batch)
        if not math.isfinite(loss.item()):
            raise StageError(
                f"recover: the loss is {loss.item()} at step {number + 1} of {step.steps}",
                "lower `learning_rate`",
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = (number + 1) / step.steps
        if (number + 1) % step.check_every == 0 or number + 1 == step.steps:
            found = _held_out_kl(student, teacher, held_out, step.batch)
            curve.append((number + 1, found))
            if found < best:
                best, kept = found, [parameter.detach().clone() for parameter in trained]
        context.report(f"loss {loss.item():.4f}, held-out KL {curve[-1][1]:.4f}", done)
    with torch.no_grad():
        for parameter, value in zip(trained, kept):
            parameter.copy_(value)
    return Healing(
        steps=step.steps,
        tokens=text[: step.steps * step.batch].numel(),
        trained=sum(parameter.numel() for parameter in trained),
        kl_before=before,
        kl_after=best,
        curve=curve,
        seconds=time.monotonic() - begin,
    )


def _schedule(number: int, steps: int) -> float:
    """Linear warm-up over the first twentieth, then a cosine down to a tenth."""
    warm_up = max(1, steps // 20)
    if number < warm_up:
        return (number + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (number - warm_up) / max(1, steps - warm_up)))


def _held_out_kl(student: Any, teacher: Any, windows: torch.Tensor, batch: int) -> float:
    import torch

    with torch.no_grad():
        parts = [_divergence(student, teacher, windows[at : at + batch]).item() * len(windows[at : at + batch])
                 for at in range(0, len(windows), batch)]  # fmt: skip
    return sum(parts) / len(windows)


def _divergence(student: Any, teacher: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher ‖ student) in nats per token, float32."""
    import torch

    with torch.no_grad():
        expected = teacher.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
    with torch.autocast(ids.device.type, torch.bfloat16):
        found = student.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
    teacher_head = teacher.get_output_embeddings().weight
    student_head = student.get_output_embeddings().weight.detach()
    return chunked_kl(found, expected, student_head, teacher_head) / len(expected)


def chunked_kl(
    student: torch.Tensor, teacher: torch.Tensor, student_head: torch.Tensor, teacher_head: torch.Tensor
) -> torch.Tensor:
    """Summed KL(teacher ‖ student) of hidden states (tokens, width) under heads (vocabulary, width), a chunk at a time.

    The gradient with respect to the student's states is computed on the way, so no logits are kept for the backward
    pass: ∂KL/∂logits = softmax(student) − softmax(teacher).
    """
    import torch

    class ChunkedKl(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
            total = torch.zeros((), dtype=torch.float32, device=states.device)
            gradient = torch.empty_like(states)
            for at in range(0, len(states), CHUNK):
                span = slice(at, at + CHUNK)
                expected = torch.log_softmax((teacher[span].to(teacher_head.dtype) @ teacher_head.T).float(), -1)
                found = torch.log_softmax((states[span].to(student_head.dtype) @ student_head.T).float(), -1)
                probable = expected.exp()
                total += (probable * (expected - found)).sum()
                gradient[span] = ((found.exp() - probable).to(student_head.dtype) @ student_head).to(states.dtype)
            ctx.save_for_backward(gradient)
            return total

        @staticmethod
        def backward(ctx: Any, outer: torch.Tensor) -> torch.Tensor:
            (gradient,) = ctx.saved_tensors
            return gradient * outer.to(gradient.dtype)

    return ChunkedKl.apply(student)


def _write(checkpoint: Checkpoint, student: Any, layers: dict[str, QuantizedLinear], files: Path) -> None:
    """The checkpoint's files with the healed scales and norms in them, in the dtypes that they had."""
    from safetensors.torch import load_file, save_file

    source = Path(checkpoint.path)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, files)
    healed = {f"{name}.weight_scale": student.get_submodule(name).healed_scales() for name in layers}
    healed |= {
        name: value for name, value in student.named_parameters() if value.requires_grad and "change" not in name
    }
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors.keys() & healed.keys():
            tensors[name] = healed[name].detach().cpu().to(tensors[name].dtype).contiguous()
        save_file(tensors, files / path.name, metadata={"format": "pt"})
