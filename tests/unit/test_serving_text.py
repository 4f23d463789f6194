"""Tokens to text as they come: whole characters only, and no part of a stop string."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from pennyweight.serving.text import REPLACEMENT, Detokenizer, Stops, Tokenizer

TEXTS = [
    "The river runs under the old stone.",
    "naïve café — “quoted” …",
    "日本語のテキスト and 한국어",
    "👩‍👩‍👧 family, 🇨🇭 flag, e\u0301 combined",
    "\n\n  indented\ttabs\r\n",
    "a" * 40,
]


@pytest.fixture(scope="module")
def bytewise(tiny_model: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    return Tokenizer(AutoTokenizer.from_pretrained(tiny_model))


@pytest.fixture(scope="module")
def fallback() -> Tokenizer:
    """As Llama's first: words begin with ▁, and what the vocabulary lacks is spelled in bytes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyzT.,"]
    vocabulary = {
        token: number for number, token in enumerate(["<s>", *(f"<0x{n:02X}>" for n in range(256)), *letters])
    }
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token=None))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))


@pytest.fixture(params=["bytewise", "fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "one two three four five", "é日"])
def test_pieces_are_whole_and_make_the_text(tokenizer: Tokenizer, text: str, prompt: str) -> None:
    before = tokenizer.encode(prompt) if prompt else []
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer.decode, before)
    pieces = [detokenizer.feed(token) for token in ids]
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode([*before, *ids])[len(tokenizer.decode(before)) :]


def test_long_random_texts(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    alphabet = "abc éü€日😀. "
    for _ in range(50):
        text = "".join(draw.choice(alphabet) for _ in range(60))
        ids = tokenizer.encode(text)
        detokenizer = Detokenizer(tokenizer.decode, [])
        assert "".join(map(detokenizer.feed, ids)) == tokenizer.decode(ids)


def test_an_unfinished_character_does_not_come(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab😀")
    detokenizer = Detokenizer(tokenizer.decode, [])
    assert "".join(map(detokenizer.feed, ids[:-1])) == "ab"


def test_a_character_that_the_prompt_began_is_completed(bytewise: Tokenizer) -> None:
    ids = bytewise.encode("€")
    assert len(ids) == 3
    detokenizer = Detokenizer(bytewise.decode, ids[:1])
    assert [detokenizer.feed(token) for token in ids[1:]] == ["", "€"]


def test_bytes_that_are_no_text_are_let_go_of(bytewise: Tokenizer) -> None:
    stray = bytewise.encode("é")[-1]
    detokenizer = Detokenizer(bytewise.decode, [])
    pieces = [detokenizer.feed(stray) for _ in range(500)]
    assert len(detokenizer._ids) < 100
    assert "".join(pieces).count(REPLACEMENT) > 300
    rest = "".join(map(detokenizer.feed, bytewise.encode("and on")))
    assert rest.lstrip(REPLACEMENT) == "and on"


def test_tokens_are_spelled_with_their_bytes(tokenizer: Tokenizer) -> None:
    spelled = [tokenizer.token(token) for token in tokenizer.encode("a€")]
    assert spelled[-4][0].endswith("a")
    assert [text for text, _ in spelled[-3:]] == [f"bytes:\\x{byte:02x}" for byte in "€".encode()]
    assert b"".join(bytes(raw) for _, raw in spelled).strip() == "a€".encode()


# --- stop strings -----------------------------------------------------------------------------------------------------


def shown(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    watch, out = Stops(stops), []
    for piece in pieces:
        text, found = watch.feed(piece)
        out.append(text)
        if found:
            return out, True
    return [*out, watch.rest()], False


def test_a_stop_string_over_several_pieces_is_never_shown() -> None:
    assert shown(["END"], ["one E", "N", "D two"]) == (["one ", "", ""], True)
    assert shown(["END"], ["one E", "N", "ough"]) == (["one ", "", "ENough", ""], False)
    assert shown(["END"], ["one EN"]) == (["one ", "EN"], False)
    assert shown(["aab"], ["aaa", "ab"]) == (["a", "a"], True)
    assert shown(["\n\n", "."], ["a\n", "b.c"]) == (["a", "\nb"], True)
    assert shown([], ["a", "b"]) == (["a", "b", ""], False)


def test_any_cut_of_a_text_shows_the_same() -> None:
    text, draw = "xaabaabaabbaab--STOP--tail", random.Random(1)
    for stops in (["STOP"], ["abb", "STOP"], ["--", "bbb"], ["zzz"], ["aabaabb"]):
        first = min((place for place in map(text.find, stops) if place >= 0), default=len(text))
        for _ in range(50):
            cuts = [0, *sorted(draw.sample(range(1, len(text)), 5)), len(text)]
            pieces = [text[begin:end] for begin, end in itertools.pairwise(cuts)]
            out, found = shown(stops, pieces)
            assert ("".join(out), found) == (text[:first], first < len(text))
