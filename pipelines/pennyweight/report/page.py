"""The report's page: its sections in order, its style, and nothing from outside."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from pennyweight.compare import Flip
from pennyweight.load.serving import CandidateCost
from pennyweight.records import RunRecord
from pennyweight.report import answers, facts, learning, levers, making, pruning, roofline, serving, tables
from pennyweight.report.markup import Html, el, join
from pennyweight.report.plots import quality_against_cost, throughput_against_latency
from pennyweight.report.verdict import first_screen, headline

_STYLE = Path(__file__).with_name("style.css")

#: Browsers then refuse to load or send anything, whatever a recipe's text may say.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render(
    record: RunRecord, flips: dict[str, list[Flip]] | None = None, served: list[CandidateCost] | None = None
) -> str:
    """The whole file. A pure function of the record, of each candidate's flipped answers, and of what candidates cost
    as they serve."""
    title = re.sub(r"<[^>]+>", "", headline(record))  # its text is escaped already
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", record.name, ": ", Html(title)),
        el("style", Html(_STYLE.read_text(encoding="utf-8"))),
    )
    body = el("body", el("main", _sections(record, flips or {}, served or [])))
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _sections(record: RunRecord, flips: dict[str, list[Flip]], served: list[CandidateCost]) -> list[Html]:
    return [
        first_screen(record),
        _section("Quality against cost", quality_against_cost(record)),
        _section("Throughput against latency", throughput_against_latency(record)),
        _section("All candidates", _table_notes(record), tables.candidates_table(record), class_="wide"),
        _section("Why: every reason of every verdict", tables.reasons(record)),
        *([_section("Questions that flipped", answers.note(flips), answers.flipped(flips))] if flips else []),
        *([_section("How the variants were made", making.table(record))] if making.variants(record) else []),
        *([_section("What the layers cost", pruning.plot(record))] if pruning.curves(record) else []),
        *([_section("How the students learnt", learning.plot(record))] if learning.students(record) else []),
        _section("Cost at every load", _load_notes(record), tables.cost_by_load(record)),
        *(
            [_section("As it serves", serving.note(record), serving.plot(record, served), serving.table(served))]
            if served
            else []
        ),
        *(
            [_section("Roofline", roofline.note(record), roofline.table(record))]
            if roofline.is_measured(record)
            else []
        ),
        *(
            [_section("Levers of the winner's engine", levers.note(record), levers.table(record))]
            if record.levers
            else []
        ),
        _section("Where the time went", el("p", tables.time_summary(record)), tables.stages(record)),
        _notes(record),
        _section("Environment and digests", tables.environment(record), _digest_note(), tables.digests(record)),
        _section("Recipe", _recipe(record)),
    ]


def _section(title: str, *body: Html, class_: str | None = None) -> Html:
    return el("section", el("h2", title), body, class_=class_)


def _notes(record: RunRecord) -> Html:
    if not record.notes:
        return Html("")
    return _section("Notes", el("ul", [el("li", note) for note in record.notes], class_="notes"))


def _table_notes(record: RunRecord) -> Html:
    words = [
        tables.denominator(record),
        "Under a metric's name stands the gate's condition on it, under its value the difference from the base where "
        "that says something, and the standard error. Under each saving: its 95% interval. A bar at the left: on the "
        "Pareto front of cost and quality.",
    ]
    if tables.slo_missed(record):
        words.append(f"† The SLO was missed ({facts.slo_words(record)}).")
    return el("p", " ".join(words))


def _load_notes(record: RunRecord) -> Html:
    words = (
        "US dollars per 1M tokens. Bold: the cheapest among the base's candidates and those that passed; "
        "it may change with the load."
    )
    return el("p", words, " † SLO missed." if tables.slo_missed(record) else None)


def _digest_note() -> Html:
    return el("p", "First 16 digits of each sha256; run.json has them whole.")


def _recipe(record: RunRecord) -> Html:
    shown = yaml.safe_dump(record.recipe.resolved, sort_keys=False, allow_unicode=True, width=100)
    summary = el("summary", "The recipe as it was run, with all defaults and all that it names")
    return join(el("details", summary, el("pre", el("code", shown))))
