"""Declare how to make a language model cheaper; get the cheapest variant that is still good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.api import Server, load_recipe, promote, rollback, run, serve

__version__ = "0.1.0"
__all__ = ["Server", "load_recipe", "promote", "rollback", "run", "serve"]


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: what only wants the version should not wait for the rest."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pennyweight import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
