"""The report's first screen: what the run decided, and on what grounds."""

from __future__ import annotations

from pennyweight.records import CandidateResult, RunRecord
from pennyweight.report import facts, text
from pennyweight.report.markup import Html, el, join
from pennyweight.report.svg import symbol


def first_screen(record: RunRecord) -> Html:
    winner = facts.by_id(record, record.winner)
    return el(
        "header",
        el("p", "Pennyweight ", el("b", record.name), class_="eyebrow"),
        el("h1", headline(record)),
        _quality_sentence(record, winner) if winner else _why_not(record),
        _against_base(record, winner) if winner else None,
        _unfinished(record) if winner else None,
        _facts(record),
    )


def headline(record: RunRecord) -> Html:
    """The verdict in a sentence."""
    winner = facts.by_id(record, record.winner)
    if winner is not None:
        return _saving_sentence(record, winner)
    passed = [result.id for result in record.candidates if result.verdict.status == "pass"]
    base = facts.cheapest_base(record)
    match record.status:
        case "nothing-passed":
            return join("Nothing passed the gate.")
        case "nothing-cheaper":
            against = base.id if base else "the base"
            return join(_strong(passed), f" passed the gate, but nothing is surely cheaper than {against}.")
        case "inconclusive":
            return join("Inconclusive: it takes more samples to decide.")
        case "failed":
            return join("There is no winner: a stage failed.")
        case "running":
            return join("This run did not finish.")
        case _:
            return join("There is no winner.")


def _saving_sentence(record: RunRecord, winner: CandidateResult) -> Html:
    load = facts.decide_at(record)
    point = facts.point_at(winner, load)
    name = el("strong", winner.id)
    if point is None or point.saving is None:
        return join(name, f" is the cheapest candidate that passed, at concurrency {load}.")
    saving = point.saving
    return join(
        name,
        f" saves {text.percent(saving.value)} ",
        el("span", text.interval(saving), class_="interval"),
        f" per million tokens at concurrency {load} against {point.saving_against or 'the base'}.",
    )


def _quality_sentence(record: RunRecord, winner: CandidateResult) -> Html:
    """The winner's value of every metric that the gate looks at."""
    parts = []
    for name in dict.fromkeys(item["name"] for item in facts.gate(record)):
        metric = facts.metric_of(winner, name)
        if metric is None:
            continue
        words = text.METRIC_NAMES.get(name, text.metric_label(name))
        change = None if name in text.METRIC_NAMES else text.difference(metric)
        against = f" ({change} against the base)" if change else ""
        parts.append(f"{words} {text.score(metric.value)}{against}")
    return el("p", "Its quality: ", "; ".join(parts), ".", class_="deck") if parts else Html("")


def _why_not(record: RunRecord) -> Html:
    """The reasons that kept each candidate from winning."""
    rows = []
    for result in record.candidates:
        status = result.verdict.status
        if status == "base":
            continue
        reasons = [reason for reason in result.verdict.reasons if reason.startswith(f"{status}: ")]
        point = facts.point_at(result, facts.decide_at(record))
        if status == "pass" and point is not None and point.saving is not None:
            reasons = [f"{text.saving(point.saving.value)} {text.interval(point.saving)}"]
        shown = "; ".join(reason.removeprefix(f"{status}: ") for reason in reasons or result.verdict.reasons)
        rows.append(el("li", symbol(status), el("span", el("b", result.id), " ", shown)))
    failed = [f"{item.stage} {item.subject}: {item.error}" for item in record.stages if item.error]
    if not rows:
        rows = [el("li", symbol("error"), el("span", words)) for words in failed]
    return el("ul", rows, class_="why") if rows else Html("")


def _unfinished(record: RunRecord) -> Html | None:
    failed = [result for result in record.candidates if result.verdict.status == "error"]
    if not failed:
        return None
    rows = [
        el("li", symbol("error"), el("span", el("b", result.id), " not finished: ", "; ".join(result.verdict.reasons)))
        for result in failed
    ]
    return el("ul", rows, class_="why")


def _against_base(record: RunRecord, winner: CandidateResult) -> Html | None:
    """The winner's few numbers over the cheapest base candidate's."""
    base, load = facts.cheapest_base(record), facts.decide_at(record)
    if base is None or facts.point_at(base, load) is None or facts.point_at(winner, load) is None:
        return None
    head = ["", "per 1M tokens", "weights on disk", "output tokens/s", "TPOT p50", "TTFT p50"]
    rows = []
    for result in (winner, base):
        point = facts.point_at(result, load)
        assert point is not None
        cells = [
            text.usd(point.usd_per_1m_tokens),
            text.size(result.candidate.bytes if result.candidate else None),
            text.number(point.output_tokens_per_second),
            f"{text.number(point.tpot_ms.p50)} ms",
            f"{text.number(point.ttft_ms.p50)} ms",
        ]
        name = el("th", symbol(result.verdict.status), result.id, scope="row")
        class_ = "winner" if result is winner else None
        rows.append(el("tr", name, [el("td", cell) for cell in cells], class_=class_))
    heading = el("tr", [el("th", cell, scope="col") for cell in head])
    return el("div", el("table", el("thead", heading), el("tbody", rows), class_="versus"), class_="scroll")


def _facts(record: RunRecord) -> Html:
    rows = [
        ("Registered", _registered(record)),
        ("Priced as", _price(record)),
        ("Decided at", _load(record)),
        ("Base model", _base_uri(record)),
        ("Other bases", _other_bases(record)),
        ("Run", f"{text.moment(record.started_at)}, took {text.duration(record.seconds)}"),
        ("Tracked", _tracking(record)),
    ]
    return el("dl", [el("div", el("dt", name), el("dd", words)) for name, words in rows if words], class_="facts")


def _registered(record: RunRecord) -> str | None:
    done = record.registered
    if done is not None:
        return f"{done.model}, version {done.version}, alias {done.alias}"
    name = record.recipe.resolved.get("register")
    return "nothing" if record.winner is None or not name else f"not yet; the recipe names {name}"


def _price(record: RunRecord) -> str | None:
    price = record.price
    if price is None:
        return None
    elsewhere = "; measured on this machine, which need not be that instance" if price.is_of_the_market else ""
    return price.words() + elsewhere


def _load(record: RunRecord) -> str | None:
    load = facts.decide_at(record)
    if load is None:
        return None
    words = [f"concurrency {load}"]
    workload = facts.section(record, "benchmark").get("workload")
    if isinstance(workload, dict) and "input_tokens" in workload:
        words.append(f"{workload['input_tokens']} tokens in and {workload.get('output_tokens')} out")
    if facts.slo_words(record):
        words.append(f"SLO {facts.slo_words(record)}")
    return "; ".join(words)


def _base_uri(record: RunRecord) -> str | None:
    return facts.section(record, "base").get("uri")


def _other_bases(record: RunRecord) -> str | None:
    return "; ".join(f"{name}: {base.get('uri')}" for name, base in facts.section(record, "bases").items()) or None


def _tracking(record: RunRecord) -> str | None:
    if record.tracking is not None:
        return f"MLflow run {record.tracking.run_id}, experiment {record.tracking.experiment}"
    return f"not logged to MLflow: {record.tracking_error}" if record.tracking_error else None


def _strong(names: list[str]) -> Html:
    separated = [part for name in names for part in (Html(", "), el("strong", name))]
    return join(separated[1:])
