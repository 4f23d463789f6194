"""What clients may ask for in OpenAI's API, and how they are told that they may not."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pennyweight.errors import did_you_mean
from pennyweight.runtimes import MOST_LOGPROBS

MOST_STOPS = 16
LONGEST_STOP = 1000
#: Tokens of a completion where nobody says how many, as OpenAI has it.
COMPLETION_TOKENS = 16

#: Fields of the API that this server does not serve → values that ask for nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "use_beam_search": (False,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
#: Fields that change nothing in an answer.
IGNORED = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key parallel_tool_calls priority".split()  # noqa: SIM905
)


class ApiError(Exception):
    """A request that is not served, as OpenAI's clients expect to be told."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.message, self.param, self.status, self.code, self.headers = message, param, status, code, headers or {}

    @property
    def kind(self) -> str:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class Request(BaseModel):
    """What completions and chat have in common."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Stop] | None = Field(None, max_length=MOST_STOPS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(None, description="vLLM's: the model may not end the answer")
    return_token_ids: bool | None = Field(None, description="vLLM's: the answer carries its tokens, and the prompt's")


class CompletionRequest(Request):
    prompt: Any
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def scored(self) -> int | None:
        """Alternatives to give beside each token's log-probability; None: not even that."""
        return self.logprobs

    @property
    def tokens(self) -> int | None:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def scored(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def read(body: bytes, kind: type[CompletionRequest] | type[ChatRequest]) -> CompletionRequest | ChatRequest:
    """The request in a body. Raises ApiError with the field that is wrong."""
    try:
        given = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError("the body is not a JSON object", code="invalid_json")
    fields = {name: value for name, value in given.items() if value is not None and name not in IGNORED}
    for name in UNSERVED.keys() & fields.keys():
        value = fields.pop(name)
        if not any(_same(value, neutral) for neutral in UNSERVED[name]):
            raise ApiError(_unserved(name), name, code="unsupported_parameter")
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    for name in fields:
        if name not in kind.model_fields:
            hint = did_you_mean(name, list(kind.model_fields))
            raise ApiError(f"unknown field {name!r}; {hint}", name, code="unknown_parameter")
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise _as_api_error(error) from None
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise ApiError("top_logprobs needs logprobs to be true", "top_logprobs")
    if request.stream_options and not request.stream:
        raise ApiError("stream_options is for requests with stream", "stream_options")
    return request


def _same(value: Any, neutral: Any) -> bool:
    """Alike in kind too; a number may be written with a point or without."""
    numbers = (int, float) if type(neutral) is int else type(neutral)
    return isinstance(value, numbers) and isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _unserved(name: str) -> str:
    if name == "n":
        return "one answer to a request: n must be 1"
    return f"{name} is not served"


def _as_api_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    # Of a field that may be of several kinds, the place names the kind that was tried too.
    names = [str(part) for part in first["loc"] if part != "str" and not str(part).startswith("list[")]
    field = ".".join(names)
    if first["type"] == "missing":
        return ApiError(f"{field} is missing", field, code="missing_required_parameter")
    said = first["msg"][:1].lower() + first["msg"][1:]
    return ApiError(f"{field}: {said}", field, code="invalid_type" if "type" in first["type"] else "invalid_value")


def read_prompts(prompt: Any, most: int, vocabulary: int) -> list[str] | list[list[int]]:
    """The prompts of a completion: each a text, or each a list of tokens. Raises ApiError."""
    if isinstance(prompt, str):
        prompts: list[Any] = [prompt]
    elif isinstance(prompt, list) and prompt and _are(prompt, int):
        prompts = [prompt]
    elif isinstance(prompt, list) and prompt and (_are(prompt, str) or all(_are(each, int) for each in prompt)):
        prompts = prompt
    else:
        raise ApiError("prompt is neither a text, nor tokens, nor a list of either", "prompt", code="invalid_type")
    if len(prompts) > most:
        raise ApiError(f"{len(prompts)} prompts in one request; at most {most} are served", "prompt")
    for each in prompts:
        if not each:
            raise ApiError("the prompt is empty", "prompt")
        if not isinstance(each, str) and not all(0 <= token < vocabulary for token in each):
            raise ApiError(f"tokens of this model are 0 to {vocabulary - 1}", "prompt")
    return prompts


def check_text(text: str, param: str) -> None:
    """Raise ApiError for a text that is none: JSON can hold half of a character outside the basic plane."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError("the text holds half of a surrogate pair", param) from None


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
