"""Divergence of a student from its teacher over a whole vocabulary, without ever holding all of its logits."""

from __future__ import annotations

from typing import Any

import torch

#: Positions whose logits exist at once, of teacher and student: memory does not grow with the batch.
CHUNK = 256


def chunked_kl(
    student: torch.Tensor, teacher: torch.Tensor, student_head: torch.Tensor, teacher_head: torch.Tensor
) -> torch.Tensor:
    """Summed KL(teacher ‖ student) in nats, float32, of hidden states (tokens, width) under heads (vocabulary, width).

    The gradient with respect to the student's states is computed on the way, chunk by chunk, so that no logits are kept
    for the way back: ∂KL/∂logits = softmax(student) − softmax(teacher).
    """
    return _ChunkedKl.apply(student, teacher, student_head, teacher_head)


class _ChunkedKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, student_head: torch.Tensor, teacher_head: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for at in range(0, len(student), CHUNK):
            span = slice(at, at + CHUNK)
            expected = _log_probabilities(teacher[span], teacher_head)
            found = _log_probabilities(student[span], student_head)
            probable = expected.exp()
            total += torch.dot(probable.flatten(), expected.sub_(found).flatten())
            if gradient is not None:
                gradient[span] = found.exp_().sub_(probable).to(student_head.dtype) @ student_head
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None


def _log_probabilities(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax((states.to(head.dtype) @ head.T).float(), -1)


def relative_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Summed ‖student − teacher‖² / ‖teacher‖² of hidden states (tokens, width), float32."""
    expected = teacher.float()
    return ((student.float() - expected).square().sum(-1) / expected.square().sum(-1).clamp(min=1e-12)).sum()
