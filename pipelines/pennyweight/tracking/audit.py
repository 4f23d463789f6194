"""What happened to a registered model's champion: read, mended where a change was left half done, and printed."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from pennyweight.columns import columns
from pennyweight.records import Record
from pennyweight.tracking import ledger
from pennyweight.tracking.connection import session
from pennyweight.tracking.ledger import CHAMPION, PREVIOUS, Entry
from pennyweight.tracking.registry import aliases_of


class History(Record):
    """All changes of a model's champion, the oldest first, and its aliases now."""

    model: str
    aliases: dict[str, str] = Field(description="alias → version")
    entries: list[Entry]
    noticed: list[str] = Field([], description="what was mended just now, and what is odd")


def history(model: str) -> History:
    """What happened to a model. Finishes a change that was left half done. Raises UsageError for an unknown model."""
    with session(f"the history of {model} was not read") as client:
        aliases_of(client, model)  # there is such a model
        entries, mended = ledger.settle(client, model)
        aliases = aliases_of(client, model)
        noticed = [
            *([mended] if mended else []),
            *missing(entries),
            *drift(aliases, ledger.last_that_counts(entries)),
        ]
        return History(model=model, aliases=aliases, entries=entries, noticed=noticed)


def drift(aliases: Mapping[str, str], last: Entry | None) -> list[str]:
    """How the aliases differ from what the last change made them: by hand, or because a version was deleted."""
    if last is None or last.state != "done":
        return []
    expected = {CHAMPION: last.change.version, PREVIOUS: last.change.replaced}
    found = []
    for alias, version in expected.items():
        if version is None or aliases.get(alias) == version:
            continue
        now = f"version {aliases[alias]}" if alias in aliases else "no version"
        found.append(
            f"{alias} is {now}, and change {last.number} made it version {version}: it was moved outside of "
            "Pennyweight, or its version was deleted"
        )
    return found


def missing(entries: list[Entry]) -> list[str]:
    """Changes that somebody deleted."""
    there = {entry.number for entry in entries}
    gone = [str(number) for number in range(1, max(there, default=0)) if number not in there]
    return [f"deleted from the history: change {', '.join(gone)}"] if gone else []


def format_history(found: History) -> str:
    """The aliases now, a table of all changes, and what is known of each."""
    now = ", ".join(f"{alias} is version {version}" for alias, version in sorted(found.aliases.items()))
    lines = [f"{found.model}: {now or 'no aliases'}", *(f"note: {line}" for line in found.noticed), ""]
    if not found.entries:
        return "\n".join([*lines, "no version was promoted yet"])
    rows = [["", "when", "what", "version", "candidate", "in place of", "who", "state"], *map(_row, found.entries)]
    table = columns(rows, left=8)
    lines.append(table[0])
    for row, entry in zip(table[1:], found.entries):
        lines += [row, *(f"      {line}" for line in _details(entry))]
    return "\n".join(lines)


def _row(entry: Entry) -> list[str]:
    change = entry.change
    when = change.when.replace("T", " ").removesuffix("+00:00")
    forced = " (forced)" if change.checks.overridden else ""
    before = change.replaced or "-"
    return [
        str(entry.number), when, change.action + forced, change.version, change.candidate or "-", before, change.who,
        entry.state,
    ]  # fmt: skip


def _details(entry: Entry) -> list[str]:
    why = [entry.change.why] if entry.change.why else []
    note = [entry.note] if entry.note else []
    return [*why, *ledger.facts(entry.change)[1:], *note]
