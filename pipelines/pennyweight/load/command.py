"""What the options of `pennyweight bench` and `cost` mean, and how their outcome reads."""

from __future__ import annotations

import asyncio
import csv
import itertools
import json
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import ValidationError

from pennyweight import datasets, shipped
from pennyweight.benchmark.prices import price_of
from pennyweight.columns import columns
from pennyweight.errors import Problem, UsageError, did_you_mean
from pennyweight.load import peers
from pennyweight.load.bench import BenchReport, Load, Measured, Settings, read_texts
from pennyweight.load.card import BreakEven, PriceCard
from pennyweight.load.http import Endpoint, served_model
from pennyweight.load.report import LoadReport, is_drifting
from pennyweight.load.requests import Place
from pennyweight.load.workload import Prompts, Shape, parse_shape, read_trace
from pennyweight.recipe import ApiPrice, DataSource, Prices, PriceSpec, RuntimeName, Slo, load_prices
from pennyweight.recipe.prices import named
from pennyweight.recipe.wording import validate
from pennyweight.records import Price
from pennyweight.store import Store
from pennyweight.tracking import redact
from pennyweight.yamlfile import YamlFile

if TYPE_CHECKING:
    from pennyweight.benchmark.elsewhere import Projection
    from pennyweight.load.models import Demand, Model

#: Shipped text that prompts are cut from.
TEXT = "xsum-documents"
#: Requests of a workload whose lengths must fit before it begins.
LOOKED_AT = 1000
#: Options that only a server's target has.
OF_SERVERS = ("model", "api", "key_from", "stall_seconds")
BATCHING = {"continuous": "continuous batching", "waves": "static waves, equal lengths only"}


@dataclass(frozen=True)
class Options:
    """As they are given on the command line."""

    target: str
    runtime: RuntimeName | None = None
    model: str | None = None
    api: Literal["completions", "chat"] = "completions"
    workload: str = "chat"
    concurrency: tuple[int, ...] = ()
    rate: tuple[float, ...] = ()
    trace: Path | None = None
    trace_speed: float = 1.0
    trace_length: float = 1.0
    requests: int | None = None
    seconds: float | None = None
    slo: str | None = None
    price: str | None = None
    prices: Path | None = None
    knee: int | None = None
    text: Path | None = None
    tokenizer: str | None = None
    key_from: str = "OPENAI_API_KEY"
    stop_at_eos: bool = False
    stall_seconds: float = 60.0
    seed: int = 0


def prepare(
    options: Options, store: Store, stack: ExitStack, say: Callable[[str], None], texts: list[str] | None = None
) -> Settings:
    """Check all that can be checked without a request, then fetch the text that prompts are cut from, unless it is
    given, and find the model: at a server, or here, where it is loaded. `stack` ends what that begins.

    Raises UsageError for a call that cannot work, StageError for a server that does not answer or a model that cannot
    be run.
    """
    served = options.target.startswith(("http://", "https://"))
    _check_options(options, served)
    shape, loads = parse_shape(options.workload), _loads(options)
    slo = None if options.slo is None else _slo(options.slo)
    if options.knee and slo is None:
        raise UsageError("--knee needs an SLO", "such as --slo ttft_p95_ms=500,tpot_p95_ms=50")
    price = None if options.price is None else parse_price(options.price, load_prices(options.prices))
    model = None if served else _model(options, store, stack)
    if texts is None:
        texts = read_texts(options.text) if options.text else _shipped_text(store)
    if model is None:
        place: Place = _endpoint(options)
        tokenizer = _tokenizer(options.tokenizer)
    else:
        place, tokenizer = _engine(options, model, _demand(options, shape, loads), store, stack, say)
    return Settings(
        place=place,
        shape=shape,
        prompts=Prompts(texts, tokenizer),
        loads=loads,
        requests=options.requests,
        seconds=options.seconds,
        slo=slo,
        price=price,
        knee_up_to=options.knee,
        tokenizer=options.tokenizer or (None if served else place.model),
        seed=options.seed,
    )


def _check_options(options: Options, served: bool) -> None:
    if served and options.runtime:
        raise UsageError(
            f"--runtime {options.runtime} is for a model in this process, and {options.target} is a server"
        )
    given = [name for name in OF_SERVERS if getattr(options, name) != getattr(Options, name)]
    if given and not served:
        name = given[0].replace("_", "-")
        raise UsageError(
            f"--{name} is for servers, and {options.target!r} is no http:// address", f"leave --{name} out"
        )


def _endpoint(options: Options) -> Endpoint:
    url, key = options.target.rstrip("/").removesuffix("/v1"), os.environ.get(options.key_from) or None
    model = options.model or asyncio.run(served_model(url, key))
    return Endpoint(
        url, model, options.api, key, ignore_eos=not options.stop_at_eos, stall_seconds=options.stall_seconds
    )


def _model(options: Options, store: Store, stack: ExitStack) -> Model:
    from pennyweight.load import models

    return models.find(options.target, store, stack)


def _engine(
    options: Options, model: Model, demand: Demand, store: Store, stack: ExitStack, say: Callable[[str], None]
) -> tuple[Place, Any]:
    """The model in this process, and its tokenizer."""
    from pennyweight.load import models

    tokenizer = _tokenizer(options.tokenizer) or models.load_tokenizer(model)
    engine = models.open_engine(model, options.runtime, demand, options.stop_at_eos, store, stack, say)
    if options.tokenizer and len(tokenizer) > engine.vocabulary:
        raise UsageError(
            f"the tokenizer {options.tokenizer} has {len(tokenizer):,} tokens, the model {engine.vocabulary:,}",
            "leave --tokenizer out: the model's own is taken",
        )
    return engine, tokenizer


