"""`bench`, `cost` and `prices`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pennyweight.commands.common import EXIT_INTERRUPTED, friendly, json_option, print_json, say
from pennyweight.errors import UsageError
from pennyweight.installed import RUNTIME_PACKAGES

if TYPE_CHECKING:
    from pennyweight.recipe import Prices


def prices_option(command: Callable[..., Any]) -> Callable[..., Any]:
    help_ = "Prices that add to the sheet and replace its own; else those in $PENNYWEIGHT_PRICES."
    return click.option("--prices", type=click.Path(path_type=Path), metavar="FILE", help=help_)(command)


@click.command()
@click.argument("target")
@click.option("--runtime", type=click.Choice(list(RUNTIME_PACKAGES)), help="Of a model in this process.")
@click.option("--concurrency", type=int, multiple=True, help="Users, each with one request in flight; can be repeated.")
@click.option("--rate", type=float, multiple=True, help="Requests a second, at random; can be repeated.")
@click.option("--trace", type=click.Path(path_type=Path), help="Replay arrivals and lengths: JSONL or CSV.")
@click.option("--trace-speed", type=float, default=1.0, help="So many times as fast.")
@click.option("--trace-length", type=float, default=1.0, help="So many times as long.")
@click.option(
    "--knee",
    type=click.IntRange(1),
    metavar="USERS",
    help="Find the cheapest load that meets --slo, up to so many users.",
)
@click.option("--workload", default="chat", show_default=True, help="A named shape, or tokens IN:OUT, as 512~0.5:128.")
@click.option("--requests", type=click.IntRange(1), help="End a load after so many.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="End a load after so long.")
@click.option("--slo", metavar="LIMITS", help="Such as ttft_p95_ms=500,tpot_p95_ms=50.")
@click.option("--price", help="A name of the price sheet, dollars an hour, or a price as in a recipe.")
@prices_option
@click.option("--model", help="Name at the server; needed where it serves several.")
@click.option("--api", type=click.Choice(["completions", "chat"]), default="completions", show_default=True)
@click.option("--tokenizer", help="Folder or name; prompts are then cut to exact tokens.")
@click.option("--text", type=click.Path(path_type=Path), help="Text file that prompts are cut from.")
@click.option("--key-from", default="OPENAI_API_KEY", show_default=True, help="Variable that holds the server's key.")
@click.option("--stop-at-eos", is_flag=True, help="Let the model end answers; else `ignore_eos` is asked for.")
@click.option("--stall-seconds", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write a row for each request.")
@click.option("--vllm-json", "vllm_path", type=click.Path(path_type=Path), help="Write what `vllm bench serve` would.")
@json_option
@friendly
def bench(csv_path: Path | None, vllm_path: Path | None, as_json: bool, **options: Any) -> int:
    """Measure what a server, or a model in this process, gives at a load.

    TARGET is the URL of an OpenAI-compatible server; or a model: a checkpoint's folder, a .gguf file, RUN[:CANDIDATE],
    or NAME@ALIAS of the registry.

    A Ctrl-C ends the measurement and keeps what it has.
    """
    from pennyweight.load import bench as bench_
    from pennyweight.load.command import Options, prepare, write_files
    from pennyweight.load.show import format_bench
    from pennyweight.store import Store

    with ExitStack() as stack:
        measured = bench_.run(prepare(Options(**options), Store(), stack, say), say)
    if as_json:
        print_json(measured.report.model_dump(mode="json"))
    else:
        click.echo(format_bench(measured.report))
    write_files(measured, csv_path, vllm_path, options["tokenizer"])  # last: a full disk must not cost the table
    return EXIT_INTERRUPTED if measured.report.interrupted else 0


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="RUN[:CANDIDATE]|REPORTS...")
@click.option("--price", help="Of the machine: a name of the price sheet, dollars an hour, or a price as in a recipe.")
@prices_option
@click.option(
    "--api", metavar="NAME|IN:OUT", help="An API of the sheet, or dollars for a million tokens: when does hosting pay?"
)
@click.option("--mix", metavar="IN:OUT", help="Tokens of a request, for --api; by default the run's own, or chat.")
@click.option("--users", type=click.IntRange(1), help="Of a RUN: requests in flight at most; the recipe's by default.")
@click.option(
    "--elsewhere",
    multiple=True,
    metavar="NAME",
    help="Of a RUN: project it to a machine of the sheet; can be repeated.",
)
@click.option("--again", is_flag=True, help="Of a RUN: measure again what was measured before.")
@json_option
@friendly
def cost(
    sources: tuple[str, ...], price: str | None, prices: Path | None, api: str | None, mix: str | None,
    users: int | None, elsewhere: tuple[str, ...], again: bool, as_json: bool,
) -> int:  # fmt: skip
    """Say what input, output and idle time cost, and when hosting pays.

    Of a RUN its winner and the cheapest candidate of its base are measured as they serve its workload: where the SLO
    still holds, and at three more mixes of input and output; what was measured is kept in the run's folder. REPORTS are
    files that `bench --json` printed, of one target at three or more mixes.
    """
    from pennyweight.load import card as card_
    from pennyweight.load import command, of_run, show
    from pennyweight.load.workload import parse_shape
    from pennyweight.recipe import load_prices
    from pennyweight.store import Store

    of_a_run = len(sources) == 1 and of_run.is_run(sources[0])
    if (users or again or elsewhere) and not of_a_run:
        raise UsageError("--users, --again and --elsewhere are for one run", "name its folder, as runs/latest")
    if elsewhere and (price or api or mix or users or again):
        raise UsageError("--elsewhere projects what the run measured", "leave the other options out")
    if mix and not api:
        raise UsageError("--mix says which requests an API is compared at", "add --api NAME")
    sheet = load_prices(prices)
    offer = command.parse_api_price(api, sheet) if api else None
    machine = command.parse_price(price, sheet) if price else None
    shape = parse_shape(mix) if mix else None

    def pays(card: card_.PriceCard, default: str) -> card_.BreakEven | None:
        asked = shape or parse_shape(default)
        return card_.break_even(card, asked.input.mean, asked.output.mean, offer.input, offer.output) if offer else None

    if elsewhere:
        return _project(sources[0], elsewhere, sheet, as_json)
    if of_a_run:
        found = of_run.measure(sources[0], users, machine, again, Store(), say)
        verdicts = [item.card and pays(item.card, of_run.mix_of(sources[0])) for item in found]
        if as_json:
            print_json(
                [
                    item.model_dump(mode="json") | {"break_even": verdict and verdict.model_dump(mode="json")}
                    for item, verdict in zip(found, verdicts)
                ]
            )
        else:
            texts = [show.format_candidate(item, verdict, offer) for item, verdict in zip(found, verdicts)]
            click.echo("\n\n".join(texts))
        return 0
    card = card_.fit([command.read_report(Path(path)) for path in sources], machine)
    verdict = pays(card, "chat")
    if as_json:
        parts = {"card": card, "api": offer, "break_even": verdict}
        print_json({name: part and part.model_dump(mode="json") for name, part in parts.items()})
    else:
        click.echo(show.format_card(card, verdict, offer))
    return 0


def _project(source: str, elsewhere: tuple[str, ...], sheet: Prices, as_json: bool) -> int:
    from pennyweight.benchmark.elsewhere import project
    from pennyweight.compare import find
    from pennyweight.load.show import format_projections
    from pennyweight.show import load_run

    folder, separator, name = source.partition(":")
    record = load_run(Path(folder))
    found = project(record, elsewhere, sheet)
    if separator:
        found = [item for item in found if item.candidate == find(record, name).id]
    if as_json:
        print_json([projection.model_dump(mode="json") for projection in found])
    else:
        click.echo(format_projections(found))
    return 0


@click.command("prices")
@prices_option
@json_option
@friendly
def list_prices(prices: Path | None, as_json: bool) -> int:
    """List the price sheet: machines by the hour, APIs by the token, and what should be looked up again."""
    from datetime import date

    from pennyweight import show
    from pennyweight.recipe import load_prices

    rows = show.price_rows(load_prices(prices), date.today())
    if as_json:
        print_json(rows)
    else:
        click.echo(show.format_prices(rows))
    return 0
