"""What `pennyweight serve` may be told, and what its options mean."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pennyweight.errors import UsageError
from pennyweight.load.card import PriceCard
from pennyweight.recipe import RuntimeName

#: Variable with keys that clients may show, between commas.
KEYS_FROM = "PENNYWEIGHT_API_KEYS"


@dataclass(frozen=True)
class Settings:
    target: str
    name: str | None = None
    """That clients ask for; by default the target's own."""
    runtime: RuntimeName | None = None
    tokenizer: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    max_queue: int = 256
    """Requests that may wait; more are refused."""
    max_prompt_tokens: int = 8192
    max_output_tokens: int = 4096
    max_body_bytes: int = 2 * 2**20
    timeout: float = 600.0
    """Seconds for one request, from its first byte to its last."""
    drain_seconds: float = 30.0
    follow_seconds: float = 15.0
    """Between two looks at the alias."""
    keys: tuple[bytes, ...] = ()
    prices: Prices | None = None


@dataclass(frozen=True)
class Prices:
    """Dollars for a million tokens (in, out): of any candidate, or of those that a price card names."""

    any: tuple[float, float] | None = None
    by_candidate: Mapping[str, tuple[float, float]] | None = None

    def of(self, candidate: str) -> tuple[float, float] | None:
        return self.any or (self.by_candidate or {}).get(candidate)


def read_keys(file: Path | None) -> tuple[bytes, ...]:
    """Keys from a file, one a line, and from the environment. Raises UsageError where the file has none."""
    keys = [key.strip() for key in os.environ.get(KEYS_FROM, "").split(",")]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the keys in {file} cannot be read: {error}") from error
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise UsageError(f"{file} has no keys", "write one a line")
        keys += found
    return tuple(key.encode() for key in keys if key)


def read_prices(card: Path | None, per_1m: str | None) -> Prices | None:
    """Prices from `--price-card` or `--price-per-1m`. Raises UsageError."""
    if card and per_1m:
        raise UsageError("--price-card and --price-per-1m both name prices", "leave one out")
    if per_1m:
        return Prices(any=_parse(per_1m))
    return _read_card(card) if card else None


def _parse(text: str) -> tuple[float, float]:
    into, _, out = text.partition(":")
    try:
        both = float(into.removeprefix("$")), float(out.removeprefix("$"))
    except ValueError:
        raise UsageError(f"--price-per-1m {text!r} is not IN:OUT in dollars", "such as 0.02:0.10") from None
    if min(both) < 0 or not math.isfinite(sum(both)):
        raise UsageError(f"--price-per-1m {text!r} is no price")
    return both


def _read_card(path: Path) -> Prices:
    """What `pennyweight cost … --json` printed: of a run's candidates, or of reports on one target."""
    try:
        given = json.loads(path.read_text())
        if isinstance(given, dict):
            return Prices(any=_of_card(given["card"]))
        found = {item["candidate"]: _of_card(item["card"]) for item in given if item["card"]}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except (ValueError, LookupError, TypeError, ValidationError):
        raise UsageError(f"{path} is no price card", "`pennyweight cost RUN --json` prints one") from None
    if not found:
        raise UsageError(f"{path} has no candidate with a price card")
    return Prices(by_candidate=found)


def _of_card(card: object) -> tuple[float, float]:
    read = PriceCard.model_validate(card)
    return read.usd_per_1m_input.value, read.usd_per_1m_output.value
