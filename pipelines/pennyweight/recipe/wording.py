"""pydantic's errors in our words."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from pennyweight.errors import Problem, did_you_mean
from pennyweight.schema import Section
from pennyweight.yamlfile import YamlFile

#: Parts of an error's location that are no keys: pydantic's mark of a bad key, and which kind of condition it is.
_NOT_KEYS = ("[key]", "[Condition]", "[SavingCondition]")


def validate(model: type[Section], raw: Any, file: YamlFile, problems: list[Problem], prefix: str = "") -> Any:
    """`raw` as a `model`, or None with what is wrong with it added to `problems`."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        for item in error.errors():
            problems.append(_problem(model, item, file, prefix))
        return None


def _problem(model: type[Section], item: dict[str, Any], file: YamlFile, prefix: str) -> Problem:
    location = [str(part) for part in item["loc"] if part not in _NOT_KEYS]
    path = ".".join(([prefix] if prefix else []) + location)
    value = item["input"]
    shown = f" (it is {value!r})" if isinstance(value, str | int | float | bool) else ""
    hint = None
    match item["type"]:
        case "extra_forbidden":
            message = f"unknown key {location[-1]!r}"
            hint = did_you_mean(location[-1], _keys_at(model, item["loc"][:-1]))
        case "missing":
            message = "is missing"
        case "literal_error":
            message = f"unknown value {value!r}"
            hint = did_you_mean(str(value), re.findall(r"'([^']+)'", item["ctx"]["expected"]))
        case "union_tag_invalid":
            message = f"unknown step {item['ctx']['tag']!r}"
            hint = did_you_mean(item["ctx"]["tag"], re.findall(r"'([^']+)'", item["ctx"]["expected_tags"]))
        case "too_short":
            message = "is empty; it needs at least one step" if "variants" in location else "is empty"
        case "value_error":
            message = item["msg"].removeprefix("Value error, ")
        case "string_pattern_mismatch":
            message = f"{value!r} is not allowed here; it must match {item['ctx']['pattern']}"
        case _:
            message = item["msg"][0].lower() + item["msg"][1:] + shown
    return file.problem(path, message, hint)


def _keys_at(model: type[Section], location: tuple[Any, ...]) -> list[str]:
    """Keys that the section at `location` knows: follows the schema, not the value."""
    schema = model.model_json_schema(by_alias=True)
    node: dict[str, Any] = schema
    for part in location:
        node = _resolve(schema, node)
        if part in _NOT_KEYS:
            node = schema["$defs"][part.strip("[]")]
        elif part in node.get("discriminator", {}).get("mapping", {}):
            node = {"$ref": node["discriminator"]["mapping"][part]}
        elif isinstance(part, int):
            node = node.get("items", {})
        else:
            node = (
                node.get("properties", {}).get(part)
                or node.get("additionalProperties")
                or next(iter(node.get("patternProperties", {}).values()), {})
            )
    return [key for key in _resolve(schema, node).get("properties", {}) if key != "kind"]


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in node:
        return schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    for choice in node.get("anyOf", []):
        if "$ref" in choice:
            return _resolve(schema, choice)
    return node
