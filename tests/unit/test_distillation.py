"""Distillation at work: a toy language is learnt, a killed run goes on, what a teacher said is kept."""

from __future__ import annotations

import math
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pennyweight import checkpoints, installed, machine
from pennyweight.distillation import cache, generation, trunk
from pennyweight.distillation import train as training
from pennyweight.distillation.config import copied_layers, student_config
from pennyweight.distillation.state import clean
from pennyweight.distillation.train import Lessons, Work, batch_of, train
from pennyweight.distillation.trunk import shared_blocks
from pennyweight.errors import StageError
from pennyweight.quantization import decoder
from pennyweight.recipe import Distill, From, Generate, Prune, Quantize, TeacherCache
from pennyweight.recipe.order import check_order
from pennyweight.records import Checkpoint
from pennyweight.steps import StepContext, distill
from pennyweight.store import Store

VOCABULARY = 24


def checkpoint(folder: Path, layers: int, width: int = 32, seed: int = 0, **changes: Any) -> Checkpoint:
    """A random Llama in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {"tie_word_embeddings": True, "initializer_range": 0.1, "vocab_size": VOCABULARY, **changes}
    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, **settings,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return checkpoints.describe(folder, "test")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Four layers that add nothing: the next token hangs on the last one alone, so that its entropy is known."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("teacher")
    checkpoint(folder, layers=4, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for block in model.model.layers:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    model.lm_head.weight.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return checkpoints.describe(folder, "teacher")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(tmp_path_factory.mktemp("student"), layers=2, seed=1)


def table(teacher: Checkpoint) -> torch.Tensor:
    """log p(next | last), (last, next)."""
    model = decoder.load(teacher, "cpu")
    return torch.log_softmax(model(torch.arange(VOCABULARY)[:, None]).logits[:, 0].float(), -1)


def spoken(teacher: Checkpoint, windows: int, length: int) -> np.ndarray:
    """Text in the teacher's language."""
    probable, generator = table(teacher).exp(), torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, VOCABULARY, (windows,), generator=generator)]
    while len(tokens) < length:
        tokens.append(torch.multinomial(probable[tokens[-1]], 1, generator=generator)[:, 0])
    return torch.stack(tokens, 1).numpy()


def settings(**changes: Any) -> Distill:
    usual = {"text": "any", "steps": 6, "batch": 4, "length": 16, "held_out": 4, "check_every": 2}
    return Distill(**{**usual, "learning_rate": 0.01, **changes})


def work(teacher: Checkpoint, student: Checkpoint, step: Distill, folder: Path) -> Work:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "windows.npy", spoken(teacher, step.calibrate.samples, step.length))
    return Work(teacher, student.path, "float32", str(folder / "windows.npy"), step, "cpu", str(folder))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "text alone"])
def test_two_layers_learn_a_language_to_its_entropy(
    teacher: Checkpoint, student: Checkpoint, tmp_path: Path, kind: Any
) -> None:
    from transformers import AutoModelForCausalLM

    how = {"ce": 1.0} if kind == "text alone" else {"loss": kind}
    step = settings(steps=150, batch=16, check_every=50, **how)
    course = train(work(teacher, student, step, tmp_path))
    learnt = AutoModelForCausalLM.from_pretrained(tmp_path / f"best-{course.kept:08d}")
    held = torch.from_numpy(spoken(teacher, 64, 16))
    with torch.no_grad():
        found = torch.log_softmax(learnt(held).logits, -1)
    said = table(teacher)[held]
    entropy = -(said.exp() * said).sum(-1).mean().item()
    cross_entropy = -(said.exp() * found).sum(-1).mean().item()
    assert entropy < math.log(VOCABULARY) - 0.5  # there is something to learn
    assert entropy < cross_entropy < entropy + (0.1 if kind == "text alone" else 0.03)


def killed_in_the_fifth_step(broken: Work) -> list[float]:
    """What it reported until then, to which more can be added."""
    told: list[float] = []

    class Killed(BaseException):
        pass

    def kill(detail: str, done: float) -> None:
        told.append(done)
        if len(told) == 5:
            raise Killed

    with pytest.raises(Killed):
        train(broken, kill)
    return told


