"""What the store keeps, and what it lets go: with real files, and processes that really die."""

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from pennyweight.cli import main
from pennyweight.errors import StoreError
from pennyweight.garbage import collect
from pennyweight.store import RECORD, Entry, Store, folder_digest

LONG_AGO = 40 * 86400


def build(root: Path, number: int, run_dir: Path | None = None) -> Entry:
    """A result of 1,000 bytes that a process which has ended made, long ago, for a run where `run_dir` is given."""
    store = Store(root)
    if run_dir:
        run_dir.mkdir(parents=True, exist_ok=True)
        store.uses.belong_to(run_dir)
    entry = store.get_or_build("step", {"n": number}, lambda files: _write(files))
    age(entry)
    return entry


def _write(files: Path) -> dict:
    (files / "weights").write_bytes(bytes(1000))
    return {"format": "test"}


def age(entry: Entry) -> None:
    when = time.time() - LONG_AGO
    os.utime(entry.folder / RECORD, (when, when))


def test_what_a_run_uses_stays_byte_for_byte_and_the_rest_goes(tmp_path: Path) -> None:
    root, run_dir = tmp_path / "store", tmp_path / "runs" / "a-20261101-000000"
    used, unused = build(root, 1, run_dir), build(root, 2)
    before = folder_digest(used.folder)
    found = collect(Store(root), older_than_days=30)
    assert [item.key for item in found.results] == [unused.key]
    assert (found.removed, found.kept) == (1, 1)
    assert found.freed_bytes > 1000
    assert not unused.folder.exists()
    assert folder_digest(used.folder) == before
    assert not list((root / "tmp").glob("*-*-*"))


def test_a_run_whose_folder_is_gone_keeps_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "a-20261101-000000"
    used = build(tmp_path / "store", 1, run_dir)
    run_dir.rmdir()
    collect(Store(tmp_path / "store"), older_than_days=30)
    assert not used.folder.exists()
    assert not list((tmp_path / "store" / "uses").glob("*.jsonl"))


def test_a_result_that_a_later_run_only_reused_is_that_run_s_too(tmp_path: Path) -> None:
    root, first, second = tmp_path / "store", tmp_path / "runs" / "first", tmp_path / "runs" / "second"
    used = build(root, 1, first)
    build(root, 1, second)
    first.rmdir()
    assert collect(Store(root), older_than_days=30).removed == 0
    assert used.folder.exists()


def test_a_record_in_a_folder_that_the_store_does_not_know_keeps_what_it_names(tmp_path: Path) -> None:
    root = tmp_path / "store"
    named, unnamed = build(root, 1), build(root, 2)
    record = {"candidates": [{"candidate": {"path": f"/where/the/store/was/step/{named.key}/files"}}]}
    (tmp_path / "moved" / "a").mkdir(parents=True)
    (tmp_path / "moved" / "a" / "run.json").write_text(json.dumps(record))
    found = collect(Store(root), older_than_days=30, runs=[tmp_path / "moved"])
    assert [item.key for item in found.results] == [unnamed.key]
    assert named.folder.exists()


def test_what_was_used_lately_stays(tmp_path: Path) -> None:
    entry = build(tmp_path, 1)
    assert Store(tmp_path).find("step", {"n": 1}) is not None  # a look counts as use
    assert collect(Store(tmp_path), older_than_days=30).removed == 0
    assert entry.folder.exists()


def test_a_dry_run_removes_nothing(tmp_path: Path) -> None:
    entry = build(tmp_path, 1)
    rest = tmp_path / "tmp" / "step-abc-999999999"
    rest.mkdir(parents=True)
    (rest / "half").write_bytes(bytes(500))
    before = folder_digest(tmp_path)
    listed = collect(Store(tmp_path), older_than_days=30, dry_run=True)
    assert {(item.stage, item.path) for item in listed.results} == {("step", str(entry.folder)), ("tmp", str(rest))}
    assert listed.freed_bytes == sum(item.bytes for item in listed.results)
    assert folder_digest(tmp_path) == before
    assert collect(Store(tmp_path), older_than_days=30).freed_bytes == listed.freed_bytes
    assert not entry.folder.exists()
    assert not rest.exists()


WORKER = """
    import pathlib, sys, time
    from pennyweight.store import Store

    root, mark = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    store = Store(root)
    store.get_or_build("step", {"n": 1}, lambda files: {})

    def slow(files):
        (files / "half").write_text("half")
        mark.write_text("")
        time.sleep(60)

    store.get_or_build("step", {"n": 2}, slow)
"""


