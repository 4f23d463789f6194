"""Tokens chosen from logits, and what static waves make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from pennyweight.runtimes import Sampling
from pennyweight.runtimes.sampling import Chooser, choose, score
from pennyweight.runtimes.waves import Waves

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))


def shares(temperature: float, top_p: float, draws: int = 20_000) -> np.ndarray:
    stream = np.random.default_rng(0)
    tokens = [choose(LOGITS, temperature, top_p, stream) for _ in range(draws)]
    return np.bincount(tokens, minlength=4) / draws


def test_the_likeliest_at_temperature_0() -> None:
    assert shares(0, 1, 10).tolist() == [1, 0, 0, 0]


def test_tokens_come_as_often_as_their_chances_say() -> None:
    error = 4 * 0.5 / 20_000**0.5  # four standard errors at most
    assert shares(1, 1) == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=error)
    squared = np.array([0.5, 0.25, 0.15, 0.1]) ** 2  # softmax(logits / 0.5)
    assert shares(0.5, 1) == pytest.approx(squared / squared.sum(), abs=error)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.95, 4), (1e-9, 1)])
def test_top_p_keeps_the_fewest_that_have_it_together(top_p: float, kept: int) -> None:
    found = shares(1, top_p)
    chances = np.array([0.5, 0.25, 0.15, 0.1][:kept])
    assert found[:kept] == pytest.approx(chances / chances.sum(), abs=4 * 0.5 / 20_000**0.5)
    assert not found[kept:].any()


def test_log_probabilities_are_torchs() -> None:
    logits = np.random.default_rng(1).normal(0, 5, 1000).astype(np.float32)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    found = score(logits, 17, 5)
    assert found.logprob == pytest.approx(expected[17].item(), abs=1e-9)
    values, tokens = expected.topk(5)
    assert [token for token, _ in found.top] == tokens.tolist()
    assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-9)
    assert score(logits, 17, 0).top == ()


def test_a_seed_draws_the_same_whatever_else_is_in_the_wave() -> None:
    rows = np.random.default_rng(2).normal(0, 1, (50, 1, 300)).astype(np.float32)
    seeded = Sampling(temperature=1, seed=-5)
    alone = [int(choose_row[0]) for choose_row in map(Chooser([seeded], ()), rows)]
    among = Chooser([Sampling(temperature=1), seeded, Sampling()], ())
    together = [among(np.repeat(row, 3, 0)) for row in rows]
    assert [int(row[1]) for row in together] == alone
    assert [int(row[2]) for row in together] == rows[:, 0].argmax(-1).tolist()
    assert len(set(alone)) > 20


def test_what_may_not_be_chosen_is_not_but_its_chance_counts() -> None:
    chooser = Chooser([Sampling(logprobs=2)], never=[0])
    assert chooser(LOGITS[None]).tolist() == [1]
    scored = chooser.scored[0]
    assert scored and scored.logprob == pytest.approx(np.log(0.25))
    assert [token for token, _ in scored.top] == [0, 1]


class Logits(Waves):
    """Logits of a fixed table by the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = np.random.default_rng(3).normal(0, 3, (32, 32)).astype(np.float32)
        self.chosen = 0

    def columns(
        self, ids: np.ndarray, new_tokens: int, stop: bool, choose: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> Iterator[np.ndarray]:
        last = ids[:, -1]
        for _ in range(new_tokens):
            logits = self.table[last].copy()
            self.chosen += choose is not None
            if choose is None:
                logits[:, self.ends()] = -np.inf
            last = logits.argmax(-1) if choose is None else choose(logits)
            yield last

    def ends(self) -> list[int]:
        return [0]


def run(session: Waves) -> dict[int, list]:
    found: dict[int, list] = {}
    while session._waiting or session._wave:
        for progress in session.step():
            found.setdefault(progress.request, []).append(progress)
    return found


def test_a_wave_is_scored_where_one_request_asks_for_it() -> None:
    session = Logits()
    greedy = session.submit(np.array([1, 2]), 6)
    scored = session.submit(np.array([1, 2]), 6, sampling=Sampling(logprobs=3))
    found = run(session)
    tokens = [progress.tokens[0] for progress in found[greedy]]
    assert [progress.tokens[0] for progress in found[scored]] == tokens
    assert all(progress.scored is None for progress in found[greedy])
    expected = torch.log_softmax(torch.from_numpy(session.table), -1)
    for before, progress in zip([2, *tokens], found[scored]):
        (only,) = progress.scored
        assert only.logprob == pytest.approx(expected[before, progress.tokens[0]].item(), abs=1e-5)
        assert [token for token, _ in only.top] == expected[before].topk(3).indices.tolist()
    session.chosen = 0
    session.submit(np.array([1, 2]), 6)
    run(session)
    assert session.chosen == 0


def test_what_is_aborted_is_not_heard_of_and_the_wave_ends_without_it() -> None:
    session = Logits()
    waits = session.submit(np.array([1, 2, 3]), 4)
    long, short = session.submit(np.array([1, 2]), 40), session.submit(np.array([3, 4]), 2)
    session.abort(waits)
    session.step()
    assert session.occupancy().running == 2
    session.abort(long)
    found = run(session)
    assert found.keys() == {short}
    assert [progress.finished for progress in found[short]] == [True]
    assert session.occupancy().running == 0
    session.abort(12345)