def _demand(options: Options, shape: Shape, loads: tuple[Load, ...]) -> Demand:
    from pennyweight.load.models import Demand

    sizes = [(arrival.input_tokens, arrival.output_tokens) for load in loads for arrival in load.trace]
    if options.knee or not all(load.trace for load in loads):
        sizes += itertools.islice(shape.sizes(options.seed), LOOKED_AT)
    users = [load.concurrency for load in loads if load.concurrency] + ([options.knee] if options.knee else [])
    return Demand(sizes, max(users, default=None))


def _loads(options: Options) -> tuple[Load, ...]:
    if bad := [value for value in (*options.concurrency, *options.rate) if not value > 0]:
        raise UsageError(f"a load of {bad[0]:g} asks for nothing")
    loads = [Load(concurrency=users) for users in options.concurrency] + [Load(rate=rate) for rate in options.rate]
    if options.trace:
        if not (options.trace_speed > 0 and options.trace_length > 0):
            raise UsageError("--trace-speed and --trace-length must be above 0")
        loads.append(Load(trace=tuple(read_trace(options.trace, options.trace_speed, options.trace_length))))
    if not loads and not options.knee:
        loads = [Load(concurrency=1)]
    return tuple(loads)


def _slo(text: str) -> Slo:
    limits = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in Slo.model_fields:
            raise UsageError(f"unknown limit {name!r} in --slo", did_you_mean(name, list(Slo.model_fields)))
        try:
            limits[name] = float(value)
        except ValueError:
            raise UsageError(f"--slo: {name} is {value!r}, not milliseconds") from None
        if not limits[name] > 0:
            raise UsageError(f"--slo: {name} must be above 0")
    return Slo(**limits)


def parse_price(text: str, prices: Prices) -> Price:
    """A name of the price sheet, dollars an hour, or a mapping as it stands in a recipe. Raises UsageError."""
    origin = {"source": "--price"}
    try:
        given = {"name": "yours", "usd_per_hour": float(text.removeprefix("$")), **origin}
    except ValueError:
        given = _mapping(text)
        if given is None and text not in prices.machines:
            hint = f"{did_you_mean(text, list(prices.machines))}; or dollars an hour, or {{name: …, utilization: …}}"
            raise UsageError(f"unknown price {text!r}", hint) from None
    problems: list[Problem] = []
    try:
        raw = named(given or text, prices)
    except ValueError as error:
        raise UsageError(f"--price: {error}") from None
    spec = validate(PriceSpec, origin | raw, YamlFile(Path("--price"), {}), problems)
    if problems:
        raise UsageError("\n".join(map(str, problems)))
    return price_of(spec)


def _mapping(text: str) -> dict[str, Any] | None:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--price {text!r} is not YAML: {getattr(error, 'problem', None) or error}") from None
    return value if isinstance(value, dict) else None


def _shipped_text(store: Store) -> list[str]:
    path, _ = datasets.fetch(TEXT, DataSource(**shipped.sources()[TEXT]), store)
    return list(datasets.texts(path))


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no tokenizer {name!r}: {next(iter(str(error).splitlines()), type(error).__name__)}",
            "name a model's folder",
        ) from None


def write_files(measured: Measured, csv_path: Path | None, vllm_path: Path | None, tokenizer: str | None) -> None:
    """Requests as CSV, and each load as `vllm bench serve` would write it. Raises UsageError."""
    when = datetime.fromisoformat(measured.report.started_at)
    try:
        if csv_path:
            with csv_path.open("w", newline="") as stream:
                table = csv.writer(stream)
                table.writerow(("load", *peers.COLUMNS))
                for report, served in measured.requests:
                    table.writerows((report.load, *row) for row in peers.rows(served))
        if vllm_path:
            name, loads = measured.report.model, measured.requests
            shaped = [peers.vllm_bench(report, served, name, tokenizer, when) for report, served in loads]
            vllm_path.write_text(json.dumps(shaped[0] if len(shaped) == 1 else shaped) + "\n")
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be written: {error.strerror}") from error


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
        lines.append(knee_sentence(report))
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


def knee_sentence(report: BenchReport) -> str:
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


def read_report(path: Path) -> BenchReport:
    """What `pennyweight bench --json` printed. Raises UsageError."""
    try:
        return BenchReport.model_validate_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except ValidationError as error:
        raise UsageError(
            f"{path} is no report of a benchmark: {error.errors()[0]['msg']}",
            "`pennyweight bench TARGET --json` prints one",
        ) from None


def parse_api_price(text: str, prices: Prices) -> ApiPrice:
    """A name of the price sheet, or `IN:OUT` in dollars for a million tokens. Raises UsageError."""
    if text in prices.apis:
        return prices.apis[text]
    into, _, out = text.partition(":")
    try:
        both = float(into.removeprefix("$")), float(out.removeprefix("$"))
    except ValueError:
        raise UsageError(
            f"--api {text!r} is no price of the sheet",
            f"{did_you_mean(text, list(prices.apis))}; or dollars for a million tokens in and out, as 0.15:0.60",
        ) from None
    if min(both) < 0 or not math.isfinite(sum(both)):
        raise UsageError(f"--api {text!r} is no price")
    return ApiPrice(input=both[0], output=both[1], source="--api")


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
