"""Looks, evidence, estimates, generated text, and what lm-eval's samples become."""

from pathlib import Path

import numpy as np
import pytest

from pennyweight.compare import answer_of, flips, margin_of
from pennyweight.errors import StageError
from pennyweight.evaluate import estimates, generation, looks
from pennyweight.evaluate.evidence import Evidence, ScoredText
from pennyweight.evaluate.harness import draw
from pennyweight.recipe import load_recipe


def scored(windows: int = 6, length: int = 8, seed: int = 0) -> ScoredText:
    draws = np.random.default_rng(seed)
    documents = np.sort(draws.integers(0, 4, (windows, length)).astype(np.int32), axis=None).reshape(windows, length)
    nll, base = (draws.exponential(size=(windows, length - 1)).astype(np.float32) for _ in range(2))
    kl = draws.exponential(0.1, (windows, length)).astype(np.float32)
    return ScoredText(nll, base, documents, kl, kl < 0.1)


def answered(doc_id: int, likelihoods: list[float], choices: list[str], target: int = 0) -> dict[str, object]:
    row = {"task": "t", "doc_id": doc_id, "doc_hash": str(doc_id), "prompt": "Why?", "target": target}
    row |= {"loglikelihoods": likelihoods, "choices": choices}
    normal = [value / len(choice) for value, choice in zip(likelihoods, choices)]
    return row | {
        "acc": float(np.argmax(likelihoods) == target),
        "acc_norm": float(np.argmax(normal) == target),
    }


# --- looks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "total", "seen"),
    [(150, 1500, [150, 300, 600, 1200, 1500]), (100, 100, [100]), (None, 7, [7]), (50, 20, [20]), (1, 3, [1, 2, 3])],
)
def test_looks_double_up_to_all_there_is(first: int | None, total: int, seen: list[int]) -> None:
    assert looks.sizes(first, total) == seen


def test_parts_of_all_looks_are_the_whole_without_overlap() -> None:
    order = list(range(700))
    parts = [order[looks.part(150, look)] for look in range(5)]
    assert [item for part in parts for item in part] == order
    assert [sum(map(len, parts[: look + 1])) for look in range(5)] == [*looks.sizes(150, 700), 700]
    assert order[looks.part(None, 0)] == order
    assert order[looks.part(None, 1)] == []


def test_items_of_later_looks_are_new_and_the_same_for_all() -> None:
    first, second = draw(3, 500, looks.part(100, 0)), draw(3, 500, looks.part(100, 1))
    assert len(first) == len(second) == 100
    assert not set(first) & set(second)
    assert first == draw(3, 500, slice(0, 100))
    assert first != draw(4, 500, slice(0, 100))


# --- evidence ---------------------------------------------------------------------------------------------------------


def test_evidence_is_read_as_it_was_written(tmp_path: Path) -> None:
    nll = scored().nll
    texts = {"divergence": scored(), "more": ScoredText(nll, nll, scored().documents)}
    evidence = Evidence(texts, [answered(1, [-1.0, -2.0], ["a", "b"])])
    evidence.write(tmp_path)
    again = Evidence.read(tmp_path)
    assert again.rows == evidence.rows
    for name, text in texts.items():
        for part, value in vars(text).items():
            found = getattr(again.texts[name], part)
            assert found is None if value is None else np.array_equal(value, found)


def test_evidence_adds_up() -> None:
    one, other = Evidence({"divergence": scored(4)}, [{"task": "t"}], 1.0), Evidence({"divergence": scored(3)}, [], 2.0)
    both = one.plus(other)
    assert (len(both.texts["divergence"].nll), len(both.of_task("t")), both.seconds) == (7, 1, 3.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_not_kept(tmp_path: Path, value: float) -> None:
    text = scored()
    text.kl[2, 3] = value
    with pytest.raises(StageError, match="not a finite number"):
        Evidence({"divergence": text}).write(tmp_path)
    with pytest.raises(StageError, match="t item 5: a score is not a finite number"):
        Evidence(rows=[answered(5, [-1.0, value], ["a", "b"])]).write(tmp_path)


# --- estimates --------------------------------------------------------------------------------------------------------


def test_metrics_of_text_are_their_definitions() -> None:
    text = scored()
    found = {
        name: estimates.value_of(name, Evidence({"divergence": text})).value
        for name in ("kl_mean", "kl_p99", "top1_agreement", "perplexity", "perplexity_ratio", "nll_delta")
    }
    gap = (text.nll.astype(float) - text.nll_base).mean()
    assert found == {
        "kl_mean": pytest.approx(text.kl.mean()),
        "kl_p99": pytest.approx(np.quantile(text.kl, 0.99)),
        "top1_agreement": pytest.approx(text.agree.mean()),
        "perplexity": pytest.approx(np.exp(text.nll.mean())),
        "perplexity_ratio": pytest.approx(np.exp(gap)),
        "nll_delta": pytest.approx(gap),
    }


def test_what_follows_belongs_to_the_document_that_it_is_in() -> None:
    """A window of two documents: the second one's first token counts for the second."""
    documents = np.array([[0, 0, 1, 1]], np.int32)
    nll = np.array([[1.0, 5.0, 5.0]], np.float32)
    mean = estimates.value_of("nll_delta", Evidence({"divergence": ScoredText(nll, nll * 0, documents)}))
    residual = np.array([1.0 - 11 / 3, 10 - 22 / 3])
    assert mean.stderr == pytest.approx(np.sqrt(2 * (residual**2).sum()) / 3)


def test_the_base_against_itself_has_no_metric_off() -> None:
    text = scored()
    same = ScoredText(text.nll_base, text.nll_base, text.documents, text.kl * 0, text.agree | True)
    rows = [answered(index, [-1.0, -2.0], ["a", "b"]) for index in range(9)]
    suite = load_recipe("smollm2-135m-cpu").evaluate
    rows = [row | {"task": "piqa"} for row in rows]
    found = estimates.metrics(Evidence({"divergence": same}, rows), Evidence({}, rows), suite)
    assert (found["kl_mean"].value, found["top1_agreement"].value, found["perplexity_ratio"].value) == (0, 1, 1)
    assert (found["piqa/acc"].delta, found["piqa/acc"].gained, found["piqa/acc"].mcnemar_p) == (0, 0, 1)


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "share"),
    [([1, 2, 3, 4, 5, 6], 0.0), ([7] * 10, 6 / 7), ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5), ([1, 2], 0.0)],
)
def test_repetition_counts_grams_that_came_before(tokens: list[int], share: float) -> None:
    assert generation.repetition(tokens) == pytest.approx(share)


# --- flips ------------------------------------------------------------------------------------------------------------


def test_answers_and_margins_by_metric() -> None:
    row = answered(0, [-6.0, -4.0], ["a long answer", "no"], target=0)
    assert (answer_of(row, "acc"), margin_of(row, "acc")) == ("no", -2.0)
    assert (answer_of(row, "acc_norm"), margin_of(row, "acc_norm")) == ("a long answer", pytest.approx(2 - 6 / 13))


def test_flips_are_the_questions_that_one_side_got_right() -> None:
    right, wrong = [-1.0, -2.0], [-3.0, -2.0]
    ours = [answered(index, likelihoods, ["a", "b"]) for index, likelihoods in enumerate([right, wrong, wrong, right])]
    base = [answered(index, likelihoods, ["a", "b"]) for index, likelihoods in enumerate([right, right, wrong, wrong])]
    found = flips(ours, base, "acc")
    assert [(flip.item, flip.gained, flip.ours, flip.theirs) for flip in found] == [
        (1, False, "b", "a"),
        (3, True, "a", "b"),
    ]
