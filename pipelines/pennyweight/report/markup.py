"""HTML and SVG elements whose text is escaped by construction."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

_VOID = {"meta", "br", "hr", "wbr"}


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """An element. Children that are not `Html` are escaped; None is left out, and lists are flattened.

    Attribute names lose a trailing underscore (`class_`) and swap inner ones for hyphens; None and False leave an
    attribute out. Floats are written with one decimal, which is what SVG coordinates need.
    """
    kept = ((key, value) for key, value in attributes.items() if value is not None and value is not False)
    shown = "".join(f' {_name(key)}="{_value(value)}"' for key, value in kept)
    if tag in _VOID:
        return Html(f"<{tag}{shown}>")
    return Html(f"<{tag}{shown}>{join(*children)}</{tag}>")


def join(*children: Any) -> Html:
    return Html("".join(_flatten(children)))


def _flatten(children: Iterable[Any]) -> Iterable[str]:
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            yield child
        elif isinstance(child, str):
            yield escape(child)
        elif isinstance(child, Iterable):
            yield from _flatten(child)
        else:
            yield escape(str(child))


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _value(value: Any) -> str:
    if isinstance(value, float):
        text = f"{value:.1f}".removesuffix(".0")
        return "0" if text == "-0" else text
    return escape(str(value))
