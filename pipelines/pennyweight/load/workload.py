"""What requests look like and when they come: named shapes, distributions, traces."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.errors import UsageError, did_you_mean
from pennyweight.load.requests import Asked
from pennyweight.recipe import WORKLOADS

#: A field of a trace → the names that it has in public traces, and what turns its values into ours.
TRACE_FIELDS = {
    "arrival": {"arrival": 1.0, "timestamp": 1e-3, "TIMESTAMP": 1.0},  # seconds; Mooncake's milliseconds; Azure's dates
    "input_tokens": {"input_tokens": 1.0, "input_length": 1.0, "ContextTokens": 1.0},
    "output_tokens": {"output_tokens": 1.0, "output_length": 1.0, "GeneratedTokens": 1.0},
}


@dataclass(frozen=True)
class Lengths:
    """Token counts: all alike, or log-normal with this mean and coefficient of variation."""

    mean: int
    variation: float = 0.0

    def draw(self, generator: np.random.Generator) -> int:
        if self.variation == 0:
            return self.mean
        sigma = math.sqrt(math.log1p(self.variation**2))
        return max(1, round(generator.lognormal(math.log(self.mean) - sigma**2 / 2, sigma)))

    def __str__(self) -> str:
        return f"{self.mean}" if self.variation == 0 else f"{self.mean}±{self.variation:.0%}"


@dataclass(frozen=True)
class Shape:
    """Tokens in and out of a request."""

    name: str
    input: Lengths
    output: Lengths

    def sizes(self, seed: int) -> Iterator[tuple[int, int]]:
        """(tokens in, tokens out) of one request after the other, without end."""
        generator = np.random.default_rng(seed)
        while True:
            yield self.input.draw(generator), self.output.draw(generator)

    def __str__(self) -> str:
        return f"{self.name} ({self.input} in, {self.output} out)"


@dataclass(frozen=True)
class Arrival:
    """One line of a trace."""

    at: float
    input_tokens: int
    output_tokens: int


def parse_shape(text: str) -> Shape:
    """A named workload, or `IN:OUT` in tokens, each a number or `MEAN~VARIATION`: `512~0.5:128`. Raises UsageError."""
    if text in WORKLOADS:
        known = WORKLOADS[text]
        return Shape(text, Lengths(known["input_tokens"]), Lengths(known["output_tokens"]))
    found = re.fullmatch(r"(\d+)(?:~([\d.]+))?:(\d+)(?:~([\d.]+))?", text)
    if not found:
        raise UsageError(f"unknown workload {text!r}", f"{did_you_mean(text, list(WORKLOADS))}; or IN:OUT, as 512:128")
    into, into_variation, out, out_variation = found.groups()
    shape = Shape(
        "custom", Lengths(int(into), float(into_variation or 0)), Lengths(int(out), float(out_variation or 0))
    )
    if min(shape.input.mean, shape.output.mean) < 1:
        raise UsageError(f"workload {text!r} asks for no tokens")
    return shape


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Arrival times in seconds of a Poisson process with `rate` arrivals a second."""
    generator = np.random.default_rng([seed, 1])
    return itertools.accumulate(float(generator.exponential(1 / rate)) for _ in itertools.count())


def read_trace(path: Path, speed: float = 1.0, length: float = 1.0) -> list[Arrival]:
    """The requests of a trace in order of arrival, the first at 0.

    JSONL or CSV with `arrival` (seconds), `input_tokens` and `output_tokens`, or with the names of Azure's and
    Mooncake's public traces.

    `speed` divides times, `length` multiplies token counts. Raises UsageError with the line that is wrong.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text") from error
    arrivals = [_arrival(row, f"{path}:{number}") for number, row in _rows(text, path)]
    if not arrivals:
        raise UsageError(f"{path} has no requests")
    arrivals.sort(key=lambda arrival: arrival.at)
    first = arrivals[0].at

    def scaled(tokens: int) -> int:
        return max(1, round(tokens * length))

    return [Arrival((a.at - first) / speed, scaled(a.input_tokens), scaled(a.output_tokens)) for a in arrivals]


def _rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, fields)"""
    if not text.lstrip().startswith("{"):
        for number, row in enumerate(csv.DictReader(io.StringIO(text)), 2):
            yield number, row
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}:{number} is not JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise UsageError(f"{path}:{number} is not a JSON object")
        yield number, row


def _arrival(row: dict[str, Any], where: str) -> Arrival:
    values = {name: _value(row, name, where) for name in TRACE_FIELDS}
    if not values["arrival"] >= 0:
        raise UsageError(f"{where}: a request cannot arrive at {values['arrival']:g} s", "times count from 0")
    for name in ("input_tokens", "output_tokens"):
        if not (values[name] >= 1 and values[name].is_integer()):
            raise UsageError(f"{where}: {name} is {values[name]:g}", "it must be a whole number above 0")
    return Arrival(values["arrival"], int(values["input_tokens"]), int(values["output_tokens"]))


def _value(row: dict[str, Any], name: str, where: str) -> float:
    known = TRACE_FIELDS[name]
    found = next((field for field in known if row.get(field) not in (None, "")), None)
    if found is None:
        raise UsageError(f"{where} has no {name}", f"a trace needs {', '.join(TRACE_FIELDS)}")
    if found == "TIMESTAMP":
        return _seconds(str(row[found]), where)
    try:
        value = float(row[found]) * known[found]
    except (TypeError, ValueError):
        raise UsageError(f"{where}: {found} is {row[found]!r}, not a number") from None
    if not math.isfinite(value):
        raise UsageError(f"{where}: {found} is {value}")
    return value


def _seconds(text: str, where: str) -> float:
    from datetime import UTC, datetime

    try:
        # Azure writes seven digits of a second; six are kept.
        moment = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text))
    except ValueError:
        raise UsageError(f"{where}: TIMESTAMP is {text!r}, not a date") from None
    return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()


class Prompts:
    """Real text cut to length, no two prompts alike: each begins where the last one ended.

    With a tokenizer, tokens are counted; without one, words, at the `WORDS_PER_TOKEN` usual in English.
    """

    WORDS_PER_TOKEN = 0.75

    def __init__(self, texts: Iterable[str], tokenizer: Any = None) -> None:
        self._texts, self._tokenizer = list(texts), tokenizer
        self._source = self._pieces()
        self._read = 0

    def ask(self, input_tokens: int, output_tokens: int, at: float | None = None) -> Asked:
        """A request of about so many tokens, of exactly so many with a tokenizer."""
        if self._tokenizer is None:
            words = max(1, round(input_tokens * self.WORDS_PER_TOKEN))
            return Asked(" ".join(itertools.islice(self._source, words)), input_tokens, output_tokens, at)
        ids = tuple(itertools.islice(self._source, input_tokens))
        return Asked(self._tokenizer.decode(list(ids)), input_tokens, output_tokens, at, ids)

    def _pieces(self) -> Iterator[Any]:
        for lap in itertools.count():
            for index, text in enumerate(self._texts):
                # On later laps a prompt begins elsewhere, so that no cache of prefixes knows it.
                pieces = text.split() if self._tokenizer is None else self._tokenizer.encode(text)
                yield from pieces[lap * (index + 1) % max(len(pieces), 1) :] if lap else pieces
