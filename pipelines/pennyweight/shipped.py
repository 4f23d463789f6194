"""What comes with Pennyweight: recipes, suites, tasks, data pins, prices, and the script that gates a model in CI.

In a wheel they lie in `pennyweight/shipped`; in a checkout, `recipes/`, `evals/` and `ci/` at its top level.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pennyweight.errors import UsageError

_PACKAGE = Path(__file__).parent


@cache
def root() -> Path:
    """The folder that holds `recipes/`, `evals/` and `ci/`."""
    inside = _PACKAGE / "shipped"
    return inside if inside.is_dir() else _PACKAGE.parents[1]


def recipe_path(name: str | Path) -> Path:
    """A recipe's file: a path as it is, else the shipped recipe of that name."""
    path = Path(name)
    shipped = root() / "recipes" / f"{path.name.removesuffix('.yaml')}.yaml"
    return shipped if not path.exists() and shipped.is_file() else path


def recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted((root() / "recipes").glob("*.yaml"))}


def suites() -> dict[str, Path]:
    return {path.stem: path for path in sorted((root() / "evals" / "suites").glob("*.yaml"))}


@cache
def tasks() -> dict[str, dict[str, Any]]:
    """lm-eval task configs by name. `metadata.data` names the data set that a task reads."""
    found = {}
    for path in sorted((root() / "evals" / "tasks").glob("*.yaml")):
        try:
            task = _load(path)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"{path} is not YAML: {reason}", "it is an lm-eval task; see those beside it") from None
        if not isinstance(task, dict) or not isinstance(task.get("task"), str):
            raise UsageError(f"{path} has no `task:`, the task's name", "it is an lm-eval task; see those beside it")
        found[task["task"]] = task
    return found


@cache
def sources() -> dict[str, dict[str, Any]]:
    """Data sets by name, pinned by digest."""
    return _load(root() / "evals" / "sources.yaml")


def price_sheet() -> Path:
    """Prices of machines and APIs."""
    return _PACKAGE / "benchmark" / "prices.yaml"


def _load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())
