"""What becomes of one request: its answers as they grow, and how OpenAI's API spells them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pennyweight.runtimes import Progress, Scored
from pennyweight.serving.text import Detokenizer, Stops, Tokenizer

Finish = Literal["stop", "length"]


@dataclass
class Piece:
    """What is new in an answer."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Where in the answer's text each of `tokens` begins."""

    def add(self, later: Piece) -> None:
        self.text += later.text
        self.tokens += later.tokens
        self.scored += later.scored
        self.offsets += later.offsets


class Answer:
    """One answer as it grows."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], new_tokens: int, stops: Sequence[str], ends: frozenset[int]
    ) -> None:
        """`ends`: tokens that end it; none where the model may not end it."""
        self.tokens = 0
        self.finish: Finish | None = None
        self._new_tokens, self._ends = new_tokens, ends
        self._text, self._stops = Detokenizer(tokenizer.decode, prompt), Stops(stops)
        self._decoded = 0
        """Characters so far, with those that are held back."""

    def take(self, progress: Progress) -> Piece:
        """What a step brought. Sets `finish` where the answer is complete.

        Raises RuntimeError where the session ended it before its time.
        """
        piece, last = Piece(), None
        for number, last in enumerate(progress.tokens):
            self.tokens += 1
            piece.tokens.append(last)
            piece.offsets.append(self._decoded)
            if progress.scored:
                piece.scored.append(progress.scored[number])
            new = "" if last in self._ends else self._text.feed(last)
            self._decoded += len(new)
            text, stopped = self._stops.feed(new)
            piece.text += text
            if stopped:
                self.finish = "stop"
                return piece
        if progress.finished:
            if last in self._ends:
                self.finish = "stop"
            elif self.tokens >= self._new_tokens:
                self.finish = "length"
            else:
                raise RuntimeError(f"the runtime ended the answer after {self.tokens} tokens")
            piece.text += self._stops.rest()
        return piece


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    def spelled(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class Speller(ABC):
    """Spells the answers of one request. What all its events begin and end with is made once."""

    object: str
    chunk_object: str

    def __init__(
        self, number: str, created: int, model: str, fingerprint: str, tokenizer: Tokenizer, *, scored: bool,
        with_tokens: bool, with_usage: bool,
    ) -> None:  # fmt: skip
        self._tokenizer, self._scored, self._with_tokens = tokenizer, scored, with_tokens
        self._head = {"id": number, "created": created, "model": model, "system_fingerprint": fingerprint}
        shared = json.dumps({"object": self.chunk_object, **self._head})[:-1]
        self._begin = f'data: {shared}, "choices": [{{"index": '
        self._end = '}], "usage": null}\n\n' if with_usage else "}]}\n\n"

    def event(self, index: int, piece: Piece, finish: Finish | None, prompt: Sequence[int] | None) -> bytes:
        """A server-sent event. `prompt`: its tokens, in an answer's first event where tokens were asked for."""
        rest = self._delta(piece.text)
        if self._scored:
            rest += f', "logprobs": {json.dumps(self._logprobs(piece))}'
        if self._with_tokens:
            rest += f', "token_ids": {json.dumps(piece.tokens)}'
            if prompt is not None:
                rest += f', "prompt_token_ids": {json.dumps(list(prompt))}'
        reason = f'"{finish}"' if finish else "null"
        return f'{self._begin}{index}, {rest}, "finish_reason": {reason}{self._end}'.encode()

    def opening(self, index: int) -> bytes:
        """The event before an answer's first text."""
        return b""

    def usage_event(self, usage: Usage) -> bytes:
        body = {"object": self.chunk_object, **self._head, "choices": [], "usage": usage.spelled()}
        return f"data: {json.dumps(body)}\n\n".encode()

    def whole(
        self, answers: Sequence[tuple[Piece, Finish | None]], prompts: Sequence[Sequence[int]], usage: Usage
    ) -> bytes:
        """The body of an answer that is not streamed."""
        choices = []
        for index, (piece, finish) in enumerate(answers):
            logprobs = self._logprobs(piece) if self._scored else None
            choice = {"index": index, **self._message(piece.text), "logprobs": logprobs, "finish_reason": finish}
            if self._with_tokens:
                choice |= {"token_ids": piece.tokens, "prompt_token_ids": list(prompts[index])}
            choices.append(choice)
        return json.dumps({"object": self.object, **self._head, "choices": choices, "usage": usage.spelled()}).encode()

    @abstractmethod
    def _delta(self, text: str) -> str: ...

    @abstractmethod
    def _message(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, piece: Piece) -> dict[str, Any]: ...


class CompletionSpeller(Speller):
    object = chunk_object = "text_completion"

    def _delta(self, text: str) -> str:
        return f'"text": {json.dumps(text)}'

    def _message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        spell = self._tokenizer.token
        return {
            "tokens": [spell(token)[0] for token in piece.tokens],
            "token_logprobs": [scored.logprob for scored in piece.scored],
            "top_logprobs": [{spell(token)[0]: value for token, value in scored.top} for scored in piece.scored],
            "text_offset": piece.offsets,
        }


class ChatSpeller(Speller):
    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> bytes:
        delta = '"delta": {"role": "assistant", "content": ""}, "finish_reason": null'
        return f"{self._begin}{index}, {delta}{self._end}".encode()

    def _delta(self, text: str) -> str:
        return f'"delta": {{"content": {json.dumps(text)}}}' if text else '"delta": {}'

    def _message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        entries = [
            self._entry(token, scored.logprob) | {"top_logprobs": [self._entry(*each) for each in scored.top]}
            for token, scored in zip(piece.tokens, piece.scored)
        ]
        return {"content": entries}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self._tokenizer.token(token)
        return {"token": text, "logprob": logprob, "bytes": raw}
