"""The questions that a candidate and the base answered differently."""

from __future__ import annotations

from pennyweight.compare import Flip
from pennyweight.report import text
from pennyweight.report.markup import Html, el

#: Questions shown of each candidate; all of them are in its samples.
SHOWN = 12
_LONGEST = 260


def note(flips: dict[str, list[Flip]]) -> Html:
    words = (
        "Answers that are right in one and wrong in the other, lost ones first, largest change of margin first. "
        "A margin is how much more likely the right answer was than the best wrong one, in nats (for acc_norm, "
        f"nats per character). At most {SHOWN} of each candidate are shown; its samples have them all."
    )
    return el("p", words)


def flipped(flips: dict[str, list[Flip]]) -> Html:
    return el("div", [_candidate(name, found) for name, found in flips.items()], class_="flips")


def _candidate(name: str, found: list[Flip]) -> Html:
    lost = sum(not flip.gained for flip in found)
    summary = el("summary", el("b", name), f" {lost} lost, {len(found) - lost} gained")
    if not found:
        return el("details", summary, el("p", "No answer flipped."))
    head = ["", "task", "question", "right answer", "candidate", "base"]
    rows = [_row(flip) for flip in found[:SHOWN]]
    table = el(
        "table", el("thead", el("tr", [el("th", word, scope="col", class_="text") for word in head])), el("tbody", rows)
    )
    return el("details", summary, el("div", table, class_="scroll"))


def _row(flip: Flip) -> Html:
    return el(
        "tr",
        el("th", "gained" if flip.gained else "lost", scope="row"),
        el("td", f"{flip.task}/{flip.metric} {flip.item}", class_="text"),
        el("td", _short(flip.prompt), class_="text"),
        el("td", _short(flip.target), class_="text"),
        el("td", _short(flip.ours), _margin(flip.our_margin), class_="text"),
        el("td", _short(flip.theirs), _margin(flip.their_margin), class_="text"),
    )


def _margin(value: float | None) -> Html | None:
    return None if value is None else el("small", text.change(value))


def _short(words: str) -> str:
    flat = " ".join(words.split())
    return flat if len(flat) <= _LONGEST else f"{flat[: _LONGEST - 1]}…"
