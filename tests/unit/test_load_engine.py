"""A model in this process as a target: waves, the thread that serves them, what fits, and what a target names."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pennyweight import installed, tracking
from pennyweight.cli import main
from pennyweight.errors import SourceError, StageError, UsageError
from pennyweight.load import bench, models
from pennyweight.load.bench import Load, Settings
from pennyweight.load.command import Options, prepare
from pennyweight.load.driver import Course, Until, closed_loop
from pennyweight.load.engine import Engine
from pennyweight.load.models import Demand
from pennyweight.load.requests import Asked
from pennyweight.load.show import format_bench
from pennyweight.load.workload import Prompts, parse_shape
from pennyweight.records import Candidate, CandidateResult, Checkpoint, RecipeRef, RunRecord, Verdict
from pennyweight.runtimes import Limits
from pennyweight.runtimes.waves import Waves
from pennyweight.store import Store
from pennyweight.tracking.evidence import EVIDENCE

END = 7


class Counting(Waves):
    """Tokens count up from the sum of a prompt, so that every answer is known. `fails` are waves that raise."""

    def __init__(self, context: int | None = 64, fails: tuple[int, ...] = (), shortest: int | None = None) -> None:
        super().__init__()
        self.context, self.fails, self.shortest = context, fails, shortest
        self.waves: list[tuple[int, int, int]] = []
        self.closed = False

    def columns(self, ids: np.ndarray, new_tokens: int, stop: bool) -> Iterator[np.ndarray]:
        self.waves.append((*ids.shape, new_tokens))
        for index in range(new_tokens if self.shortest is None else self.shortest):
            if len(self.waves) in self.fails and index == 1:
                raise RuntimeError("out of memory")
            yield ids.sum(1) + index

    def ends(self) -> list[int]:
        return [END]

    def close(self) -> None:
        self.closed = True


def answer(ids: np.ndarray, tokens: int) -> list[int]:
    return [int(ids.sum()) + index for index in range(tokens)]


def drain(session: Waves, requests: int) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    while requests:
        for progress in session.step():
            found.setdefault(progress.request, []).extend(progress.tokens)
            requests -= progress.finished
    return found


# --- waves ------------------------------------------------------------------------------------------------------------


def test_requests_of_one_length_share_a_wave_and_end_with_their_own_last_token() -> None:
    session = Counting()
    prompts = [np.arange(1, length + 1) for length in (3, 5, 3, 5, 3)]
    numbers = [session.submit(ids, tokens) for ids, tokens in zip(prompts, (2, 4, 6, 1, 3))]
    first = [session.step() for _ in range(3)]
    assert [{p.request for p in step} for step in first] == [{0, 2, 4}, {0, 2, 4}, {2, 4}]
    assert [[p.request for p in step if p.finished] for step in first] == [[], [0], [4]]
    assert [step[0].at for step in first] == sorted(step[0].at for step in first)
    rest = drain(session, 3)
    assert rest[numbers[1]] == answer(prompts[1], 4)
    assert rest[numbers[3]] == answer(prompts[3], 1)
    assert rest[numbers[2]] == answer(prompts[2], 6)[3:]
    assert session.waves == [(3, 3, 6), (2, 5, 4)]


def test_a_wave_has_no_more_requests_than_it_may() -> None:
    session = Counting()
    session.at_once = 2
    for _ in range(5):
        session.submit(np.ones(4, np.int64), 2)
    drain(session, 5)
    assert [requests for requests, _, _ in session.waves] == [2, 2, 1]


def test_a_request_that_may_stop_ends_with_the_end_token() -> None:
    session = Counting()
    ids = np.array([2, 3])
    session.submit(ids, 9, stop=True)
    session.submit(ids, 9)
    assert drain(session, 2) == {0: [5, 6, END], 1: answer(ids, 9)}
    generation = session.generate(np.array([[2, 3], [1, 2]]), 9, stop=True)
    assert generation.tokens.tolist() == [[5, 6, 7, 8, 9], [3, 4, 5, 6, END]]
    assert len(generation.steps) == 4


def test_what_is_cancelled_is_forgotten() -> None:
    session = Counting()
    for _ in range(2):
        session.submit(np.ones(4, np.int64), 5)
    session.step()
    session.submit(np.ones(3, np.int64), 5)
    session.cancel()
    number = session.submit(np.ones(2, np.int64), 1)
    assert drain(session, 1) == {number: [2]}


# --- the engine -------------------------------------------------------------------------------------------------------


def engine(session: Waves, **settings: bool) -> Engine:
    return Engine("here", "counting", "transformers", "waves", session, 1000, **settings)


def asked(length: int, tokens: int) -> Asked:
    return Asked("", length, tokens, ids=tuple(range(1, length + 1)))


def serve(session: Waves, requests: list[Asked], users: int, **settings: bool) -> Course:
    async def load() -> Course:
        async with engine(session, **settings).connect() as target:
            return await closed_loop(target, iter(requests), users, Until(requests=len(requests)), lambda _: None)

    course = asyncio.run(load())
    assert not any(thread.name == "engine" for thread in threading.enumerate())
    return course


def test_a_closed_loop_of_three_users_counts_every_token() -> None:
    requests = [asked(3 + number % 4, 1 + 2 * number) for number in range(10)]
    course = serve(Counting(), requests, 3)
    assert len(course.served) == 10
    assert course.failed == 0
    assert sorted(served.output_tokens for served in course.served) == [1 + 2 * number for number in range(10)]
    assert sum(served.input_tokens for served in course.served) == sum(len(request.ids) for request in requests)
    for served in course.served:
        assert len(served.arrivals) == served.output_tokens
        assert served.due <= served.sent <= served.arrivals[0] <= served.arrivals[-1] == served.ended


def test_users_who_were_answered_together_ride_in_the_next_wave_together() -> None:
    session = Counting()
    serve(session, [asked(4, 3)] * 10, 3)
    assert [requests for requests, _, _ in session.waves] == [3, 3, 3, 1]


def test_a_wave_that_fails_fails_its_requests_alone() -> None:
    course = serve(Counting(fails=(2,)), [asked(4, 3)] * 12, 3)
    assert len(course.served) == 12
    failed = [served for served in course.served if not served.good]
    assert [(served.fault, served.message) for served in failed] == [("failed", "RuntimeError: out of memory")] * 3
    assert all(served.output_tokens == 3 for served in course.served if served.good)


def test_answers_that_end_early_and_requests_that_are_too_long_are_told_apart() -> None:
    served = serve(Counting(shortest=2), [asked(4, 3)], 1).served[0]
    assert (served.fault, served.message) == ("dropped", "the answer ended after 2 tokens")
    assert serve(Counting(shortest=2), [asked(4, 3)], 1, stop_at_eos=True).served[0].good
    served = serve(Counting(shortest=0), [asked(4, 3)], 1).served[0]
    assert served.fault == "empty"
    served = serve(Counting(context=8), [asked(4, 5)], 1).served[0]
    assert served.message == "4 tokens in and 5 out are more than the model's context of 8"


def test_an_engine_that_is_left_gives_up_what_it_was_asked_for() -> None:
    session = Counting(context=None)

    async def leave() -> None:
        async with engine(session).connect() as target:
            endless = asyncio.create_task(target.serve(asked(4, 10**9), time.perf_counter()))
            while not session.waves:
                await asyncio.sleep(0.001)
            endless.cancel()
            await asyncio.gather(endless, return_exceptions=True)

    asyncio.run(leave())
    assert not any(thread.name == "engine" for thread in threading.enumerate())
    number = session.submit(np.ones(2, np.int64), 1)
    assert drain(session, 1) == {number: [2]}


class Numbers:
    """A tokenizer of numbers in words."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def settings(session: Waves, workload: str, requests: int) -> Settings:
    prompts = Prompts([" ".join(map(str, range(900)))], Numbers())
    return Settings(
        engine(session), parse_shape(workload), prompts, (Load(concurrency=2),), requests=requests, tokenizer="numbers"
    )


