"""From tokens to text as they come: no half characters, and nothing that may turn out to be a stop string."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from pennyweight.serving.protocol import ApiError

REPLACEMENT = "\ufffd"
#: Tokens of context that a token is decoded in. What a decoder does at the start of a text must not happen inside it.
CONTEXT = 8
#: Tokens without a whole character after which what they hold is no unfinished one: UTF-8 has four bytes at most.
LONGEST_CHARACTER = 32

Decode = Callable[[list[int]], str]


class Tokenizer:
    """A model's tokenizer, as the server needs it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._spelled: dict[int, tuple[str, list[int]]] = {}
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:  # a file may ask for either
            self._backend.no_truncation()
            self._backend.no_padding()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Its tokens; with `special` also those that the tokenizer begins a text with."""
        if self._backend is not None:
            return self._backend.encode(text, add_special_tokens=special).ids
        return self._tokenizer.encode(text, add_special_tokens=special)

    def decode(self, ids: list[int]) -> str:
        """Their text, without special tokens."""
        if self._backend is not None:
            return self._backend.decode(ids, skip_special_tokens=True)
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """A conversation as the model was trained to read it, up to where its answer begins. Raises ApiError where the
        tokenizer has no template for that, or the template refuses the messages."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise ApiError("this model's tokenizer has no chat template; use /v1/completions", code="no_chat_template")
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like
            raise ApiError(f"the model's chat template refuses the messages: {error}", "messages") from error
        return self.encode(text, special=False)

    def token(self, token: int) -> tuple[str, list[int]]:
        """One token as text, and its bytes; half a character is spelled out, as in `bytes:\\xe2\\x82`."""
        if token not in self._spelled:
            self._spelled[token] = self._spell(token)
        return self._spelled[token]

    def _spell(self, token: int) -> tuple[str, list[int]]:
        text = self._plain(token)
        if REPLACEMENT not in text:
            return text, list(text.encode())
        piece = self._tokenizer.convert_ids_to_tokens(token) or ""
        raw = _bytes_of_piece(piece)
        if raw is None:
            return text, list(text.encode())
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)

    def _plain(self, token: int) -> str:
        """With special tokens spelled out, and the space that a word begins with."""
        if self._backend is None:
            return self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = self._backend.decode([token], skip_special_tokens=False)
        piece = self._tokenizer.convert_ids_to_tokens(token) or ""
        return f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text


def _bytes_of_piece(piece: str) -> bytes | None:
    """The bytes that an entry of a vocabulary stands for: `<0xE2>`, or in the letters of GPT-2's byte-level BPE."""
    if found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes.fromhex(found[1])
    letters = _byte_letters()
    return bytes(letters[letter] for letter in piece) if all(letter in letters for letter in piece) else None


@cache
def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for 256 and up, in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


class Detokenizer:
    """The text of one answer, token by token. A character comes when it is whole; one that never is does not come."""

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt[-CONTEXT:])
        self._told = len(self._ids)
        """Of `_ids`: those whose text is out."""
        self._known = decode(self._ids).rstrip(REPLACEMENT)
        """Text of `_ids` that is out."""

    def feed(self, token: int) -> str:
        """The text that is new with this token."""
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = text.rstrip(REPLACEMENT)
        if len(whole) < len(text) and len(self._ids) - self._told < LONGEST_CHARACTER:
            new = whole[len(self._known) :]
            self._known = whole if new else self._known
            return new
        new = text[len(self._known) :]
        before, self._told, self._known = self._told, len(self._ids), text
        if before >= CONTEXT:
            self._ids = self._ids[before:]
            self._told, self._known = len(self._ids), self._decode(self._ids)
        return new


class Stops:
    """Looks for the strings that end an answer, in text that comes in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """What may be shown now, and whether a stop string was found: nothing is shown from its beginning on."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [place for place in map(text.find, self._stops) if place >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def rest(self) -> str:
        """What was held back and is no stop string, as nothing follows it."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
