"""How a measured load, a price card and a projection read in a terminal."""

from __future__ import annotations

from pennyweight.benchmark.elsewhere import Projection
from pennyweight.columns import columns
from pennyweight.load.bench import BenchReport
from pennyweight.load.card import BreakEven, PriceCard
from pennyweight.load.report import LoadReport, is_drifting
from pennyweight.load.serving import CandidateCost
from pennyweight.recipe import ApiPrice
from pennyweight.tracking import redact

BATCHING = {"continuous": "continuous batching", "waves": "static waves, equal lengths only"}


def format_bench(report: BenchReport) -> str:
    """A table with a row for each load, and what a reader must know of it."""
    where = f"at {redact(report.target)}"
    if report.runtime:
        where = f"in {report.runtime} ({BATCHING[str(report.batching)]})"
    lines = [f"{report.model} {where}, {report.workload}", ""]
    every = report.loads + ([] if report.knee is None else report.knee.reports)
    lines += columns([_header(report), *(_row(report, load) for load in every)])
    lines.append("")
    if report.knee:
        lines.append(_knee(report))
    for load in every:
        if warning := is_drifting(load):
            lines.append(f"warning: {load.load}: {warning}")
        if load.failed:
            counts = ", ".join(f"{count} {kind}" for kind, count in sorted(load.failed.items()))
            lines.append(f"warning: {load.load}: {counts}; for example: {load.messages[0]}")
        if load.saturated:
            lines.append(f"warning: {load.load}: stopped, since requests came faster than they were served")
    if report.interrupted:
        lines.append("stopped: what was measured until then stands above")
    if report.price:
        lines.append(f"priced as {report.price.words()}")
    lines.append(f"the load generator used {report.client_cpu_share:.1%} of a core")
    return "\n".join(lines)


def _header(report: BenchReport) -> list[str]:
    names = ["load", "requests", "req/s", "out tok/s", "tok/s a user", "TTFT p50", "p95", "TPOT p50", "p95", "E2E p95"]
    names += ["meet the SLO"] if report.slo else []
    return names + (["$/1M tokens", "$/1M output"] if report.price else [])


def _row(report: BenchReport, load: LoadReport) -> list[str]:
    speed, tpot = load.output_tokens_per_second, load.tpot_ms
    row = [
        load.load,
        str(load.requests),
        f"{load.requests_per_second:.3g}",
        f"{speed.value:.1f} ({speed.low:.1f} to {speed.high:.1f})",
        "" if load.tokens_per_second_per_user is None else f"{load.tokens_per_second_per_user:.1f}",
        f"{load.ttft_ms.p50:.0f} ms",
        f"{load.ttft_ms.p95:.0f} ms",
        f"{tpot.p50:.1f} ms" if tpot else "",
        f"{tpot.p95:.1f} ms" if tpot else "",
        f"{load.latency_ms.p95:.0f} ms",
    ]
    if report.slo:
        row.append(f"{load.slo_share.value:.0%} (≥ {load.slo_share.low:.0%})" if load.slo_share else "")
    if report.price:
        prices = (load.usd_per_1m_tokens, load.usd_per_1m_output_tokens)
        row += [f"${price.value:.4g}" if price else "" for price in prices]
    return row


def _knee(report: BenchReport) -> str:
    """Where the knee of a report lies, or how far off the SLO is. The report has looked for one."""
    assert report.knee and report.slo
    knee = report.knee
    limits = ", ".join(f"{name} {value:g}" for name, value in report.slo.model_dump().items() if value is not None)
    if knee.concurrency is None and knee.unclear:
        return f"knee: too few requests to say whether {limits} is met by {knee.unclear[0]} users: raise --requests"
    if knee.concurrency is None:
        first = knee.reports[0] if knee.reports else None
        off = ""
        if first:
            tpot = f" and a TPOT of {first.tpot_ms.p95:.1f} ms" if first.tpot_ms else ""
            off = f"; one user alone gets a TTFT of {first.ttft_ms.p95:.0f} ms{tpot} at p95"
        return f"knee: no load meets {limits}{off}"
    price = "" if knee.usd_per_1m_tokens is None else f", ${knee.usd_per_1m_tokens:.4g} for a million tokens"
    limit = " (the largest that was allowed)" if knee.at_the_limit else ""
    return f"knee: {knee.concurrency} users{limit} at {limits}{price}"


