"""The loop that heals: AdamW against the teacher, until the budget is spent or nothing gets better."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from pennyweight.errors import StageError
from pennyweight.healing.loss import chunked_kl, relative_distance
from pennyweight.healing.student import Trainable
from pennyweight.recipe import Distill, Recover

#: Fraction of the budget over which the learning rate rises, and what it falls to by a cosine.
WARM_UP, LAST_RATE = 0.05, 0.1


@dataclass
class Course:
    """Where a training stands, and how good its best state was."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    ended_by: str = ""
    curve: list[tuple[int, float]] = field(default_factory=list)
    best: float = math.inf
    looks_in_vain: int = 0

    def look(self, held_out_kl: float) -> bool:
        """Note how good the state is; whether it is the best yet."""
        self.curve.append((self.steps, held_out_kl))
        self.looks_in_vain += 1
        if held_out_kl < self.best:
            self.best, self.looks_in_vain = held_out_kl, 0
            return True
        return False

    def spent(self, budget: Recover | Distill) -> dict[str, float]:
        """Fraction of each limit of the budget that is used up."""
        used = {"steps": self.steps, "tokens": self.tokens, "minutes": self.seconds / 60}
        return {name: used[name] / limit for name, limit in budget.limits.items()}


def heal(
    student: Any,
    teacher: Any,
    trained: list[Trainable],
    text: torch.Tensor,
    held_out: torch.Tensor,
    settings: Recover,
    report: Callable[[str, float], None],
) -> Course:
    """Train `trained`, parts of `student`, on `text`, token ids (windows, tokens), and leave them in the state whose
    divergence on `held_out` was smallest.

    Raises StageError where the loss is not finite.
    """
    groups = [{"params": [item.parameter], "rate": item.rate * settings.learning_rate} for item in trained]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    looks = HeldOut(teacher, held_out, settings.batch)
    course, batches, begin = Course(), _batches(text, settings), time.monotonic()
    course.look(looks.kl(student))
    kept, spent = _values(trained), 0.0
    while spent < 1 and not course.ended_by:
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * schedule(spent)
        loss = _loss(student, teacher, next(batches), settings.hidden)
        if not math.isfinite(loss.item()):
            raise StageError(f"recover: the loss is {loss.item()} at step {course.steps + 1}", "lower `learning_rate`")
        loss.backward()
        torch.nn.utils.clip_grad_norm_([item.parameter for item in trained], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        course.steps += 1
        course.tokens += settings.batch * settings.length
        course.seconds = time.monotonic() - begin
        limits = course.spent(settings)
        spent = max(limits.values())
        if course.steps % settings.check_every == 0 or spent >= 1:
            kept = _values(trained) if course.look(looks.kl(student)) else kept
        report(f"loss {loss.item():.4f}, held-out KL {course.curve[-1][1]:.4f}", min(spent, 1.0))
        if spent >= 1:
            course.ended_by = max(limits, key=limits.__getitem__)
        elif course.looks_in_vain >= settings.patience:
            course.ended_by = "patience"
    with torch.no_grad():
        for item, value in zip(trained, kept):
            item.parameter.copy_(value)
    return course


def _values(trained: list[Trainable]) -> list[torch.Tensor]:
    return [item.parameter.detach().clone() for item in trained]


class HeldOut:
    """Divergence on text that is not learnt on. What the teacher says to it is computed once."""

    def __init__(self, teacher: Any, windows: torch.Tensor, batch: int):
        self._batches = windows.split(batch)
        self._head = teacher.get_output_embeddings().weight
        self._expected = [_states(teacher, ids) for ids in self._batches]
        self._tokens = windows.numel()

    def kl(self, student: Any) -> float:
        """Mean KL(teacher ‖ student) in nats per token."""
        head = student.get_output_embeddings().weight
        with torch.no_grad():
            parts = [
                chunked_kl(_states(student, ids), expected, head, self._head).item()
                for ids, expected in zip(self._batches, self._expected)
            ]
        return sum(parts) / self._tokens


def _loss(student: Any, teacher: Any, ids: torch.Tensor, hidden: float) -> torch.Tensor:
    """KL(teacher ‖ student) in nats per token, and `hidden` times the relative distance of the last hidden states."""
    expected = _states(teacher, ids)
    found = student.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
    heads = student.get_output_embeddings().weight.detach(), teacher.get_output_embeddings().weight
    loss = chunked_kl(found, expected, *heads)
    if hidden:
        loss = loss + hidden * relative_distance(found, expected)
    return loss / ids.numel()


@torch.no_grad()
def _states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the head is applied to, (tokens, width)."""
    return model.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)


def _batches(text: torch.Tensor, settings: Recover) -> Iterator[torch.Tensor]:
    """Batches of windows, in the text's order; once it is used up, again and again in other orders."""
    generator = torch.Generator().manual_seed(0)
    order = torch.arange(len(text))
    while True:
        for batch in order.split(settings.batch):
            if len(batch) == min(settings.batch, len(text)):
                yield text[batch.to(text.device)]
        order = torch.randperm(len(text), generator=generator)


def schedule(spent: float, warm_up: float = WARM_UP) -> float:
    """Factor on the learning rate after a fraction of the budget: a linear rise over `warm_up`, then a cosine."""
    if spent < warm_up:
        return max(spent / warm_up, 0.2)
    return LAST_RATE + (1 - LAST_RATE) / 2 * (1 + math.cos(math.pi * (spent - warm_up) / (1 - warm_up)))
