"""Losses of a student against a teacher over a whole vocabulary, without ever holding all of their logits.

A few positions' logits exist at a time, softmaxes and sums are float32 (float64 where the states are), and the gradient
is computed on the way, so that nothing is kept for the way back. Every divergence here is a sum over classes of a
function of the student's probabilities q, so with g = ∂D/∂q the gradient with respect to the logits is
q ∘ (g − Σ q g).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

#: Logits of one model that exist at once: 256 positions of a vocabulary of 49,152.
CHUNK_LOGITS = 256 * 49152
#: A label that is not learnt on.
IGNORED = -100

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
Loss = tuple[torch.Tensor, torch.Tensor]
"""(sum, its gradient with respect to the student's log-odds)"""


@dataclass(frozen=True)
class Objective:
    """(1 − ce) · T² · D(teacher, student) at temperature T, and ce · cross-entropy with the text at temperature 1.

    T² keeps the gradient's size whatever the temperature (Hinton et al., 2015). forward_kl is KL(teacher ‖ student),
    reverse_kl KL(student ‖ teacher), jsd β KL(teacher ‖ m) + (1 − β) KL(student ‖ m) with m = β teacher +
    (1 − β) student (Agarwal et al., 2024, generalized Jensen–Shannon divergence).
    """

    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    ce: float = 0.0


class Target(Protocol):
    """What the teacher says to a row of positions."""

    def loss(self, span: slice, student: torch.Tensor, objective: Objective) -> Loss:
        """Summed divergence of some positions, in nats. `student` (positions, vocabulary) holds log-probabilities at
        the temperature, and may be overwritten."""


@dataclass(frozen=True)
class Live:
    """The teacher's hidden states (positions, width) under its head (vocabulary, width)."""

    states: torch.Tensor
    head: torch.Tensor
    trunk: torch.Tensor | None = None
    """Hidden states after the blocks that the student shares with it, (windows, tokens, width), of all positions."""

    def loss(self, span: slice, student: torch.Tensor, objective: Objective) -> Loss:
        logits = _widened(self.states[span].to(self.head.dtype) @ self.head.T)
        teacher = torch.log_softmax(logits.div_(objective.temperature), -1)
        if objective.divergence == "forward_kl":  # q ∘ (g − Σ q g) is q − p here, without dividing by q
            probable = teacher.exp()
            total = torch.dot(probable.flatten(), teacher.sub_(student).flatten())
            return total, student.exp_().sub_(probable)
        value, slope = _divergence(teacher, student, objective)
        probable = student.exp_()
        total = value.sum()
        return total, slope.sub_((probable * slope).sum(-1, keepdim=True)).mul_(probable)


@dataclass(frozen=True)
class TopK:
    """The teacher's k most probable tokens, and all others as one class.

    `ids` (positions, k), `log_probabilities` (positions, k + 1), the last of the rest's. The divergence of the classes
    is at most that of the tokens.
    """

    ids: torch.Tensor
    log_probabilities: torch.Tensor

    def loss(self, span: slice, student: torch.Tensor, objective: Objective) -> Loss:
        ids, teacher = self.ids[span], self.log_probabilities[span].to(student.dtype)
        named = student.gather(-1, ids)
        # The rest is summed, not 1 − Σ: a student that is sure leaves almost nothing.
        probable = student.exp_().scatter_(-1, ids, 0.0)
        rest = probable.sum(-1, keepdim=True).clamp_min(torch.finfo(student.dtype).tiny)
        classes = torch.cat([named, rest.log()], -1)
        if objective.divergence == "forward_kl":
            share = teacher.exp()
            total, factor = (share * (teacher - classes)).sum(), 1 - share[:, -1:] / rest
            return total, probable.mul_(factor).scatter_(-1, ids, named.exp() - share[:, :-1])
        value, slope = _divergence(teacher, classes, objective)
        slope = slope - (classes.exp() * slope).sum(-1, keepdim=True)
        gradient = probable.mul_(slope[:, -1:]).scatter_(-1, ids, named.exp() * slope[:, :-1])
        return value.sum(), gradient


@dataclass(frozen=True)
class Sampled:
    """Tokens drawn from the teacher: their mean cross-entropy has the expectation, and the expected gradient, of the
    teacher's own (Anshumann et al., 2025). It is above the forward KL by the teacher's entropy.

    `ids` (positions, draws); `weights` (positions, draws) sum to 1, and a token that was drawn twice may be listed
    once with the weight of both, or twice.
    """

    ids: torch.Tensor
    weights: torch.Tensor

    def loss(self, span: slice, student: torch.Tensor, objective: Objective) -> Loss:
        if objective.divergence != "forward_kl":
            raise ValueError(f"sampled tokens give the forward KL alone, not {objective.divergence}")
        ids, weights = self.ids[span], self.weights[span].to(student.dtype)
        total = -(weights * student.gather(-1, ids)).sum()
        return total, student.exp_().scatter_add_(-1, ids, -weights)


def chunked_loss(
    states: torch.Tensor,
    head: torch.Tensor,
    target: Target | None,
    objective: Objective,
    labels: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The objective's sum over positions, in nats.

    `states` (positions, width) are the student's last hidden states, `head` (vocabulary, width) its output matrix; both
    get gradients where they ask for them. `labels` (positions,) are the tokens that follow, IGNORED where there is
    none; needed where `ce` is not 0. `target` may be None where `ce` is 1. Products are computed in `dtype`, the
    states' own by default.
    """
    return _Chunked.apply(states, head, target, objective, labels, dtype or states.dtype)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, head: torch.Tensor, target: Any, objective: Any, labels: Any, dtype: torch.dtype
    ) -> torch.Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return _Chunked._forward(ctx, states, head, _rule(target, objective, labels), dtype)

    @staticmethod
    def _forward(
        ctx: Any, states: torch.Tensor, head: torch.Tensor, rule: Callable[[slice, Any], Loss], dtype: torch.dtype
    ) -> torch.Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=states.device)
        to_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        to_head = torch.zeros_like(head, dtype=wide) if ctx.needs_input_grad[1] else None
        inputs, matrix = states.detach().to(dtype), head.detach().to(dtype)
        for span in spans(len(states), len(head)):
            loss, gradient = rule(span, _widened(inputs[span] @ matrix.T))
            total += loss
            if to_states is None and to_head is None:
                continue
            gradient = gradient.to(dtype)
            if to_states is not None:
                to_states[span] = gradient @ matrix
            if to_head is not None:
                to_head += gradient.T @ inputs[span]
        ctx.save_for_backward(to_states, to_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        to_states, to_head = ctx.saved_tensors
        states = None if to_states is None else to_states * outer.to(to_states.dtype)
        head = None if to_head is None else to_head.mul_(outer).to(ctx.head_dtype)
        return states, head, None, None, None, None


def _rule(target: Target | None, objective: Objective, labels: torch.Tensor | None) -> Callable[[slice, Any], Loss]:
    """(positions, their logits) → (the objective's sum, its gradient with respect to the logits)."""
    heat, weight = objective.temperature, 1 - objective.ce

    def rule(span: slice, logits: torch.Tensor) -> Loss:
        parts: list[Loss] = []
        if objective.ce:
            assert labels is not None
            loss, gradient = _cross_entropy(logits, labels[span])
            parts.append((objective.ce * loss, gradient.mul_(objective.ce)))
        if weight:
            assert target is not None
            student = torch.log_softmax(logits if heat == 1 else logits / heat, -1)
            loss, gradient = target.loss(span, student, objective)
            parts.append((weight * heat**2 * loss, gradient if weight * heat == 1 else gradient.mul_(weight * heat)))
        losses, gradients = zip(*parts)
        return sum(losses), gradients[0] if len(gradients) == 1 else gradients[0].add_(gradients[1])

    return rule


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> Loss:
    learnt = (labels != IGNORED).unsqueeze(-1)
    named = labels.clamp(min=0).unsqueeze(-1)
    found = torch.log_softmax(logits, -1)
    loss = -(found.gather(-1, named) * learnt).sum()
    gradient = found.exp_().scatter_add_(-1, named, -learnt.to(found.dtype)).mul_(learnt)
    return loss, gradient


def _divergence(
    teacher: torch.Tensor, student: torch.Tensor, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """(terms of the sum, the slope g of D by the student's probabilities up to a constant a position), from
    log-probabilities of any classes."""
    if objective.divergence == "reverse_kl":
        slope = student - teacher
        return student.exp() * slope, slope
    beta = objective.beta
    log_beta, log_rest = torch.tensor([beta, 1 - beta], dtype=student.dtype).log().tolist()
    mixed = torch.logaddexp(teacher + log_beta, student + log_rest)
    slope = (student - mixed).mul_(1 - beta)
    return beta * teacher.exp() * (teacher - mixed) + student.exp() * slope, slope


def spans(positions: int, vocabulary: int) -> list[slice]:
    """Positions whose logits exist at once."""
    size = max(1, CHUNK_LOGITS // vocabulary)
    return [slice(at, min(at + size, positions)) for at in range(0, positions, size)]


def _widened(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