def test_killed_training_goes_on_as_if_nothing_had_been(
    teacher: Checkpoint, student: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    step = settings(steps=9, check_every=2, accumulate=2)
    whole = train(work(teacher, student, step, tmp_path / "whole"))
    broken = work(teacher, student, step, tmp_path / "broken")
    told = killed_in_the_fifth_step(broken)
    again = train(broken, lambda detail, done: told.append(done))
    assert len(told) == 5 + 5  # the fifth step came after the last saved state, and is done again
    assert (again.curve, again.losses, again.kept) == (whole.curve, whole.losses, whole.kept)
    assert again.kept == 9
    files = [tmp_path / name / "best-00000009" / "model.safetensors" for name in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_loss_that_is_not_a_number_ends_it_with_the_last_good_state(
    teacher: Checkpoint, student: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 1.0, 1.0, math.nan])
    forward = training.Pupil.forward
    monkeypatch.setattr(training.Pupil, "forward", lambda self, *inputs: forward(self, *inputs) * next(losses))
    course = train(work(teacher, student, settings(), tmp_path))
    assert course.ended_by == "a loss of nan at step 4"
    assert (course.steps, course.kept) == (3, 2)
    weights = checkpoints.read_tensors(tmp_path / "best-00000002")
    assert all(value.isfinite().all() for value in weights.values())


def test_all_weights_learn_tied_ones_once(teacher: Checkpoint, student: Checkpoint, tmp_path: Path) -> None:
    course = train(work(teacher, student, settings(), tmp_path))
    before = checkpoints.read_tensors(Path(student.path))
    after = checkpoints.read_tensors(tmp_path / f"best-{course.kept:08d}")
    assert before.keys() == after.keys()
    assert not [name for name in before if torch.equal(before[name], after[name])]


# --- what a student shares with its teacher --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(tmp_path_factory.mktemp("whole"), layers=5)


@pytest.fixture
def shorter(whole: Checkpoint, tmp_path: Path) -> Checkpoint:
    return without(whole, {2}, tmp_path / "shorter")


def without(whole: Checkpoint, removed: set[int], folder: Path) -> Checkpoint:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(whole.path)
    kept = [block for index, block in enumerate(model.model.layers) if index not in removed]
    model.model.layers, model.config.num_hidden_layers = torch.nn.ModuleList(kept), len(kept)
    model.save_pretrained(folder)
    return checkpoints.describe(folder, "shorter")


def test_blocks_are_shared_up_to_the_first_that_differs(whole: Checkpoint, student: Checkpoint, tmp_path: Path) -> None:
    for removed, shared in (({2}, 2), ({1, 3}, 1), ({0}, 0), ({4}, 3)):
        shorter = without(whole, removed, tmp_path / f"without-{min(removed)}")
        assert shared_blocks(Path(whole.path), Path(shorter.path)) == shared
    assert shared_blocks(Path(whole.path), Path(student.path)) == 0


@pytest.mark.parametrize(("part", "shared"), [("blocks", 0), ("after_cut", 2)])
def test_only_a_part_learns(whole: Checkpoint, shorter: Checkpoint, tmp_path: Path, part: str, shared: int) -> None:
    step, store, files = settings(train=part, learning_rate=0.001), Store(tmp_path / "store"), tmp_path / "files"
    files.mkdir()
    record = distill.run(shorter, step, context(whole, step, store), files)
    assert record.shared_blocks == shared
    assert record.kl_after < record.kl_before
    before, after = (checkpoints.read_tensors(Path(folder)) for folder in (shorter.path, files))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    learn = tuple(f"model.layers.{number}." for number in range(shared, 4))
    assert changed == {name for name in before if name.startswith(learn)}


def test_a_shared_pass_gives_what_two_give(
    whole: Checkpoint, shorter: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "has_native_bf16", lambda: False)  # float32 throughout
    curves, given = [], []
    for name, sharing in (("one", trunk.beginning_with), ("two", lambda *_: nullcontext())):
        monkeypatch.setattr(training, "beginning_with", lambda *what, to=sharing: given.append(what) or to(*what))
        begun = replace(work(whole, shorter, settings(train="after_cut"), tmp_path / name), shared=2)
        curves.append(train(begun).curve)
    assert curves[0] == curves[1]
    assert all(states.shape == (4, 16, 32) and len(blocks) == 2 for states, blocks in given)


def test_killed_training_after_a_cut_goes_on_as_if_nothing_had_been(
    whole: Checkpoint, shorter: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    step = settings(steps=9, check_every=2, train="after_cut")
    works = [replace(work(whole, shorter, step, tmp_path / name), shared=2) for name in ("whole", "broken")]
    killed_in_the_fifth_step(works[1])
    courses = [train(each) for each in works]
    assert courses[0].curve == courses[1].curve and courses[0].kept
    best = [Path(each.workspace) / f"best-{courses[0].kept:08d}" / "model.safetensors" for each in works]
    assert best[0].read_bytes() == best[1].read_bytes()


def test_a_student_without_the_bases_first_block_has_no_cut(whole: Checkpoint, tmp_path: Path) -> None:
    step, shorter = settings(train="after_cut"), without(whole, {0}, tmp_path / "shorter")
    with pytest.raises(StageError, match="first block is none of the base's") as found:
        distill.run(shorter, step, context(whole, step, Store(tmp_path / "store")), tmp_path)
    assert found.value.hint == "remove `train: after_cut`"


def test_batches_take_every_window_once_a_round() -> None:
    first = [batch_of(number, 10, 3) for number in range(3)]
    assert first == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    second = [window for number in range(3, 6) for window in batch_of(number, 10, 3)]
    assert len(set(second)) == 9
    assert second != list(range(9))
    assert [batch_of(number, 10, 3) for number in range(3, 6)] != first


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_what_the_teacher_said_is_read_as_it_was_written(teacher: Checkpoint, tmp_path: Path, kind: Any) -> None:
    kept = TeacherCache(cache=kind, k=5)
    windows = torch.from_numpy(spoken(teacher, 2 * cache.SHARD + 3, 16))
    cache.write(decoder.load(teacher, "cpu"), windows, windows[:4], kept, 1.0, 0, tmp_path)
    chosen = [0, cache.SHARD + 1, 2 * cache.SHARD + 2]
    found = cache.Cached(tmp_path, kept, "cpu").target(chosen)
    said = table(teacher)[windows[chosen]].flatten(0, 1)
    size = sum(path.stat().st_size - 128 for path in tmp_path.glob("shard-*"))  # numpy's header
    assert size == windows.numel() * kept.bytes_per_token(VOCABULARY)
    if kind == "top_k":
        assert torch.equal(found.ids, said.topk(5).indices)
        torch.testing.assert_close(found.log_probabilities[:, :-1], said.topk(5).values, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(found.log_probabilities.exp().sum(-1), torch.ones(len(said)))
        return
    many = cache.Cached(tmp_path, kept, "cpu").target(list(range(len(windows))))
    first = windows.flatten()
    token = first.bincount().argmax()
    known, rows = table(teacher)[token].exp(), first == token
    assert torch.equal(many.ids[rows][0, :2], known.topk(2).indices)
    torch.testing.assert_close(many.weights.sum(-1), torch.ones(len(first)))
    mean = torch.zeros(VOCABULARY).index_add(0, many.ids[rows].flatten(), many.weights[rows].flatten()) / rows.sum()
    torch.testing.assert_close(mean[known.topk(2).indices], known.topk(2).values, rtol=5e-3, atol=0)
    error = 4 * (known / (3 * rows.sum())).sqrt()
    assert ((mean - known).abs() < error + 1e-3).all()


def test_large_vocabularies_take_four_bytes_a_number() -> None:
    assert TeacherCache(cache="top_k", k=32).bytes_per_token(49152) == 32 * 2 + 33 * 2
    assert TeacherCache(cache="top_k", k=32).bytes_per_token(128256) == 32 * 4 + 34 * 2
    assert TeacherCache(cache="sampled", k=32).bytes_per_token(49152) == 32 * 2 + 17 * 2


def test_a_cache_goes_on_after_its_last_whole_shard(teacher: Checkpoint, tmp_path: Path) -> None:
    kept = TeacherCache(cache="sampled", k=3)
    windows, model = torch.from_numpy(spoken(teacher, 3 * cache.SHARD, 16)), decoder.load(teacher, "cpu")
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    cache.write(model, windows, windows[:4], kept, 1.0, 0, tmp_path / "whole")
    told: list[float] = []

    def full_disk(detail: str, done: float) -> None:
        told.append(done)
        if len(told) == 3:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        cache.write(model, windows, windows[:4], kept, 1.0, 0, tmp_path / "broken", full_disk)
    first = tmp_path / "broken" / "shard-000000.npy"
    written = first.stat().st_mtime_ns
    cache.write(model, windows, windows[:4], kept, 1.0, 0, tmp_path / "broken")
    assert first.stat().st_mtime_ns == written
    for path in (tmp_path / "whole").glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "broken" / path.name).read_bytes()


def test_a_cached_teacher_teaches_as_the_live_one(teacher: Checkpoint, student: Checkpoint, tmp_path: Path) -> None:
    live = settings(steps=40, check_every=40)
    kept = TeacherCache(cache="top_k", k=VOCABULARY - 1)
    cached = live.model_copy(update={"teacher": kept})
    begun = work(teacher, student, cached, tmp_path / "cached")
    windows = torch.from_numpy(np.load(begun.windows))
    folder = tmp_path / "said"
    folder.mkdir()
    cache.write(decoder.load(teacher, "cpu"), windows[4:], windows[:4], kept, 1.0, 0, folder)
    said = train(replace(begun, cache=str(folder)))
    heard = train(work(teacher, student, live, tmp_path / "live"))
    assert said.best == pytest.approx(heard.best, rel=0.02)
    assert said.curve[0] == pytest.approx(heard.curve[0])


# --- the step ---------------------------------------------------------------------------------------------------------


def context(base: Checkpoint, step: Distill, store: Store) -> StepContext:
    windows = spoken(base, step.calibrate.samples, step.length)
    return StepContext("cpu", 0, windows, base, teacher=base, store=store, key="a" * 64)


def test_a_record_has_those_of_the_steps_before_it(teacher: Checkpoint, student: Checkpoint, tmp_path: Path) -> None:
    step, store = settings(), Store(tmp_path / "store")
    first, _ = made(student, context(teacher, step, store), step, tmp_path / "first")
    taught = checkpoints.describe(tmp_path / "first", "test").model_copy(update={"distillation": first})
    second, _ = made(taught, context(teacher, step, store), step, tmp_path / "second")
    assert second.all == [first, second] and first.all == [first]
    assert second.kl_before == pytest.approx(first.kl_after)


def test_a_drawn_student_is_a_checkpoint_of_fewer_layers(teacher: Checkpoint, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    step, store = settings(student={"layers": 2}), Store(tmp_path / "store")
    files = tmp_path / "files"
    files.mkdir()
    record = distill.run(teacher, step, context(teacher, step, store), files)
    model = AutoModelForCausalLM.from_pretrained(files)
    assert model.config.num_hidden_layers == len(model.model.layers) == 2
    assert record.kl_before < 1e-4  # the layers left out added nothing
    assert record.steps == 6
    assert record.tokens == 6 * 4 * 16
    assert not list((store.root / "work").iterdir())
    assert checkpoints.describe(files, "made").dtype == "float32"


def test_variants_share_what_the_teacher_said(teacher: Checkpoint, student: Checkpoint, tmp_path: Path) -> None:
    store, reused = Store(tmp_path / "store"), []
    for rate in (0.01, 0.02):
        step = settings(teacher={"cache": "top_k", "k": 4}, learning_rate=rate)
        files = tmp_path / str(rate)
        files.mkdir()
        record = distill.run(student, step, context(teacher, step, store), files)
        reused.append(record.cache_reused)
        assert record.cache_bytes_per_token == 4 * 2 + 5 * 2
    assert reused == [False, True]
    assert len(list((store.root / "teacher").iterdir())) == 1


def test_another_vocabulary_is_refused(teacher: Checkpoint, tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", layers=2, vocab_size=VOCABULARY + 1)
    step, store = settings(), Store(tmp_path / "store")
    with pytest.raises(StageError, match="25 tokens, the teacher 24"):
        distill.run(other, step, context(teacher, step, store), tmp_path)


def test_a_training_that_failed_at_once_is_an_error(
    teacher: Checkpoint, student: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = training.Pupil.forward
    monkeypatch.setattr(training.Pupil, "forward", lambda self, *inputs: forward(self, *inputs) * math.nan)
    step, store = settings(), Store(tmp_path / "store")
    with pytest.raises(StageError, match="a loss of nan at step 1"):
        distill.run(student, step, context(teacher, step, store), tmp_path)


# --- what a kill or a bad disk leaves --------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killed_at(step: int) -> Any:
    told: list[float] = []

    def report(detail: str, done: float) -> None:
        told.append(done)
        if len(told) == step:
            raise Killed

    return report


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {"cut": content[:middle], "empty": b"", "flipped": content[:middle] + b"\xa5" * 64 + content[middle + 64 :]}[
            how
        ]
    )


def made(student: Checkpoint, context: StepContext, step: Distill, files: Path) -> tuple[Any, bytes]:
    files.mkdir()
    record = distill.run(student, step, context, files)
    return record, (files / "model.safetensors").read_bytes()


@pytest.mark.parametrize("how", ["untouched", "cut", "empty", "flipped", "without its best"])
def test_a_damaged_state_is_begun_again(
    teacher: Checkpoint, student: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    step, store, said = settings(steps=9), Store(tmp_path / "store"), []
    usual = context(teacher, step, store)
    whole, weights = made(student, usual, step, tmp_path / "whole")
    with pytest.raises(Killed):
        made(student, replace(usual, report=killed_at(7)), step, tmp_path / "killed")
    (state,) = (store.root / "work").glob("distill-*/state-*.pt")
    assert state.name == "state-00000006.pt"
    if how == "without its best":
        (best,) = state.parent.glob("best-*")
        best.rename(state.parent / "elsewhere")
    elif how != "untouched":
        damaged(state, how)
    told: list[float] = []
    goes_on = replace(usual, say=said.append, report=lambda detail, done: told.append(done))
    again, same = made(student, goes_on, step, tmp_path / "again")
    assert same == weights
    assert (again.curve, again.losses, again.kept_step) == (whole.curve, whole.losses, whole.kept_step)
    assert len(told) == (3 if how == "untouched" else 9)
    assert [("state-00000006.pt" in line and "begins again" in line) for line in said] == [True] * (how != "untouched")


def test_of_two_states_the_whole_one_is_gone_on_from(
    teacher: Checkpoint, student: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    with pytest.raises(Killed):
        train(work(teacher, student, settings(steps=9), tmp_path), killed_at(7))
    (state,) = tmp_path.glob("state-*.pt")
    (tmp_path / "state-00000004.pt").write_bytes(b"")
    (tmp_path / "state-00000008.pt").write_bytes(state.read_bytes()[:100])
    assert (clean(tmp_path) or "").endswith("state-00000008.pt is damaged: it goes on from another one")
    assert list(tmp_path.glob("state-*.pt")) == [state]
    assert clean(tmp_path) is None


def test_a_kill_before_the_result_is_in_the_store_loses_nothing(
    teacher: Checkpoint, student: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    step, store = settings(steps=4), Store(tmp_path / "store")
    usual = context(teacher, step, store)
    _, weights = made(student, usual, step, tmp_path / "whole")

    def kill(**values: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(distill, "Distillation", kill)
        made(student, usual, step, tmp_path / "killed")
    told: list[float] = []
    again = replace(usual, report=lambda detail, done: told.append(done))
    assert made(student, again, step, tmp_path / "again")[1] == weights
    assert len(told) == 2  # from the state at step 2


def test_of_the_best_states_those_that_may_be_needed_stay(
    teacher: Checkpoint, student: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(1, 10))
    monkeypatch.setattr(training.Training, "_agreed", lambda self, _: next(seconds))
    monkeypatch.setattr(training, "SAVE_SECONDS", 4.0)
    step = settings(steps=9, check_every=1, patience=9, learning_rate=0.003)
    course = train(work(teacher, student, step, tmp_path))
    assert course.kept == 9  # each look was the best yet
    (state,) = tmp_path.glob("state-*.pt")
    assert state.name == "state-00000008.pt"
    assert sorted(path.name for path in tmp_path.glob("best-*")) == ["best-00000008", "best-00000009"]


@pytest.mark.parametrize("how", ["cut", "empty"])
def test_a_damaged_shard_is_written_again(teacher: Checkpoint, tmp_path: Path, how: str) -> None:
    kept = TeacherCache(cache="sampled", k=4)
    windows, model = torch.from_numpy(spoken(teacher, 2 * cache.SHARD, 16)), decoder.load(teacher, "cpu")
    cache.write(model, windows, windows[:4], kept, 1.0, 0, tmp_path)
    whole = {path: path.read_bytes() for path in tmp_path.glob("*.npy")}
    for path in whole:
        if path.name != "shard-000001.npy":
            damaged(path, how)
    cache.write(model, windows, windows[:4], kept, 1.0, 0, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.npy")} == whole


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_cache_in_the_store_is_asked_for_again(
    teacher: Checkpoint, student: Checkpoint, tmp_path: Path, how: str
) -> None:
    step, store, said = settings(teacher={"cache": "top_k", "k": 4}), Store(tmp_path / "store"), []
    usual = replace(context(teacher, step, store), say=said.append)
    _, weights = made(student, usual, step, tmp_path / "first")
    (shard,) = (store.root / "teacher").glob("*/files/shard-*.npy")
    damaged(shard, how)
    record, again = made(student, usual, step, tmp_path / "second")
    assert again == weights
    assert not record.cache_reused
    assert ["it is asked again" in line for line in said] == [True]


def test_weights_that_are_not_numbers_are_refused(teacher: Checkpoint, student: Checkpoint, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "student"
    shutil.copytree(student.path, folder)
    tensors = checkpoints.read_tensors(folder)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    step, store = settings(), Store(tmp_path / "store")
    with pytest.raises(StageError, match="a held-out KL of nan at step 0, with the weights that it was given"):
        distill.run(checkpoints.describe(folder, "x"), step, context(teacher, step, store), tmp_path)


def test_a_student_that_nothing_made_better_stays_as_it_was(
    teacher: Checkpoint, student: Checkpoint, tmp_path: Path
) -> None:
    step, store, said = (
        settings(steps=20, check_every=1, patience=3, learning_rate=0.9, warm_up=0.0),
        Store(tmp_path),
        [],
    )
    record, _ = made(student, replace(context(teacher, step, store), say=said.append), step, tmp_path / "files")
    assert (record.kept_step, record.ended_by) == (0, "patience")
    assert record.kl_after == record.kl_before
    before, after = (checkpoints.read_tensors(folder) for folder in (Path(student.path), tmp_path / "files"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert ["nothing was better than the weights that it began with" in line for line in said] == [True]


def test_weights_that_stop_being_numbers_are_not_kept(
    teacher: Checkpoint, student: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([2.0, 1.5, math.nan])
    monkeypatch.setattr(training.Loop, "_held_out_kl", lambda self: next(found))
    course = train(work(teacher, student, settings(steps=20), tmp_path))
    assert course.ended_by == "a held-out KL of nan at step 4"
    assert (course.kept, course.curve) == (2, [(0, 2.0), (2, 1.5)])


# --- settings ---------------------------------------------------------------------------------------------------------


def test_layers_are_drawn_evenly_with_both_ends() -> None:
    assert copied_layers(30, 4) == [0, 10, 19, 29]
    assert copied_layers(5, 2) == [0, 4]
    with pytest.raises(ValueError, match="no smaller"):
        copied_layers(4, 4)


def test_what_a_config_says_of_each_layer_is_drawn_with_it() -> None:
    config = {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"], "max_window_layers": 2, "other": [1]}
    drawn = student_config(config, settings(student={"layers": 3}))
    assert drawn == {"num_hidden_layers": 3, "layer_types": ["a", "c", "d"], "max_window_layers": 1, "other": [1]}
    assert config["num_hidden_layers"] == 4
    nested = student_config({"text_config": {"num_hidden_layers": 4}}, settings(student={"layers": 2}))
    assert nested == {"text_config": {"num_hidden_layers": 2}}
    assert student_config(config, settings()) == config


def test_budgets_and_contradictions() -> None:
    assert Distill(text="x").limits == {"steps": 100}
    assert Distill(text="x", tokens=5000, batch=2, accumulate=3, length=100).most_steps == 9
    assert Distill(text="x", steps=3, batch=2, accumulate=3, held_out=5).calibrate.samples == 5 + 18
    sampled = {"cache": "sampled"}
    for wrong, words in [
        ({"beta": 0.3}, "needs loss: jsd"),
        ({"ce": 1.0, "temperature": 2.0}, "nothing is asked"),
        ({"teacher": sampled, "loss": "jsd"}, "forward KL alone"),
        ({"teacher": sampled, "hidden": 1.0}, "no hidden states"),
        ({"processes": 3}, "evenly"),
    ]:
        with pytest.raises(ValueError, match=words):
            Distill(text="x", **wrong)


def test_a_course_reads_as_it_was_written() -> None:
    import json
    from dataclasses import asdict

    course = Lessons(steps=3, curve=[(0, 1.5), (3, 0.5)], losses=[(3, 0.75)], since=[0.5], kept=3)
    assert Lessons.load(json.loads(json.dumps(asdict(course)))) == course


def test_answers_alone_are_learnt(teacher: Checkpoint, student: Checkpoint, tmp_path: Path) -> None:
    """What a token's logits learn hangs on whether the next one is an answer's."""
    step = settings(steps=1, accumulate=2, check_every=1)
    begun = work(teacher, student, step, tmp_path)
    answers = np.zeros(np.load(begun.windows).shape, dtype=bool)
    answers[:, 5:8] = True
    np.save(tmp_path / "answers.npy", answers)
    course = train(replace(begun, answers=str(tmp_path / "answers.npy")))
    models = [decoder.load(each, "cpu") for each in (teacher, student)]
    windows = torch.from_numpy(np.load(begun.windows))[:, :]
    p, q = (torch.log_softmax(model(windows).logits, -1)[:, 4:7] for model in models)
    divergence = (p.exp() * (p - q)).sum(-1)
    assert course.curve[0][1] == pytest.approx(divergence[:4].mean().item(), rel=1e-4)
    assert course.losses[0][1] == pytest.approx(divergence[4:].mean().item(), rel=5e-3)  # products in bfloat16


def test_a_teacher_writes_in_its_own_language_from_where_the_text_began(teacher: Checkpoint, tmp_path: Path) -> None:
    windows = torch.from_numpy(spoken(teacher, 2 * generation.SHARD + 1, 48))
    settings_, model = Generate(prompt=8), decoder.load(teacher, "cpu")
    generation.write(model, windows, settings_, 0, tmp_path)
    written = torch.from_numpy(generation.read(tmp_path))
    assert written.shape == windows.shape
    assert torch.equal(written[:, :8], windows[:, :8])
    assert not torch.equal(written[:, 8:], windows[:, 8:])
    said = table(teacher)
    surprise = -said[written[:, 7:-1], written[:, 8:]]
    entropy = -(said.exp() * said).sum(-1)[written[:, 7:-1]]
    error = surprise.std().item() / surprise.numel() ** 0.5
    assert surprise.mean().item() == pytest.approx(entropy.mean().item(), abs=4 * error)
    again = (tmp_path / "shard-000001.npy").read_bytes()
    (tmp_path / "shard-000001.npy").unlink()
    generation.write(model, windows, settings_, 0, tmp_path)
    assert (tmp_path / "shard-000001.npy").read_bytes() == again


def test_a_student_learns_from_what_its_teacher_wrote(teacher: Checkpoint, student: Checkpoint, tmp_path: Path) -> None:
    step, store = settings(generate={"prompt": 4}, teacher={"cache": "top_k", "k": 6}), Store(tmp_path / "store")
    (tmp_path / "files").mkdir()
    record = distill.run(student, step, context(teacher, step, store), tmp_path / "files")
    assert record.kl_after < record.kl_before
    assert {stage for stage, *_ in store.results()} == {"generated", "teacher"}


def test_a_drawn_student_comes_first() -> None:
    drawn = settings(student={"layers": 2})
    assert check_order([drawn, settings()])
    assert check_order([settings(ce=0.5)])
    with pytest.raises(ValueError, match="step 1 of 1, distill, has nothing to learn"):
        check_order([settings()])
    with pytest.raises(ValueError, match="step 2 of 2, distill, draws its student from the base"):
        check_order([settings(ce=0.5), drawn])
    with pytest.raises(ValueError, match="step 2 of 2, distill, changes floating-point weights"):
        check_order([Quantize(scheme="w8a16"), settings()])


def test_after_a_cut_first_blocks_must_be_the_bases() -> None:
    cut, after = Prune(drop=[2]), settings(train="after_cut")
    assert check_order([cut, after, after])
    with pytest.raises(ValueError, match="and `from` starts from another model: leave `train` out"):
        check_order([From(base="small"), cut, after])
    with pytest.raises(ValueError, match="and the prune before it makes all of them narrower"):
        check_order([Prune(ffn=0.5, text="any"), after])
    with pytest.raises(ValueError, match="and the distill before it trains all of them: leave `train` out"):
        check_order([cut, settings(), after])
    with pytest.raises(ValueError, match="and the distill before it trains all of them: leave `train` out"):
        check_order([cut, settings(train="blocks"), after])


def test_the_windows_drawn_last_come_first() -> None:
    drawn = np.arange(6)[:, None].repeat(16, 1)
    found = distill._last_first(StepContext("cpu", 0, calibration=drawn, answers=drawn > 2))
    assert found.calibration[:, 0].tolist() == [5, 4, 3, 2, 1, 0]
    assert found.answers[:, 0].tolist() == [True, True, True, False, False, False]


# --- on policy --------------------------------------------------------------------------------------------------------


def writing(**changes: Any) -> Distill:
    return settings(**{"on_policy": {"prompt": 4}, "batch": 8, **changes})


@pytest.fixture
def on_policy() -> Any:
    pytest.importorskip("trl")
    from pennyweight.distillation import on_policy

    return on_policy


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A student that has a tokenizer, so that it knows how a text ends."""
    folder = tmp_path_factory.mktemp("writer")
    add_tokenizer(folder)
    return checkpoint(folder, layers=2, seed=1, eos_token_id=2)


def add_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(folder)


def test_what_comes_before_a_cut_stays_while_a_student_writes(
    whole: Checkpoint, shorter: Checkpoint, tmp_path: Path, on_policy: Any
) -> None:
    add_tokenizer(Path(shorter.path))
    course = train(replace(work(whole, shorter, writing(train="after_cut"), tmp_path / "work"), shared=2))
    before = checkpoints.read_tensors(Path(shorter.path))
    after = checkpoints.read_tensors(tmp_path / "work" / f"best-{course.kept:08d}")
    changed = {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert course.kept and changed == {"2", "3"}


def heard(on_policy: Any, patch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """What is learnt on, batch by batch, as it comes."""
    found: list[dict[str, torch.Tensor]] = []
    learn = on_policy._Trainer.compute_loss

    def spy(self: Any, model: Any, inputs: Any, **more: Any) -> torch.Tensor:
        found.append(inputs)
        return learn(self, model, inputs, **more)

    patch.setattr(on_policy._Trainer, "compute_loss", spy)
    return found


def divergences(p: torch.Tensor, q: torch.Tensor, kind: str) -> torch.Tensor:
    """From log-probabilities of the teacher and the student, (positions, vocabulary)."""
    if kind == "jsd":
        mixed = (0.3 * p.exp() + 0.7 * q.exp()).log()
        return (0.3 * p.exp() * (p - mixed) + 0.7 * q.exp() * (q - mixed)).sum(-1)
    return (p.exp() * (p - q)).sum(-1) if kind == "forward_kl" else (q.exp() * (q - p)).sum(-1)


@pytest.mark.parametrize(("kind", "heat"), [("forward_kl", 1.0), ("reverse_kl", 2.0), ("jsd", 1.0)])
def test_what_a_student_wrote_itself_is_judged_at_each_of_its_tokens(
    teacher: Checkpoint, writer: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_policy: Any,
    kind: Any, heat: float,
) -> None:  # fmt: skip
    batches = heard(on_policy, monkeypatch)
    how = {"beta": 0.3} if kind == "jsd" else {}
    step = writing(steps=1, accumulate=2, batch=32, check_every=1, loss=kind, temperature=heat, **how)
    begun = work(teacher, writer, step, tmp_path)
    course = train(begun)
    prompts, said, real = (
        torch.cat([torch.nn.functional.pad(batch[name], (0, 12 - batch[name].shape[1])) for batch in batches])
        for name in ("prompt_ids", "completion_ids", "completion_mask")
    )
    prompts = prompts[:, :4]
    text = torch.from_numpy(np.load(begun.windows))[4:, :4]
    assert sorted(prompts.tolist()) == sorted(text.tolist())
    real = real.bool()
    assert course.tokens == real.sum()
    ended = real.sum(-1) < 12
    assert ended.any()
    assert (said[ended, real.sum(-1)[ended] - 1] == 2).all()
    with torch.no_grad():
        models = [decoder.load(each, "cpu") for each in (teacher, writer)]
        logits = [model(torch.cat([prompts, said], 1)).logits[:, 3:-1][real] for model in models]
    p, q = (torch.log_softmax(each, -1) for each in logits)
    # It is the student's own: as surprising to it as it must be, and foreign to the teacher.
    error = 4 * math.log(VOCABULARY) / real.sum().item() ** 0.5
    surprise = [-each.gather(-1, said[real][:, None]).mean().item() for each in (p, q)]
    entropy = [-(each.exp() * each).sum(-1).mean().item() for each in (p, q)]
    assert surprise[1] == pytest.approx(entropy[1], abs=error)
    assert surprise[0] > entropy[0] + error
    expected = heat**2 * divergences(*(torch.log_softmax(each / heat, -1) for each in logits), kind).mean()
    assert course.losses[0][1] == pytest.approx(expected.item(), rel=5e-3)  # products in bfloat16


def test_a_student_that_writes_comes_close_to_its_teacher(
    teacher: Checkpoint, writer: Checkpoint, tmp_path: Path, on_policy: Any
) -> None:
    told: list[tuple[int, set[str]]] = []
    step = writing(steps=60, batch=16, check_every=20, loss="reverse_kl")
    course = train(work(teacher, writer, step, tmp_path), measure=lambda step, values: told.append((step, set(values))))
    assert course.best < 0.2 * course.curve[0][1]
    assert [at for at, _ in course.curve] == [0, 20, 40, 60]
    assert told == [(0, {"held_out_kl"})] + [(at, {"held_out_kl", "training_loss"}) for at in (20, 40, 60)]
    assert course.ended_by == "steps"
    assert (tmp_path / f"best-{course.kept:08d}" / "model.safetensors").exists()


def test_a_seed_decides_what_the_student_writes(
    teacher: Checkpoint, writer: Checkpoint, tmp_path: Path, on_policy: Any
) -> None:
    losses = []
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        begun = replace(work(teacher, writer, writing(steps=4), tmp_path / name), seed=seed)
        torch.rand(seed)
        losses.append(train(begun).losses)
    assert losses[0] == losses[1] != losses[2]


def test_a_killed_student_goes_on_writing_as_if_nothing_had_been(
    teacher: Checkpoint, writer: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_policy: Any
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    step = writing(steps=9, windows=12, accumulate=2, batch=4, check_every=2)
    whole = train(work(teacher, writer, step, tmp_path / "whole"))
    broken = work(teacher, writer, step, tmp_path / "broken")
    told = killed_in_the_fifth_step(broken)
    cut_off = tmp_path / "broken" / "trl" / "checkpoint-6" / "trainer_state.json"
    cut_off.parent.mkdir()
    cut_off.write_text("{")
    again = train(broken, lambda detail, done: told.append(done))
    assert len(told) == 5 + 5
    assert (again.curve, again.losses, again.kept) == (whole.curve, whole.losses, whole.kept)
    assert again.tokens == whole.tokens
    files = [tmp_path / name / f"best-{whole.kept:08d}" / "model.safetensors" for name in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("what", ["model.safetensors", "optimizer.pt", "trainer_state.json", "its best"])
def test_a_damaged_state_of_a_student_that_writes_is_begun_again(
    teacher: Checkpoint, writer: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_policy: Any, what: str
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    step, store, said = writing(), Store(tmp_path / "store"), []
    usual = context(teacher, step, store)
    _, weights = made(writer, usual, step, tmp_path / "whole")
    with pytest.raises(Killed):
        made(writer, replace(usual, report=killed_at(5)), step, tmp_path / "killed")
    (state,) = (store.root / "work").glob("distill-*/trl/checkpoint-*")
    if what == "its best":
        for best in state.parent.parent.glob("best-*"):
            shutil.rmtree(best)
    else:
        damaged(state / what, "cut")
    told: list[float] = []
    again = replace(usual, say=said.append, report=lambda detail, done: told.append(done))
    assert made(writer, again, step, tmp_path / "again")[1] == weights
    assert len(told) == 6
    assert ["checkpoint-4" in line and "begins again" in line for line in said] == [True]


def test_a_writer_whose_loss_is_not_a_number_keeps_its_last_good_state(
    teacher: Checkpoint, writer: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_policy: Any
) -> None:
    losses, learn = iter([1.0, 1.0, 1.0, math.nan]), on_policy._Trainer.compute_loss
    spoilt = lambda self, *inputs, **more: learn(self, *inputs, **more) * next(losses)  # noqa: E731
    monkeypatch.setattr(on_policy._Trainer, "compute_loss", spoilt)
    course = train(work(teacher, writer, writing(), tmp_path))
    assert course.ended_by == "a loss of nan at step 4"
    assert (course.steps, course.kept) == (3, 2)
    weights = checkpoints.read_tensors(tmp_path / "best-00000002")
    assert all(value.isfinite().all() for value in weights.values())


def test_minutes_end_what_a_student_writes(
    teacher: Checkpoint, writer: Checkpoint, tmp_path: Path, on_policy: Any
) -> None:
    course = train(work(teacher, writer, writing(steps=None, minutes=0.001, windows=8), tmp_path))
    assert course.ended_by == "minutes"
    assert course.steps >= 1


def test_a_step_leaves_what_the_student_became(
    teacher: Checkpoint, writer: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_policy: Any
) -> None:
    from trl.trainer import base_trainer

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda *said, **more: pytest.fail("TRL told somebody"))
    step, store = writing(learning_rate=0.003), Store(tmp_path / "store")
    (tmp_path / "files").mkdir()
    record = distill.run(writer, step, context(teacher, step, store), tmp_path / "files")
    assert record.kl_after < record.kl_before
    assert record.steps == 6
    assert 6 * 8 < record.tokens < 6 * 8 * 12
    made = checkpoints.read_tensors(tmp_path / "files")
    assert made.keys() == checkpoints.read_tensors(Path(writer.path)).keys()
    assert (tmp_path / "files" / "config.json").read_text() == (Path(writer.path) / "config.json").read_text()
    assert not list((store.root / "work").iterdir())


def test_a_student_without_an_end_of_text_cannot_write(
    teacher: Checkpoint, student: Checkpoint, tmp_path: Path, on_policy: Any
) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "mute"
    mute = checkpoint(folder, layers=2)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    with pytest.raises(StageError, match="no token that ends a text"):
        train(work(teacher, mute, writing(), tmp_path / "work"))


def test_a_student_goes_on_from_where_windows_or_answers_begin(on_policy: Any) -> None:
    windows = np.arange(20).reshape(2, 10)
    assert on_policy.prompts_of(windows, None, 3) == [[0, 1, 2], [10, 11, 12]]
    answers = np.zeros((2, 10), dtype=bool)
    answers[0, [0, 1, 5, 6, 8]] = True  # the first began before the window
    answers[1, 2:] = True
    assert on_policy.prompts_of(windows, answers, 3) == [[2, 3, 4], [5, 6, 7], [10, 11]]


def test_a_student_answers_where_answers_are_learnt(
    teacher: Checkpoint, writer: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_policy: Any
) -> None:
    batches = heard(on_policy, monkeypatch)
    begun = work(teacher, writer, writing(steps=1, answers=True), tmp_path)
    answers = np.zeros(np.load(begun.windows).shape, dtype=bool)
    np.save(tmp_path / "answers.npy", answers)
    with pytest.raises(StageError, match="no answer begins in any window"):
        train(replace(begun, answers=str(tmp_path / "answers.npy")))
    answers[:, 7:] = True
    np.save(tmp_path / "answers.npy", answers)
    train(replace(begun, answers=str(tmp_path / "answers.npy")))
    (batch,) = batches
    assert sorted(batch["prompt_ids"].tolist()) == sorted(np.load(begun.windows)[4:, 3:7].tolist())


def test_what_a_writing_student_cannot_have() -> None:
    for wrong, words in [
        ({"teacher": {"cache": "top_k"}}, "remove `teacher`"),
        ({"generate": {"prompt": 4}}, "the student writes, not the teacher"),
        ({"ce": 0.5}, "judged, not imitated"),
        ({"hidden": 1.0}, "predictions alone"),
        ({"tokens": 1000}, "how much the student will write"),
        ({"processes": 2}, "one process"),
        ({"length": 16, "on_policy": {"prompt": 16}}, "leaves nothing of windows of 16"),
    ]:
        with pytest.raises(ValueError, match=words):
            Distill(**{"text": "x", "on_policy": {}, **wrong})
    assert Distill(text="x", on_policy={}, answers=True, loss="jsd", beta=0.1, temperature=2.0).maker == "trl"


def test_a_step_whose_trainer_is_missing_says_what_to_install(
    teacher: Checkpoint, student: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "installed_version", lambda package: None)
    step = writing()
    with pytest.raises(StageError, match=r"trl is not installed[^|]*pennyweight\[trl\]"):
        distill.run(student, step, context(teacher, step, Store(tmp_path / "store")), tmp_path)
