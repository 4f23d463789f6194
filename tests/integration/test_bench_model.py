"""`bench` on a tiny model in this process: what is streamed is what is generated, in every runtime."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from click.testing import CliRunner, Result
from quantized import make

from pennyweight import checkpoints, formats, runtimes, stages
from pennyweight.cli import main
from pennyweight.recipe import RuntimeName
from pennyweight.runtimes import Session
from pennyweight.store import Store

RUNTIMES: tuple[RuntimeName, ...] = ("transformers", "onnxruntime", "openvino")
#: (tokens in, tokens out)
SIZES = ((12, 5), (20, 9), (12, 3), (7, 1), (20, 2))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all, so that a model is exported once."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module", params=RUNTIMES)
def session(request: pytest.FixtureRequest, tiny_model: Path, store: Path) -> Session:
    checkpoint = checkpoints.describe(tiny_model, "test")
    candidate = stages.export_alone(checkpoint, request.param, "cpu", Store(store))
    if request.param == "transformers":  # in bfloat16 two tokens can be as likely, and the batch decides
        candidate = candidate.model_copy(update={"dtype": "float32"})
    limits = runtimes.get(request.param).limits(candidate)
    assert (limits.context, limits.vocabulary) == (512, 512)
    # Keys and values of 2 layers, each with 2 heads of 32.
    numbers = 2 * 2 * 2 * 32
    itemsize = 2 if candidate.dtype == "bfloat16" else 4
    expected = {"transformers": numbers * itemsize, "onnxruntime": numbers * 4, "openvino": numbers * itemsize}
    assert limits.token_bytes == expected[request.param]
    return runtimes.get(request.param).load(candidate, "cpu")


def prompts() -> list[np.ndarray]:
    draw = np.random.default_rng(3)
    return [draw.integers(1, 512, length) for length, _ in SIZES]


def drain(session: Session, numbers: list[int]) -> list[list[int]]:
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    left, last = set(numbers), 0.0
    while left:
        for progress in session.step():
            assert progress.at >= last
            last = progress.at
            answers[progress.request] += progress.tokens
            left -= {progress.request} if progress.finished else set()
    return [answers[number] for number in numbers]


def test_a_stream_has_the_tokens_that_are_generated(session: Session) -> None:
    alone = [session.generate(ids[None], new).tokens[0].tolist() for ids, (_, new) in zip(prompts(), SIZES)]
    numbers = [session.submit(ids, new) for ids, (_, new) in zip(prompts()[:3], SIZES)]
    early = session.step()
    later = [session.submit(ids, new) for ids, (_, new) in zip(prompts()[3:], SIZES[3:])]
    streamed = drain(session, [*numbers, *later])
    for progress in early:
        streamed[numbers.index(progress.request)][:0] = progress.tokens
    assert streamed == alone


def test_what_is_cancelled_leaves_nothing_behind(session: Session) -> None:
    ids = prompts()[0]
    alone = session.generate(ids[None], 4).tokens[0].tolist()
    for _ in range(3):
        session.submit(prompts()[1], 400)
    session.step()
    session.cancel()
    assert drain(session, [session.submit(ids, 4)]) == [alone]


def test_onnxruntime_generates_on_all_threads(tiny_model: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = stages.export_alone(checkpoints.describe(tiny_model, "test"), "onnxruntime", "cpu", Store(store))
    began = {}
    for threads in (1, 4):
        monkeypatch.setenv("PENNYWEIGHT_THREADS", str(threads))
        loaded, before = runtimes.get("onnxruntime").load(candidate, "cpu"), psutil.Process().num_threads()
        loaded.generate(prompts()[0][None], 2)
        began[threads] = psutil.Process().num_threads() - before
        loaded.close()
    assert began[4] - began[1] == 3


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, store: Path) -> Path:
    folder = tmp_path_factory.mktemp("here")
    shutil.copytree(tiny_model, folder / "tiny")
    make(folder / "tiny", folder / "int4", scheme="w4a16", head="w8a16")
    formats.export(str(folder / "int4"), "gguf", folder / "int4.gguf")
    formats.export(str(folder / "int4"), "onnx", folder / "int4-onnx")
    for name in ("onnxruntime", "openvino"):  # what they print goes to the log of a process of its own
        stages.export_alone(checkpoints.describe(folder / "tiny", "test"), name, "cpu", Store(store))
    (folder / "words.txt").write_text("A young bird walks slowly over the old stone.\n\n" * 50)
    return folder


def bench(here: Path, store: Path, *arguments: str) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        return CliRunner(env={"PENNYWEIGHT_HOME": str(store)}).invoke(
            main, ["bench", *arguments, "--text", "words.txt", "--json"]
        )


def measure(here: Path, store: Path, *arguments: str) -> dict:
    done = bench(here, store, *arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("target", "options", "runtime"),
    [
        ("tiny", ["--runtime", "transformers"], "transformers"),
        ("tiny", ["--runtime", "onnxruntime"], "onnxruntime"),
        ("int4", [], "openvino"),
        ("int4.gguf", [], "openvino"),
        ("int4-onnx", [], "onnxruntime"),
    ],
)
def test_a_model_is_measured_by_its_path(
    here: Path, store: Path, target: str, options: list[str], runtime: str
) -> None:
    loads = ("--workload", "20:6", "--concurrency", "1", "--concurrency", "3", "--rate", "50", "--price", "1")
    loads += ("--requests", "12")
    report = measure(here, store, target, *loads, *options)
    assert (report["runtime"], report["batching"]) == (runtime, "waves" if runtime == "onnxruntime" else "continuous")
    assert (report["target"], report["model"], report["prompts"]) == (target, target, "tokens")
    assert [load["load"] for load in report["loads"]] == ["1 user", "3 users", "50 requests/s, Poisson"]
    for load in report["loads"]:
        assert load["requests"] + load["steady"]["warm_up_requests"] == 12
        assert (load["input_tokens"], load["output_tokens"]) == (20 * load["requests"], 6 * load["requests"])
        assert not load["failed"]
        assert load["usd_per_1m_tokens"]["value"] > 0


def test_a_trace_and_a_knee_work_as_at_a_server(here: Path, store: Path) -> None:
    lines = [{"arrival": at / 100, "input_tokens": 5 + at, "output_tokens": 3} for at in range(12)]
    (here / "trace.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ("--trace", "trace.jsonl", "--workload", "8:4", "--knee", "2", "--slo", "ttft_p95_ms=60000")
    report = measure(here, store, "tiny", *options, "--requests", "80")
    assert report["loads"][0]["input_tokens"] <= sum(line["input_tokens"] for line in lines)
    assert report["knee"]["concurrency"] in (1, 2)


def test_a_workload_that_does_not_fit_is_refused_before_it_begins(here: Path, store: Path) -> None:
    for workload, users, says in (
        ("500:20", "1", "context is 512 tokens"),
        ("300:100", "100000000", "requests at once with 300 tokens in and 100 out need about"),
    ):
        done = bench(here, store, "tiny", "--workload", workload, "--concurrency", users)
        assert (done.exit_code, says in done.stderr) == (2, True), done.output


def test_ctrl_c_keeps_what_was_measured(here: Path, store: Path) -> None:
    command = [sys.executable, "-m", "pennyweight", "bench", "tiny", "--runtime", "openvino", "--text", "words.txt"]
    command += ["--workload", "8:4", "--seconds", "300", "--json", "--csv", "served.csv"]
    process = subprocess.Popen(
        command, env={**os.environ, "PENNYWEIGHT_HOME": str(store)}, cwd=here, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip
    for line in process.stderr:
        if "1 user:" in line:  # some seconds of requests are behind it
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    report = json.loads(out)
    assert report["interrupted"]
    assert report["loads"][0]["requests"] >= 10
    assert not report["loads"][0]["failed"]
