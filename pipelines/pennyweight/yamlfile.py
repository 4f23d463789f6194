"""YAML files with line numbers, duplicate keys found, and `KEY.PATH=VALUE` overrides."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pennyweight.errors import Problem, RecipeError, UsageError


@dataclass
class YamlFile:
    """A parsed file: its data, the line that each key path stands on, and the problems found while reading."""

    path: Path
    data: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> YamlFile:
        """Read a file whose top level is a mapping. Raises RecipeError."""
        try:
            text = path.read_text()
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            data = yaml.safe_load(text)
        except OSError as error:
            raise RecipeError([Problem(str(path), "", f"cannot be read: {error.strerror}")]) from error
        except UnicodeDecodeError as error:
            raise RecipeError([Problem(str(path), "", "is not a text file in UTF-8")]) from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = mark.line + 1 if mark else None
            raise RecipeError(
                [Problem(str(path), "", f"is not YAML: {getattr(error, 'problem', None) or error}", line)]
            ) from error
        if not isinstance(data, dict):
            raise RecipeError([Problem(str(path), "", "must be a mapping of keys to values")])
        file = cls(path, data)
        file._index(node, "")
        return file

    def problem(self, path: str, message: str, hint: str | None = None) -> Problem:
        """A problem at a key path, with the line of the nearest key that stands in the file."""
        parts = path.split(".")
        line = next((self.lines[p] for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in self.lines), None)
        return Problem(str(self.path), path, message, line, hint)

    def _index(self, node: yaml.Node, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                path = f"{prefix}.{key.value}" if prefix else str(key.value)
                line = key.start_mark.line + 1
                if key.value in seen:
                    first = self.lines[path]
                    message = f"two entries have the name {key.value!r}; the first is on line {first}"
                    self.problems.append(Problem(str(self.path), path, message, line, "rename one of them"))
                seen.add(key.value)
                self.lines[path] = line
                self._index(value, path)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                path = f"{prefix}.{index}"
                self.lines[path] = value.start_mark.line + 1
                self._index(value, path)


def apply_overrides(file: YamlFile, overrides: list[str]) -> None:
    """Set `KEY.PATH=VALUE` strings in the file's data. A path may name list positions; its parent must exist.

    Raises UsageError for one that cannot be applied.
    """
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise UsageError(f"--set takes KEY=VALUE, got {override!r}", "for example --set device=cpu")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {override!r}: the value is not YAML") from error
        *parents, last = path.split(".")
        node: Any = file.data
        for part in parents:
            node = _child(node, part, override)
        if isinstance(node, list) and last.isdigit() and int(last) < len(node):
            node[int(last)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise UsageError(f"--set {override!r}: {'.'.join(parents)} is not a mapping")


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, dict) and part in node:
        return node[part]
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return node[int(part)]
    known = f"it has {', '.join(map(str, node))}" if isinstance(node, dict) else None
    raise UsageError(f"--set {override!r}: there is no {part!r}", known)
