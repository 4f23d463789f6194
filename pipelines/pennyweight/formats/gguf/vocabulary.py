"""A tokenizer as GGUF has it: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`).

GGUF has no rules for splitting text into words, only a name that its readers have rules for. The name is found by
trying: it is the first whose rules give the tokenizer's own tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.errors import StageError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from tokenizers import Tokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: Name → (expressions that cut text one after the other, whether a word in the vocabulary is a token as it is). Those
#: that most readers know come first.
SPLITS: dict[str, tuple[tuple[str, ...], bool]] = {
    "smollm": ((r"\p{N}", _GPT2), False),
    "qwen2": ((_LLAMA3.replace("{1,3}", ""),), False),
    "llama-bpe": ((_LLAMA3,), True),
    "gpt-2": ((_GPT2,), False),
}
#: The name for SentencePiece, which does not split text into words.
PIECES = "default"
#: Text that the splits cut differently.
PROBE = """It's 1234567 o'clock; I'LL pay 1,299.50 — isn't "that" too much?  No!!
\tdef f(x):\r\n        return {'a': [x**2, -1]}   # naïve café über 東京タワー 2024年 ½ ²
\n\n   trailing spaces   \n"""


def add(writer: GGUFWriter, folder: Path, size: int) -> str:
    """Write a checkpoint's tokenizer, for an embedding of `size` rows. Returns the name of how it splits words.

    Raises StageError for a tokenizer that GGUF does not know.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise StageError(f"{folder} has no tokenizer.json", "save the model's fast tokenizer beside it")
    whole = AutoTokenizer.from_pretrained(folder)
    described = json.loads(path.read_text(encoding="utf-8"))
    model = described["model"]
    if model["type"] != "BPE":
        raise StageError(f"no GGUF export for {model['type']} tokenizers", "it knows byte-level and SentencePiece BPE")
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    pieces = "ByteLevel" not in json.dumps(described["pre_tokenizer"])
    tokens, types = _tokens(whole, size, pieces)
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    split = PIECES if pieces else split_name(Tokenizer.from_file(str(path)))
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if pieces:
        writer.add_token_scores(_scores(tokens, merges))
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    _add_special(writer, whole, pieces)
    return split


def split_name(tokenizer: Tokenizer) -> str:
    """The name whose rules give the tokenizer's own tokens of a probing text. Raises StageError if none does."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    expected = tokenizer.encode(PROBE, add_special_tokens=False).ids
    for name, (expressions, whole_words) in SPLITS.items():
        trial = Tokenizer.from_str(tokenizer.to_str())
        trial.model.ignore_merges = whole_words
        cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
        trial.pre_tokenizer = pre_tokenizers.Sequence(
            [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        if trial.encode(PROBE, add_special_tokens=False).ids == expected:
            return name
    raise StageError(
        "the tokenizer splits words in a way that has no name here", f"a GGUF export knows {', '.join(SPLITS)}"
    )


def _tokens(whole: Any, size: int, pieces: bool) -> tuple[list[str], list[int]]:
    """Each id's token and its type. Rows of the embedding that have no token are named and marked as unused."""
    from gguf import TokenType

    by_id = {number: token for token, number in whole.get_vocab().items()}
    if max(by_id) >= size:
        raise StageError(f"the tokenizer has {max(by_id) + 1} tokens, the embedding {size} rows")
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    types = [TokenType.NORMAL if number in by_id else TokenType.UNUSED for number in range(size)]
    for number, added in whole.added_tokens_decoder.items():
        types[number] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
        if pieces and not added.special:
            tokens[number] = tokens[number].replace(" ", "▁")
    if pieces:
        for number, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                types[number] = TokenType.BYTE
        if whole.unk_token_id is not None:
            types[whole.unk_token_id] = TokenType.UNKNOWN
    return tokens, [int(kind) for kind in types]


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """SentencePiece merges the pair with the highest score first, a tokenizer.json the pair that comes first."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _add_special(writer: GGUFWriter, whole: Any, pieces: bool) -> None:
    roles = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for role, add_id in roles.items():
        if (number := getattr(whole, f"{role}_token_id")) is not None:
            add_id(number)
    ids = whole("word").input_ids
    writer.add_add_bos_token(whole.bos_token_id is not None and ids[0] == whole.bos_token_id)
    writer.add_add_eos_token(whole.eos_token_id is not None and len(ids) > 1 and ids[-1] == whole.eos_token_id)
    first = whole.convert_ids_to_tokens(whole("word", add_special_tokens=False).input_ids)[0]
    writer.add_add_space_prefix(pieces and first.startswith("▁"))
    if whole.chat_template:
        templates = whole.chat_template
        named = templates if isinstance(templates, str) else [{"name": k, "template": t} for k, t in templates.items()]
        writer.add_chat_template(named)
