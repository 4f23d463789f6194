"""Writes what the docs can take from the code: `docs/reference/` and `recipes/schema.json`. `--check` only compares."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from pennyweight import cli
from pennyweight.recipe import STEPS, WORKLOADS, Recipe
from pennyweight.records import RunRecord
from pennyweight.schema import Section

ROOT = Path(__file__).parents[1]


def main() -> int:
    stale = []
    for path, text in pages().items():
        target = ROOT / path
        if not target.exists() or target.read_text() != text:
            stale.append(path)
            if "--check" not in sys.argv:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text)
    if "--check" in sys.argv and stale:
        print(f"not fresh: {', '.join(stale)}\nhint: make docs", file=sys.stderr)
        return 1
    return 0


def pages() -> dict[str, str]:
    return {
        "recipes/schema.json": _json(recipe_schema()),
        "docs/reference/run.schema.json": _json(RunRecord.model_json_schema(by_alias=True)),
        "docs/reference/recipe.md": recipe_page(),
        "docs/reference/commands.md": commands_page(),
    }


def recipe_schema() -> dict[str, Any]:
    """The schema that editors complete recipes with: the short spellings are allowed too, as loading allows them."""
    schema = Recipe.model_json_schema(by_alias=True)
    runtime_names = schema["$defs"]["Runtimes"]["properties"]["base"]
    short = {
        **{key: {"type": "string"} for key in ("Base", "Suite", "PriceSpec", "Calibration", "TaskRef")},
        "Workload": {"enum": list(WORKLOADS)},
        "Runtimes": runtime_names,
    }
    for kind, model in STEPS.items():
        schema["$defs"][model.__name__]["properties"].pop("kind")
        schema["$defs"][f"{kind} step"] = {
            "type": "object",
            "properties": {kind: {"$ref": f"#/$defs/{model.__name__}"}},
            "required": [kind],
            "additionalProperties": False,
        }
    steps = [{"$ref": f"#/$defs/{kind} step"} for kind in STEPS]
    schema["properties"]["variants"] = _with_steps(schema["properties"]["variants"], steps)
    return _spelled_short(schema, short)


def _with_steps(node: Any, steps: list[dict[str, str]]) -> Any:
    """The schema of the variants with every step spelled as a mapping of one key."""
    if isinstance(node, list):
        return [_with_steps(item, steps) for item in node]
    if not isinstance(node, dict):
        return node
    if "discriminator" in node:
        return {"anyOf": steps}
    return {key: _with_steps(item, steps) for key, item in node.items()}


def _spelled_short(node: Any, short: dict[str, Any]) -> Any:
    """The schema with every reference to a section that has a short spelling widened to allow it."""
    if isinstance(node, list):
        return [_spelled_short(item, short) for item in node]
    if not isinstance(node, dict):
        return node
    name = str(node.get("$ref", "")).rsplit("/", 1)[-1]
    if name in short:
        return {"anyOf": [short[name], {"$ref": node["$ref"]}]} | {k: v for k, v in node.items() if k != "$ref"}
    return {key: item if key.endswith(" step") else _spelled_short(item, short) for key, item in node.items()}


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def recipe_page() -> str:
    lines = ["# The recipe", "", "Generated from `pipelines/pennyweight/recipe.py`; `make docs` writes it again.", ""]
    for model in _sections(Recipe, []):
        lines += [
            f"## {model.__name__}",
            "",
            *_first_line(model),
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        schema = model.model_json_schema(by_alias=True)
        for name, item in model.model_fields.items():
            if name == "kind":
                continue
            key = item.alias or name
            kind = _type(schema["properties"][key])
            default = "required" if item.is_required() else f"`{json.dumps(_plain(item.default))}`"
            lines.append(f"| `{key}` | {kind} | {default} | {' '.join((item.description or '').split())} |")
        lines.append("")
    lines += ["## Workloads", "", "| name | tokens in | tokens out |", "|---|---:|---:|"]
    lines += [f"| `{name}` | {shape['input_tokens']} | {shape['output_tokens']} |" for name, shape in WORKLOADS.items()]
    return "\n".join(lines) + "\n"


def _first_line(model: type[Section]) -> list[str]:
    text = (model.__doc__ or "").strip()
    return [text, ""] if text else []


def _sections(model: type[Section], seen: list[type[Section]]) -> list[type[Section]]:
    if model in seen:
        return seen
    seen.append(model)
    for item in model.model_fields.values():
        for inner in _models_in(item.annotation):
            _sections(inner, seen)
    return seen


def _models_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, Section) else value


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " \\| ".join(f"`{choice}`" for choice in schema["enum"])
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_type(choice) for choice in choices if choice.get("type") != "null")
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties") or next(iter(schema.get("patternProperties", {}).values()), {})
        return f"mapping of name to {_type(values)}"
    return str(schema.get("const") or schema.get("type", ""))


def commands_page() -> str:
    lines = ["# Commands", "", "Generated from `pennyweight --help`; `make docs` writes it again.", ""]
    for names, command in _commands(cli.main, ["pennyweight"]):
        context = click.Context(command, info_name=" ".join(names), max_content_width=100, terminal_width=100)
        lines += [f"## `{' '.join(names)}`", "", "```text", command.get_help(context), "```", ""]
    return "\n".join(lines)


def _commands(command: click.Command, names: list[str]) -> Iterator[tuple[list[str], click.Command]]:
    yield names, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from _commands(inner, [*names, name])


if __name__ == "__main__":
    sys.exit(main())
