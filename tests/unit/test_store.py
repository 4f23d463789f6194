import errno
import os
from pathlib import Path

import pytest

from pennyweight.errors import StoreError
from pennyweight.store import Store, canonical_json, digest_of, folder_digest


def test_digests_are_those_of_the_canonical_spelling() -> None:
    assert canonical_json({"b": 1, "a": [1.5, "é", None]}) == '{"a":[1.5,"é",null],"b":1}'
    # printf '{"a":1}' | sha256sum
    assert digest_of({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_of(float("nan"))


def test_a_result_is_built_once(tmp_path: Path) -> None:
    calls = []

    def build(files: Path) -> dict:
        calls.append(1)
        (files / "weights").write_text("w")
        return {"answer": 42}

    store = Store(tmp_path)
    first = store.get_or_build("stage", {"x": 1}, build)
    again = store.get_or_build("stage", {"x": 1}, build)
    other = store.get_or_build("stage", {"x": 2}, build)
    assert (first.reused, again.reused, other.reused) == (False, True, False)
    assert again.record == {"answer": 42}
    assert (again.files / "weights").read_text() == "w"
    assert len(calls) == 2


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def build(files: Path) -> dict:
        (files / "half").write_text("…")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.get_or_build("stage", {}, build)
    assert store.find("stage", {}) is None
    assert list(store.entries()) == []
    assert not any((tmp_path / "tmp").iterdir())


def test_half_a_result_is_never_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    entry = store.get_or_build("stage", {}, lambda files: {"n": 1})
    (entry.folder / "record.json").write_text('{"record": {"n"')
    assert store.find("stage", {}) is None
    assert store.get_or_build("stage", {}, lambda files: {"n": 2}).record == {"n": 2}


def test_the_first_of_two_that_build_the_same_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)

    pid = os.getpid()

    def racing(files: Path) -> dict:
        # The other writer has another process number, so it works under another temporary name.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda: pid + 1)
            Store(tmp_path).get_or_build("stage", {"same": True}, lambda _: {"by": "other"})
        return {"by": "me"}

    store.get_or_build("stage", {"same": True}, racing)
    found = store.find("stage", {"same": True})
    assert found is not None
    assert found.record == {"by": "other"}


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "no space left"), (errno.EROFS, "cannot be written"), (errno.EACCES, "cannot be")],
)
def test_disk_errors_say_what_to_do(tmp_path: Path, code: int, words: str) -> None:
    def build(files: Path) -> dict:
        raise OSError(code, os.strerror(code))

    with pytest.raises(StoreError, match=words) as caught:
        Store(tmp_path).get_or_build("stage", {}, build)
    assert "PENNYWEIGHT_HOME" in (caught.value.hint or "")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError("131072 requested and 4096 written"),
        RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_libraries_that_say_in_words_that_the_disk_is_full_are_understood(tmp_path: Path, error: Exception) -> None:
    def build(files: Path) -> dict:
        raise error

    with pytest.raises(StoreError, match="no space left"):
        Store(tmp_path).get_or_build("stage", {}, build)
    assert not any((tmp_path / "tmp").iterdir())


def test_folder_digest_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = folder_digest(tmp_path)
    (tmp_path / "a").write_text("2")
    second = folder_digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, folder_digest(tmp_path)}) == 3


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        Store(tmp_path / "file" / "store").check_writable()


def test_a_workspace_outlasts_a_failure_and_goes_with_success(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(RuntimeError), store.workspace("step", "a" * 64) as folder:
        (folder / "state").write_text("half")
        raise RuntimeError
    with store.workspace("step", "a" * 64) as again:
        assert (again / "state").read_text() == "half"
        with Store(tmp_path).workspace("step", "a" * 64) as another:  # somebody is in it
            assert not list(another.iterdir())
    assert not again.exists()
    assert not another.exists()