def test_a_report_says_what_ran_and_counts_exactly() -> None:
    measured = bench.run(settings(Counting(), "12:4", 24), lambda _: None)
    report = measured.report
    assert (report.model, report.runtime, report.batching, report.prompts) == (
        "counting", "transformers", "waves", "tokens",
    )  # fmt: skip
    (load,) = report.loads
    assert (load.input_tokens, load.output_tokens) == (12 * load.requests, 4 * load.requests)
    assert format_bench(report).splitlines()[0] == (
        "counting in transformers (static waves, equal lengths only), custom (12 in, 4 out)"
    )


def test_a_model_that_serves_nothing_ends_the_measurement() -> None:
    with pytest.raises(
        StageError, match=r"served none of \d+ requests at 2 users: RuntimeError: out of memory"
    ) as told:
        bench.run(settings(Counting(fails=tuple(range(100))), "12:4", 50), lambda _: None)
    assert told.value.hint == "another --runtime may serve it"


# --- what fits --------------------------------------------------------------------------------------------------------


def test_a_workload_longer_than_the_context_is_refused() -> None:
    limits = Limits(context=512, vocabulary=1, token_bytes=1)
    models.check_context(limits, Demand([(500, 12)], 1))
    models.check_context(Limits(None, 1, 1), Demand([(5000, 12)], 1))
    with pytest.raises(
        UsageError, match="context is 512 tokens; the workload asks for 400 in and 113 out, 513 together"
    ):
        models.check_context(limits, Demand([(500, 12), (400, 113)], 1))


