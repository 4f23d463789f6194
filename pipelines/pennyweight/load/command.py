"""What the options of `pennyweight bench` and `cost` mean, and the files that they read and write."""

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
from pennyweight.errors import Problem, UsageError, did_you_mean
from pennyweight.load import peers
from pennyweight.load.bench import BenchReport, Load, Measured, Settings, read_texts
from pennyweight.load.http import Endpoint, served_model
from pennyweight.load.requests import Place
from pennyweight.load.workload import Prompts, Shape, parse_shape, read_trace
from pennyweight.recipe import ApiPrice, DataSource, Prices, PriceSpec, RuntimeName, Slo, load_prices
from pennyweight.recipe.prices import named
from pennyweight.recipe.wording import validate
from pennyweight.records import Price
from pennyweight.store import Store
from pennyweight.yamlfile import YamlFile

if TYPE_CHECKING:
    from pennyweight.load.models import Demand, Model

#: Shipped text that prompts are cut from.
TEXT = "xsum-documents"
#: Requests of a workload whose lengths must fit before it begins.
LOOKED_AT = 1000
#: Options that only a server's target has.
OF_SERVERS = ("model", "api", "key_from", "stall_seconds")


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
        tokenizer = named_tokenizer(options.tokenizer)
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

    tokenizer = named_tokenizer(options.tokenizer) or models.load_tokenizer(model)
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


def named_tokenizer(name: str | None) -> Any:
    """The tokenizer that an option names; None where it names none. Raises UsageError."""
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
