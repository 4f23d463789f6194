"""How much of each source of evidence one look takes: the first as the suite says, each later one as much as all
before."""

from __future__ import annotations


def sizes(first: int | None, total: int) -> list[int]:
    """How many items have been seen after each look, up to all of them: first, 2·first, 4·first, …, total."""
    seen = [min(first or total, total)]
    while seen[-1] < total:
        seen.append(min(2 * seen[-1], total))
    return seen


def part(first: int | None, look: int) -> slice:
    """Items that look number `look` (from 0) adds, in the order of drawing; past the end of the data it is empty."""
    if first is None:
        return slice(None) if look == 0 else slice(0, 0)
    return slice(0, first) if look == 0 else slice(first * 2 ** (look - 1), first * 2**look)