def format_card(card: PriceCard, pays: BreakEven | None, api: ApiPrice | None) -> str:
    into, out = card.usd_per_1m_input, card.usd_per_1m_output
    idle = "  (the tokens above pay for it already)" if card.price.utilization < 1 else ""
    lines = [
        f"a million input tokens   ${into.value:.4g}  (${into.low:.4g} to ${into.high:.4g})",
        f"a million output tokens  ${out.value:.4g}  (${out.low:.4g} to ${out.high:.4g})",
        f"an idle hour             ${card.usd_per_idle_hour:.4g}{idle}",
        f"an hour                  {card.price.words()}",
        "",
    ]
    rows = [["tokens in", "out", "load", "s a request", "card says", "fitted without it"]]
    rows += [
        [
            f"{mix.input_tokens:.0f}", f"{mix.output_tokens:.0f}", mix.load, f"{mix.seconds:.4g}", f"{mix.error:+.1%}",
            "" if mix.held_out_error is None else f"{mix.held_out_error:+.1%}",
        ]
        for mix in card.mixes
    ]  # fmt: skip
    lines += columns(rows, left=0)
    if pays and api:
        lines += ["", _api(api), _pays(pays)]
        if pays.requests_per_day is not None and not pays.pays:
            lines.append(_too_idle(pays))
    return "\n".join(lines)


def format_projections(found: list[Projection]) -> str:
    rows = [["candidate", "at", "$/1M here", "machine", "$/1M projected", "at best", "tok/s projected"]]
    rows += [
        [
            item.candidate, str(item.concurrency), f"{item.usd_per_1m_tokens_here:.4g}", item.machine,
            f"{item.usd_per_1m_tokens:.4g}", f"{item.usd_per_1m_tokens_at_best:.4g}",
            f"{item.output_tokens_per_second:,.0f}",
        ]
        for item in found
    ]  # fmt: skip
    sources = sorted({f"{item.machine}: {item.ceilings}" for item in found})
    return "\n".join(
        [
            *columns(rows, left=1),
            "",
            "Projected, not measured: a candidate realizes the share of the roofline there that it realized here.",
            f"Ceilings: {'; '.join(sources)}.",
        ]
    )


def _api(api: ApiPrice) -> str:
    facts = ", ".join(part for part in (api.source, api.date, api.note) if part)
    return f"the API takes ${api.input:g} for a million tokens in and ${api.output:g} out ({facts})"


def _too_idle(pays: BreakEven) -> str:
    share = pays.declared_utilization
    served = share * pays.capacity
    machine = pays.usd_per_day + served * pays.egress_usd_per_request
    return (
        f"warning: at the declared utilization of {share:.1%} it does not pay: {served:,.0f} requests a day "
        f"cost ${machine:.2f} here and ${served * pays.api_usd_per_request:.2f} at the API"
    )


def _pays(pays: BreakEven) -> str:
    mix = f"requests of {pays.input_tokens:.0f} tokens in and {pays.output_tokens:.0f} out"
    if pays.requests_per_day is None:
        full = pays.capacity * pays.api_usd_per_request
        machine = pays.usd_per_day + pays.capacity * pays.egress_usd_per_request
        return (
            f"do not self-host {mix}: this machine costs ${machine:.2f} a day, and all that it can serve "
            f"({pays.capacity:,.0f} requests) costs ${full:.2f} at the API"
        )
    return (
        f"self-hosting {mix} pays from {pays.requests_per_day:,.0f} a day on ({pays.tokens_per_day:,.0f} tokens), "
        f"where the machine is busy {pays.utilization:.1%} of the time"
    )


def format_candidate(found: CandidateCost, pays: BreakEven | None, api: ApiPrice | None) -> str:
    """One candidate of a run: where it is cheapest, and its card there."""
    first = found.reports[0]
    lines = [f"{found.candidate} in {first.runtime} ({BATCHING[str(first.batching)]})"]
    if found.knee:
        lines.append(_knee(first))
    else:
        lines.append(f"cheapest at {found.users} users; the recipe has no SLO that would limit them")
    if found.card:
        lines.append(format_card(found.card, pays, api))
    return "\n".join(lines)