@pytest.fixture
def at_work(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A process that has used result 1 and is half-way through result 2."""
    build(tmp_path / "store", 1)
    mark = tmp_path / "mark"
    code = textwrap.dedent(WORKER)
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "store"), str(mark)])
    while not mark.exists():
        assert process.poll() is None
        time.sleep(0.01)
    yield process
    process.kill()
    process.wait()


def test_a_process_at_work_loses_nothing(tmp_path: Path, at_work: subprocess.Popen) -> None:
    root = tmp_path / "store"
    (result,) = [folder for _, _, folder, _ in Store(root).results()]
    assert collect(Store(root), older_than_days=0).removed == 0
    assert (result / "files" / "weights").read_bytes() == bytes(1000)
    (half,) = (root / "tmp").glob("step-*")
    assert (half / "files" / "half").read_text() == "half"


def test_a_process_number_is_not_trusted(
    tmp_path: Path, at_work: subprocess.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from another container: the number of the process at work means nothing here, its lock does."""

    def unknown(pid: int, signal: int) -> None:
        raise ProcessLookupError

    monkeypatch.setattr(os, "kill", unknown)
    assert collect(Store(tmp_path / "store"), older_than_days=0).removed == 0


def test_what_a_killed_process_left_goes(tmp_path: Path, at_work: subprocess.Popen) -> None:
    root = tmp_path / "store"
    at_work.kill()
    at_work.wait()
    found = collect(Store(root), older_than_days=0)
    assert sorted(item.stage for item in found.results) == ["step", "tmp"]
    assert list(Store(root).results()) == []
    assert not any((root / "tmp").iterdir())


def test_a_result_is_never_found_half_deleted(tmp_path: Path) -> None:
    """Collectors and builders race; whoever is handed a result finds its file."""
    code = """
        import pathlib, sys
        from pennyweight.garbage import collect
        from pennyweight.store import Store

        def build(files):
            (files / "w").write_text("w")
            return {}

        root, builds = pathlib.Path(sys.argv[1]), sys.argv[2] == "build"
        for turn in range(60):
            if builds:
                store = Store(root)  # it ends, and lets go, with the next turn
                entry = store.get_or_build("step", {"n": turn % 3}, build)
                assert (entry.files / "w").read_text() == "w"
            else:
                collect(Store(root), older_than_days=0)
    """
    code = textwrap.dedent(code)
    roles = ["build", "collect", "build"]
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), role]) for role in roles]
    assert [process.wait() for process in processes] == [0, 0, 0]


def test_where_nothing_can_be_deleted_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, 1)

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StoreError, match="cannot be written"):
        collect(Store(tmp_path), older_than_days=30)


def test_a_store_that_cannot_be_written_still_gives_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path, 1)
    real = Path.open

    def refuse(self: Path, mode: str = "r", *arguments, **options):
        if mode[0] in "awx":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert Store(tmp_path).get_or_build("step", {"n": 1}, lambda files: {}).reused


def test_the_command_lists_and_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENNYWEIGHT_HOME", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    entry = build(tmp_path / "store", 1)
    kept = build(tmp_path / "store", 2, tmp_path / "runs" / "a")
    runner = CliRunner()
    listed = runner.invoke(main, ["store", "gc", "--dry-run"])
    assert listed.exit_code == 0
    assert f"step   {entry.key[:16]}  40 days ago  0.0" in listed.stdout
    assert "would remove 1, would free 0.0 MB; 1 results stay, 0.0 MB" in listed.stdout
    done = json.loads(runner.invoke(main, ["store", "gc", "--json"]).stdout)
    assert (done["removed"], done["kept"], done["dry_run"]) == (1, 1, False)
    assert done["results"][0]["path"] == str(entry.folder)
    assert kept.folder.exists()
    assert not entry.folder.exists()
    assert runner.invoke(main, ["store", "gc", "--older-than", "-1"]).exit_code == 2


def test_a_workspace_goes_once_it_is_old_and_nobody_is_in_it(tmp_path: Path) -> None:
    store, when = Store(tmp_path), time.time() - LONG_AGO

    def fail_long_ago() -> Path:
        with pytest.raises(RuntimeError), store.workspace("step", "a" * 64) as folder:
            (folder / "state").write_bytes(bytes(1000))
            raise RuntimeError
        return folder

    folder = fail_long_ago()
    assert collect(store, older_than_days=30).removed == 0
    for path in (*folder.iterdir(), folder):
        os.utime(path, (when, when))
    with pytest.raises(RuntimeError), store.workspace("step", "a" * 64):
        os.utime(folder / "lock", (when, when))
        assert collect(store, older_than_days=30).removed == 0
        raise RuntimeError
    found = collect(store, older_than_days=30)
    assert [(item.stage, item.path) for item in found.results] == [("work", str(folder))]
    assert not folder.exists()
