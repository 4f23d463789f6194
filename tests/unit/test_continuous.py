"""Continuous batching over a module's cache: every answer is what the model says alone, whoever joins and leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pennyweight import checkpoints, stages
from pennyweight.runtimes import Sampling, continuous
from pennyweight.runtimes.transformers import TransformersSession
from pennyweight.store import Store

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}


@pytest.fixture(scope="module", params=KINDS)
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TransformersSession:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **SIZES, **KINDS[request.param]))
    folder: Path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    candidate = stages.export_alone(
        checkpoints.describe(folder, "test"), "transformers", "cpu", Store(folder / "store")
    )
    return TransformersSession(candidate, "cpu")


def prompts(count: int) -> list[np.ndarray]:
    """Of all lengths from 1 on, shuffled."""
    draw = np.random.default_rng(0)
    return [draw.integers(2, 64, length) for length in draw.permutation(np.arange(1, count + 1))]


def alone(session: TransformersSession, prompt: np.ndarray, new_tokens: int, stop: bool = False) -> list[int]:
    """Greedy, without a cache."""
    (end,) = session.ends()
    ids = prompt.tolist()
    for _ in range(new_tokens):
        logits = session.logits(np.array([ids]))[0, -1].clone()
        if not stop:
            logits[end] = -torch.inf
        ids.append(int(logits.argmax()))
        if stop and ids[-1] == end:
            break
    return ids[len(prompt) :]


def serve(session: TransformersSession, answers: dict[int, list[int]], steps: int | None = None) -> dict[int, list]:
    """Go on with what is in flight, to its end or for so many steps."""
    found: dict[int, list] = {}
    while steps != 0 and not all(len(given) and given[-1] is None for given in answers.values()):
        for progress in session.step():
            answers[progress.request] += progress.tokens + ([None] if progress.finished else [])
            found.setdefault(progress.request, []).append(progress)
        steps = None if steps is None else steps - 1
    return found


def test_requests_of_all_lengths_join_and_leave(session: TransformersSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous, "MOST_READ", 30)  # prompts are read in several steps
    asked = [(prompt, 3 + 5 * (number % 4)) for number, prompt in enumerate(prompts(12))]
    answers: dict[int, list] = {}
    numbers = []
    for prompt, new_tokens in asked:
        numbers.append(session.submit(prompt, new_tokens))
        answers[numbers[-1]] = []
        serve(session, answers, steps=2)
    serve(session, answers)
    for number, (prompt, new_tokens) in zip(numbers, asked):
        assert answers[number] == [*alone(session, prompt, new_tokens), None]
    assert session.occupancy().running == 0


def test_no_more_than_so_many_at_once(session: TransformersSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "at_once", 2)
    answers = {session.submit(prompt, 4): [] for prompt in prompts(5)}
    while not all(given and given[-1] is None for given in answers.values()):
        serve(session, answers, steps=1)
        assert session.occupancy().running <= 2
    assert all(len(given) == 5 for given in answers.values())


def test_an_answer_ends_where_the_model_ends_it(session: TransformersSession, monkeypatch: pytest.MonkeyPatch) -> None:
    says = alone(session, prompts(8)[0], 20)
    monkeypatch.setattr(session.model.generation_config, "eos_token_id", says[10])
    expected = {length: alone(session, prompt, 60, stop=True) for length, prompt in enumerate(prompts(8))}
    assert any(len(answer) < 60 for answer in expected.values())
    numbers = {session.submit(prompt, 60, stop=True): length for length, prompt in enumerate(prompts(8))}
    answers: dict[int, list] = {number: [] for number in numbers}
    serve(session, answers)
    assert {numbers[number]: answer[:-1] for number, answer in answers.items()} == expected


def test_samplings_differ_row_by_row_and_a_seed_draws_the_same_in_company(session: TransformersSession) -> None:
    seeded = Sampling(temperature=1.0, seed=7)
    first, *others = prompts(6)
    answers: dict[int, list] = {session.submit(first, 12, sampling=seeded): []}
    serve(session, answers)
    (by_itself,) = answers.values()
    answers = {session.submit(first, 12, sampling=seeded): []}
    serve(session, answers, steps=3)
    scored = session.submit(others[0], 12, sampling=Sampling(logprobs=2))
    answers |= {scored: []} | {session.submit(prompt, 12): [] for prompt in others[1:]}
    found = serve(session, answers)
    assert next(iter(answers.values())) == by_itself
    assert answers[scored] == [*alone(session, others[0], 12), None]
    text = [*others[0].tolist(), *answers[scored][:-1]]
    expected = torch.log_softmax(session.logits(np.array([text]))[0].float(), -1)
    for place, progress in enumerate(found[scored], len(others[0]) - 1):
        (only,) = progress.scored
        assert only.logprob == pytest.approx(expected[place, progress.tokens[0]].item(), abs=1e-4)
        assert [token for token, _ in only.top] == expected[place].topk(2).indices.tolist()


def test_what_is_aborted_is_not_heard_of_and_what_is_cancelled_neither(session: TransformersSession) -> None:
    kept, gone, waiting = prompts(3)
    numbers = [session.submit(kept, 10), session.submit(gone, 10)]
    answers: dict[int, list] = {number: [] for number in numbers}
    serve(session, answers, steps=3)
    before = len(answers[numbers[1]])
    last = session.submit(waiting, 10)
    for number in (numbers[1], last, 12345):
        session.abort(number)
    assert session.occupancy().running == 1
    del answers[numbers[1]]
    assert serve(session, answers).keys() == {numbers[0]}
    assert before == 3
    assert answers[numbers[0]] == [*alone(session, kept, 10), None]
    answers = {session.submit(kept, 10): []}
    serve(session, answers, steps=2)
    session.cancel()
    assert session.occupancy().running == 0
    answers = {session.submit(gone, 4): []}
    serve(session, answers)
    assert next(iter(answers.values())) == [*alone(session, gone, 4), None]
