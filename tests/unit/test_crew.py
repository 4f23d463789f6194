"""Processes that a launcher started together: who does what, and what is said when one of them cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pennyweight.distillation import crew, worker
from pennyweight.distillation.crew import Crew
from pennyweight.distillation.train import COURSE, Work
from pennyweight.errors import StageError, UsageError
from pennyweight.recipe import Distill, load_recipe
from pennyweight.records import Checkpoint


class Pair:
    """The first process, and another one that follows it in a thread."""

    def __init__(self) -> None:
        store = torch.distributed.HashStore()
        self.said: list[str] = []
        self.first = Crew(0, 2, store, {"LOCAL_RANK": "0", "MASTER_ADDR": "there"})
        self._other = Crew(1, 2, store, {"LOCAL_RANK": "0", "MASTER_ADDR": "there"})
        self._threads = ThreadPoolExecutor(1)
        self.code: Future[int] = self._threads.submit(self._other.follow, self.said.append)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made._threads.shutdown()


@pytest.fixture
def work(tmp_path: Path) -> Work:
    (tmp_path / "windows.npy").write_bytes(b"")
    files = {"path": str(tmp_path), "digest": "0", "bytes": 0, "weight_bytes": 0, "format": "safetensors"}
    teacher = Checkpoint(**files, dtype="float32", parameters=0, origin="")
    settings = Distill(text="any", steps=1)
    return Work(teacher, str(tmp_path), "float32", str(tmp_path / "windows.npy"), settings, "cpu", str(tmp_path))


def workers_that_run(monkeypatch: pytest.MonkeyPatch, code: Callable[[int], str]) -> None:
    """Instead of training they run the Python that `code` gives for a rank."""

    def start(self: Crew, order: dict[str, Any], **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code(self.rank)], text=True, stdin=subprocess.PIPE, **options)

    monkeypatch.setattr(Crew, "_worker", start)


def test_all_train_whenever_the_first_does(pair: Pair, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    course = Path(work.workspace) / COURSE
    done = f"open({str(course)!r}, 'w').write({json.dumps({'steps': 3, 'curve': [[0, 1.0]], 'losses': []})!r})"
    note = f"open({str(course.parent / 'trained')!r}, 'a').write('x')"
    told: list[Any] = []
    line = worker.MARK + json.dumps(["report", "loss", 0.5])
    workers_that_run(monkeypatch, lambda rank: note if rank else f"print({line!r}); {done}")
    with pair.first:
        assert crew.leading() is pair.first
        for _ in range(2):
            assert pair.first.train(work, lambda *said: told.append(said), lambda *said: None).steps == 3
    assert crew.leading() is None
    assert pair.code.result(30) == 0
    assert told == [("loss", 0.5)] * 2
    assert (course.parent / "trained").read_text() == "xx"
    assert "runs the recipe" in pair.said[0]


def test_files_that_another_machine_does_not_see_are_named(
    pair: Pair, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "SEEN", 0.1)
    Path(work.windows).unlink()
    with pair.first:
        with pytest.raises(StageError, match=f"sees no {work.windows}") as caught:
            pair.first.train(work, lambda *said: None, lambda *said: None)
        assert "PENNYWEIGHT_HOME" in (caught.value.hint or "")
    assert pair.code.result(30) == 0


def test_a_worker_that_dies_elsewhere_ends_the_first_ones(
    pair: Pair, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies = "import os, signal; print('nothing to be done', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    workers_that_run(monkeypatch, lambda rank: dies if rank else "input()")
    with pair.first, pytest.raises(StageError, match=r"process 1 of 2, on .*: exit code -9"):
        pair.first.train(work, lambda *said: None, lambda *said: None)
    assert pair.code.result(30) == 0
    assert any("nothing to be done" in line for line in pair.said)


def test_the_cause_is_told_where_its_echo_is_heard_first(
    pair: Pair, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies = "import os, signal, time; time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)"
    echo = "print('RuntimeError: gloo: Connection closed by peer'); raise SystemExit(1)"
    workers_that_run(monkeypatch, lambda rank: dies if rank else echo)
    with pair.first, pytest.raises(StageError, match=r"process 1 of 2, on .*: exit code -9"):
        pair.first.train(work, lambda *said: None, lambda *said: None)
    assert pair.code.result(30) == 0


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path, tiny_recipe_text: str) -> None:
    recipe = yaml.safe_load(tiny_recipe_text)
    recipe["variants"] = {"taught": [{"distill": {"text": "calibration-text", "student": {"layers": 2}, "batch": 4}}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(tmp_path / "r.yaml")
    Crew(0, 2, None, {}).check(loaded)
    with pytest.raises(UsageError, match=r"variants\.taught\.0\.distill\.batch: 3 processes were launched"):
        Crew(0, 3, None, {}).check(loaded)


def test_a_process_launched_alone_is_not_a_part_of_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANKING", "kept")
    assert crew.join() is None
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    assert os.environ["RANKING"] == "kept"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["[rank1]: ValueError: no such thing", "ChildFailedError: "], "ValueError: no such thing"),
        (
            ["[rank0]: RuntimeError: [gloo/pair.cc:537] Read error: Connection reset by peer",
             "E1 api.py:1002] failed (exitcode: -9) local_rank: 1 (pid: 7) of binary: python",
             "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: "],
            "process 1 was ended by signal 9",
        ),
        (["nothing of note"], None),
    ],
)  # fmt: skip
def test_the_cause_is_told_from_what_came_of_it(lines: list[str], reason: str | None) -> None:
    assert next(iter(worker.reasons(lines)), None) == reason