def test_users_beyond_the_memory_are_refused_with_how_many_fit() -> None:
    limits = Limits(context=None, vocabulary=1, token_bytes=1000, prompt_bytes=500)
    room = {"weights": 2_000_000, "free": 10_000_000}  # 90% of it, less the weights: 7,000,000
    sizes = [(100, 50), (100, 50)]  # 2 · 1000 · 150 + 500 · 100 = 350,000 each, of which 20 fit
    assert models.check_room(limits, **room, demand=Demand(sizes, 20)) == 20
    assert models.check_room(limits, **room, demand=Demand(sizes, None)) == 20
    assert models.check_room(limits, 0, 10**12, Demand(sizes, 1)) == 256
    with pytest.raises(UsageError, match="21 requests at once") as told:
        models.check_room(limits, **room, demand=Demand(sizes, 21))
    assert "at most 20 fit" in told.value.hint
    with pytest.raises(UsageError) as told:
        models.check_room(limits, 10_000_000, 10_000_000, Demand(sizes, None))
    assert "smaller model" in told.value.hint


def test_weights_take_what_their_runtime_makes_of_them() -> None:
    checkpoint = Checkpoint(
        path="x", digest="x", bytes=150, weight_bytes=100, format="safetensors", dtype="bfloat16", parameters=200,
        origin="x",
    )  # fmt: skip
    dense = Candidate(
        id="x", variant="x", runtime="transformers", checkpoint=checkpoint, path="x", digest="x", bytes=150,
        weight_bytes=100, dtype="float32",
    )  # fmt: skip
    assert models.loaded_bytes(dense) == 800
    assert models.loaded_bytes(dense.model_copy(update={"runtime": "openvino"})) == 250


# --- what a target names ----------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, with a text to cut prompts from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PENNYWEIGHT_HOME", str(tmp_path / "store"))
    (tmp_path / "words.txt").write_text("one two three four five six seven eight nine ten\n\n" * 20)
    return tmp_path


def call(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["bench", *arguments, "--text", "words.txt"])
    assert "Traceback" not in done.output
    return done.exit_code, done.stderr


def found(target: str, stack: ExitStack | None = None) -> models.Model:
    return models.find(target, Store(), stack or ExitStack())


def a_run(folder: Path, model: Path) -> Candidate:
    """`folder` becomes a run whose winner is the model in transformers, and whose other candidate failed."""
    from pennyweight import checkpoints

    checkpoint = checkpoints.describe(model, "test")
    candidate = Candidate(
        id="same@transformers", variant="same", runtime="transformers", checkpoint=checkpoint, path=str(model),
        digest=checkpoint.digest, bytes=checkpoint.bytes, weight_bytes=checkpoint.weight_bytes, dtype="float32",
    )  # fmt: skip
    parts = {"checkpoint": None, "quality": None, "cost": None}
    passed, broken = (Verdict(status="pass", reasons=[]), Verdict(status="error", reasons=["no such layer"]))
    results = [
        CandidateResult(
            id=candidate.id, variant="same", runtime="transformers", candidate=candidate, verdict=passed, **parts
        ),
        CandidateResult(
            id="bad@onnxruntime", variant="bad", runtime="onnxruntime", candidate=None, verdict=broken, **parts
        ),
    ]
    record = RunRecord(
        name="test", run_dir=str(folder), started_at="2026-11-24T00:00:00+00:00", environment={}, status="passed",
        recipe=RecipeRef(path="x", digest="x", resolved={}), winner=candidate.id, candidates=results,
    )  # fmt: skip
    folder.mkdir()
    (folder / "run.json").write_text(record.model_dump_json())
    return candidate


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing"], "there is no model at 'missing'"),
        (["localhost:8000"], "begins with http://"),
        (["missing.gguf"], "there is no model at"),
        (["missing:int8@onnxruntime"], "there is no model at"),
        (["missing", "--runtime", "vllm"], "'vllm' is not one of"),
        (["missing", "--api", "chat"], "--api is for servers"),
        (["missing", "--stall-seconds", "5"], "--stall-seconds is for servers"),
        (["missing", "--model", "m"], "--model is for servers"),
        (["http://127.0.0.1:1", "--runtime", "openvino"], "--runtime openvino is for a model in this process"),
    ],
)
def test_targets_that_name_nothing(home: Path, arguments: list[str], says: str) -> None:
    code, told = call(*arguments)
    assert (code, says in told) == (2, True), told


