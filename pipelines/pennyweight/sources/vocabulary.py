"""Whether two models read the same tokens, so that what they predict can be compared token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pennyweight import checkpoints
from pennyweight.errors import SourceError

TOKENIZER = "tokenizer.json"
HINT = "bases compete token by token: take one of the same family, or give it a recipe of its own"


def difference(folder: Path, base: Path) -> str | None:
    """How a checkpoint's vocabulary differs from the base's; None where both give every token the same number.

    How text is cut into tokens may differ: each model reads questions its own way.
    """
    if found := difference_of_tokens(tokens(folder), tokens(base)):
        return found
    return difference_of_rows(_rows(folder), _rows(base))


def difference_of_tokens(own: dict[str, int], base: dict[str, int]) -> str | None:
    """The first token whose number is not the base's."""
    if own == base:
        return None
    _, token = min((number, token) for token, number in own.items() ^ base.items())
    here, there = (f"number {names[token]}" if token in names else "no token" for names in (own, base))
    sizes = f"{len(own):,} tokens, and the base's {len(base):,}"
    return f"its vocabulary is not the base's: it has {sizes}; {token!r} is {here} here and {there} there"


def difference_of_rows(own: int | None, base: int | None) -> str | None:
    """`own` and `base` are how many tokens the models predict, unused ones included."""
    if None in (own, base) or own == base:
        return None
    return f"it predicts {own:,} tokens, and the base {base:,}"


def tokens(folder: Path) -> dict[str, int]:
    """Token → number, added tokens included. Raises SourceError where the folder has no tokenizer that can be read."""
    try:
        if (folder / TOKENIZER).is_file():
            return _of_file(json.loads((folder / TOKENIZER).read_text(encoding="utf-8")))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder).get_vocab()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise no_tokenizer(folder, error) from None


def no_tokenizer(folder: Path, error: Exception) -> SourceError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    reason = "" if first.endswith(":") else f": {first}"  # a list follows, of what transformers would have taken
    hint = "a checkpoint needs its model's tokenizer beside the weights: tokenizer.json, tokenizer_config.json"
    return SourceError(f"{folder} has no tokenizer that can be read{reason}", hint)


def _of_file(body: dict[str, Any]) -> dict[str, int]:
    """A `tokenizer.json` of the tokenizers library: a mapping, or for Unigram a list of [token, score]."""
    known = body["model"]["vocab"]
    found = dict(known) if isinstance(known, dict) else {token: number for number, (token, _) in enumerate(known)}
    return found | {added["content"]: added["id"] for added in body.get("added_tokens", [])}


def _rows(folder: Path) -> int | None:
    config = checkpoints.read_config(folder)
    return (config.get("text_config") or config).get("vocab_size")
