"""Distillation losses: closed forms, gradients against autograd in float64, caches against what they stand for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pennyweight.distillation import losses
from pennyweight.distillation.losses import IGNORED, Live, Objective, Sampled, TopK, chunked_loss

KINDS = ("forward_kl", "reverse_kl", "jsd")


def two_classes(teacher: float, student: float, objective: Objective) -> float:
    """The loss of one position whose states are 1 wide and whose two logits are 0 and log-odds."""
    states = [torch.tensor([[math.log(p / (1 - p))]], dtype=torch.float64) for p in (teacher, student)]
    head = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    return chunked_loss(states[1], head, Live(states[0], head), objective).item()


def kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_divergences_of_two_classes_are_their_closed_forms() -> None:
    assert two_classes(0.8, 0.3, Objective("forward_kl")) == pytest.approx(kl(0.8, 0.3))
    assert two_classes(0.8, 0.3, Objective("reverse_kl")) == pytest.approx(kl(0.3, 0.8))
    mixed = 0.25 * 0.8 + 0.75 * 0.3
    jsd = 0.25 * kl(0.8, mixed) + 0.75 * kl(0.3, mixed)
    assert two_classes(0.8, 0.3, Objective("jsd", beta=0.25)) == pytest.approx(jsd)


def test_a_temperature_softens_both_and_is_squared() -> None:
    soft = [1 / (1 + math.exp(-math.log(p / (1 - p)) / 2)) for p in (0.8, 0.3)]
    assert two_classes(0.8, 0.3, Objective(temperature=2.0)) == pytest.approx(4 * kl(*soft))


def dense(states: Any, head: Any, teacher: Any, objective: Objective, labels: Any) -> torch.Tensor:
    """The same loss as anyone would write it, by autograd."""
    logits, heat = states @ head.T, objective.temperature
    p, q = (torch.log_softmax(each / heat, -1) for each in (teacher, logits))
    m = torch.log(objective.beta * p.exp() + (1 - objective.beta) * q.exp())
    terms = {
        "forward_kl": p.exp() * (p - q),
        "reverse_kl": q.exp() * (q - p),
        "jsd": objective.beta * p.exp() * (p - m) + (1 - objective.beta) * q.exp() * (q - m),
    }
    text = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
    return (1 - objective.ce) * heat**2 * terms[objective.divergence].sum() + objective.ce * text


@pytest.mark.parametrize("rows", [3, 1000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heat", "ce"), [(1.0, 0.0), (2.5, 0.0), (1.0, 0.3), (2.0, 0.3)])
def test_loss_and_both_gradients_are_those_of_autograd(
    monkeypatch: pytest.MonkeyPatch, kind: Any, heat: float, ce: float, rows: int
) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", rows * 23)
    torch.manual_seed(0)
    states, teacher = torch.randn(2, 17, 8, dtype=torch.float64)
    heads = torch.randn(2, 23, 8, dtype=torch.float64)
    labels = torch.randint(0, 23, (17,))
    labels[::4] = IGNORED
    objective = Objective(kind, 0.3, heat, ce)
    mine = [value.clone().requires_grad_(True) for value in (states, heads[0])]
    theirs = [value.clone().requires_grad_(True) for value in (states, heads[0])]
    loss = chunked_loss(*mine, Live(teacher, heads[1]), objective, labels)
    expected = dense(*theirs, teacher @ heads[1].T, objective, labels)
    (2 * loss).backward()
    (2 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for found, known in zip(mine, theirs):
        torch.testing.assert_close(found.grad, known.grad, rtol=1e-10, atol=1e-12)


def test_a_tied_matrix_learns_as_embedding_and_as_head() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(11, 4, dtype=torch.float64)
    ids, teacher = torch.randint(0, 11, (6,)), torch.randn(6, 4, dtype=torch.float64)
    gradients = []
    for way in ("chunked", "dense"):
        tied = matrix.clone().requires_grad_(True)
        states = tied[ids].tanh()
        if way == "chunked":
            loss = chunked_loss(states, tied, Live(teacher, matrix), Objective())
        else:
            loss = dense(states, tied, teacher @ matrix.T, Objective(), torch.full((6,), 1))
        loss.backward()
        gradients.append(tied.grad)
    torch.testing.assert_close(*gradients)


def classes(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the tokens named, and of all others together."""
    found = torch.log_softmax(logits, -1)
    rest = torch.ones_like(found).scatter(-1, ids, 0.0)
    return torch.cat([found.gather(-1, ids), (found.exp() * rest).sum(-1, keepdim=True).log()], -1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tail_counts_as_one_more_class(kind: Any) -> None:
    torch.manual_seed(0)
    states, teacher = torch.randn(9, 8, dtype=torch.float64), torch.randn(9, 23, dtype=torch.float64)
    head, ids = torch.randn(23, 8, dtype=torch.float64), teacher.topk(5).indices
    mine, theirs = states.clone().requires_grad_(True), states.clone().requires_grad_(True)
    said = classes(teacher, ids)
    loss = chunked_loss(mine, head, TopK(ids, said), Objective(kind, 0.3))
    p, q = said, classes(theirs @ head.T, ids)
    m = torch.log(0.3 * p.exp() + 0.7 * q.exp())
    expected = {
        "forward_kl": (p.exp() * (p - q)).sum(),
        "reverse_kl": (q.exp() * (q - p)).sum(),
        "jsd": (0.3 * p.exp() * (p - m) + 0.7 * q.exp() * (q - m)).sum(),
    }[kind]
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_all_tokens_as_classes_are_the_whole_divergence() -> None:
    torch.manual_seed(0)
    states, teacher = torch.randn(2, 9, 8, dtype=torch.float64)
    head = torch.randn(23, 8, dtype=torch.float64)
    ids = (teacher @ head.T).topk(22).indices
    whole = chunked_loss(states, head, Live(teacher, head), Objective())
    assert chunked_loss(states, head, TopK(ids, classes(teacher @ head.T, ids)), Objective()).item() == pytest.approx(
        whole.item()
    )


def test_draws_have_the_teachers_gradient_on_average() -> None:
    torch.manual_seed(0)
    states, teacher = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 13, dtype=torch.float64)
    head, probable = torch.randn(13, 8, dtype=torch.float64), torch.softmax(teacher, -1)
    exact, drawn = states.clone().requires_grad_(True), states.clone().requires_grad_(True)
    loss = chunked_loss(drawn, head, Sampled(torch.arange(13).expand(4, 13), probable), Objective())
    entropy = -(probable * probable.log()).sum().item()
    log_q = torch.log_softmax(exact @ head.T, -1)
    known = (probable * (probable.log() - log_q)).sum()
    loss.backward()
    known.backward()
    assert loss.item() == pytest.approx(known.item() + entropy)
    torch.testing.assert_close(drawn.grad, exact.grad)
    ids = torch.multinomial(probable, 20_000, replacement=True)
    again = states.clone().requires_grad_(True)
    chunked_loss(again, head, Sampled(ids, torch.full(ids.shape, 1 / 20_000)), Objective()).backward()
    assert ((again.grad - exact.grad).norm() / exact.grad.norm()).item() < 0.05
    with pytest.raises(ValueError, match="forward KL alone"):
        chunked_loss(states, head, Sampled(ids, torch.ones(ids.shape)), Objective("jsd"))


def test_a_student_that_is_sure_of_the_named_tokens_leaves_a_finite_tail() -> None:
    head = 60 * torch.eye(3)
    loss = chunked_loss(
        torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True),
        head,
        TopK(torch.tensor([[0]]), torch.tensor([[0.9, 0.1]]).log()),
        Objective(),
    )
    loss.backward()
    # The rest's probability is 2 e^−60.
    assert loss.item() == pytest.approx(0.9 * math.log(0.9) + 0.1 * (math.log(0.1) + 60 - math.log(2)), rel=1e-5)


def test_positions_at_once_hang_on_the_vocabulary() -> None:
    assert [span.stop - span.start for span in losses.spans(600, 49152)] == [256, 256, 88]
    assert [span.stop - span.start for span in losses.spans(2, 10**9)] == [1, 1]