def test_a_run_names_its_winner_and_any_candidate_that_was_made(home: Path, tiny_model: Path) -> None:
    candidate = a_run(home / "run", tiny_model)
    model = found("run")
    assert (model.name, model.candidate, model.checkpoint) == (
        "run:same@transformers", candidate, candidate.checkpoint,
    )  # fmt: skip
    assert found("run:same@transformers") == models.Model(
        "run:same@transformers", model.name, candidate, candidate.checkpoint
    )
    for target, says in (
        ("run:int8@x", "no candidate 'int8@x'"),
        ("run:bad@onnxruntime", "was not made: no such layer"),
    ):
        code, told = call(target)
        assert (code, says in told) == (2, True), told


def test_a_candidate_whose_files_are_gone(home: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, home / "model")
    a_run(home / "run", home / "model")
    shutil.rmtree(home / "model")
    code, told = call("run")
    assert (code, "are gone" in told) == (2, True), told


def test_a_folder_is_a_checkpoint_or_told_to_be_none(home: Path, tiny_model: Path) -> None:
    model = found(str(tiny_model))
    assert (model.name, model.candidate, model.checkpoint.path) == (tiny_model.name, None, str(tiny_model))
    (home / "empty").mkdir()
    with pytest.raises(SourceError, match="is not a checkpoint"):
        found("empty")
    shutil.copytree(tiny_model, home / "coded")
    config = json.loads((tiny_model / "config.json").read_text()) | {"auto_map": {"AutoModel": "x.Y"}}
    (home / "coded" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="Python code of its own"):
        found("coded")


def test_a_registered_candidate_keeps_its_runtime(
    home: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = a_run(home / "run", tiny_model).model_copy(update={"runtime": "onnxruntime"})
    shown = json.loads(candidate.model_dump_json())
    evidence = {
        "candidate": shown | {"path": None, "checkpoint": None},
        "checkpoint": shown["checkpoint"] | {"path": None},
    }
    asked_for = []

    def fetch(uri: str, folder: Path) -> Path:
        asked_for.append(uri)
        shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
        if "plain" not in uri:
            (folder / EVIDENCE).write_text(json.dumps(evidence))
        return folder

    monkeypatch.setattr(tracking, "fetch_model", fetch)
    with ExitStack() as stack:
        model = found("tiny@champion", stack)
        assert (model.name, model.candidate.runtime, model.checkpoint) == ("tiny@champion", "onnxruntime", None)
        folder = Path(model.candidate.path)
        assert folder.is_dir()
        assert found("models:/plain/3", stack).checkpoint is not None
    assert not folder.exists()
    assert asked_for == ["models:/tiny@champion", "models:/plain/3"]


def test_runtimes_are_tried_in_order_and_those_that_are_missing_are_told(
    home: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = {"openvino": ["openvino-genai"], "onnxruntime": []}
    monkeypatch.setattr(installed, "missing_packages", lambda name, device="cpu": absent.get(name, []))
    model = found(str(tiny_model))
    assert models._runtimes_for(model, None) == ("onnxruntime", "transformers")
    code, told = call(str(tiny_model), "--runtime", "openvino")
    assert (code, "openvino is not installed: it needs openvino-genai" in told) == (2, True), told
    assert "pip install 'pennyweight[cpu]'" in told
    candidate = a_run(home / "run", tiny_model).model_copy(update={"runtime": "openvino"})
    with pytest.raises(UsageError, match="is what openvino loads"):
        models._runtimes_for(models.Model("x", "x", candidate), "transformers")


def test_a_checkpoint_that_one_runtime_cannot_run_gets_the_next(
    home: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, said = [], []

    def open_(model: models.Model, name: str, *_: object) -> Engine:
        tried.append(name)
        if name != "transformers":
            raise StageError(f"no {name} today")
        return engine(session)

    session = Counting()
    monkeypatch.setattr(models, "_open", open_)
    monkeypatch.setattr(installed, "missing_packages", lambda name, device="cpu": [])
    options = Options(str(tiny_model), text=Path("words.txt"), workload="8:4", concurrency=(2,))
    with ExitStack() as stack:
        prepared = prepare(options, Store(), stack, said.append)
        assert prepared.place.session is session
        assert len(next(bench._asked(prepared, Load(concurrency=2))).ids) == 8
        assert not session.closed
    assert session.closed
    assert tried == ["openvino", "onnxruntime", "transformers"]
    assert said[1:] == ["not in openvino: no openvino today", "not in onnxruntime: no onnxruntime today"]
    with pytest.raises(StageError, match="cannot be run in onnxruntime: no onnxruntime today"):
        prepare(Options(**{**options.__dict__, "runtime": "onnxruntime"}), Store(), ExitStack(), said.append)
