"""`prune-scan`: what a model's blocks are worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pennyweight.commands.common import friendly, json_option, print_json, say

if TYPE_CHECKING:
    from pennyweight.recipe import Base, DataSource


@click.command("prune-scan")
@click.argument("source", metavar="RECIPE|CHECKPOINT")
@click.option("--text", required=True, metavar="NAME", help="Data set of the recipe, or a shipped one.")
@click.option("--layers", type=click.IntRange(1), default=6, show_default=True, help="Blocks to take out at most.")
@click.option("--windows", type=click.IntRange(1), default=16, show_default=True, help="Windows of text.")
@click.option("--length", type=click.IntRange(8), default=128, show_default=True, help="Tokens in each window.")
@json_option
@friendly
def prune_scan(source: str, text: str, layers: int, windows: int, length: int, as_json: bool) -> int:
    """Print KL against layers taken out, greedily by KL and by influence, before anything is cut."""
    from pennyweight import datasets, machine
    from pennyweight.pruning.scan import check, format_scan, scan
    from pennyweight.sources import fetch_base
    from pennyweight.stages.texts import load_tokenizer
    from pennyweight.store import Store

    data, base = _data(source, text)
    checkpoint, _ = fetch_base(base, Store())
    check(checkpoint, layers, length)
    path, _ = datasets.fetch(text, data, Store())
    cut, _ = datasets.windows(load_tokenizer(checkpoint), datasets.texts(path), windows, length, 0)
    found = scan(checkpoint, text, cut, layers, _say_how_it_goes, machine.resolve_device("auto"))
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        click.echo(format_scan(found))
    return 0


def _say_how_it_goes(detail: str, done: float) -> None:
    say(f"    {done:.0%}, {detail}")


def _data(source: str, text: str) -> tuple[DataSource, Base]:
    """The data set of that name, and the recipe's base or the checkpoint in the folder `source`."""
    from pennyweight import shipped
    from pennyweight.errors import UsageError, did_you_mean
    from pennyweight.recipe import Base, DataSource, load_recipe

    recipe = None if Path(source).is_dir() else load_recipe(source, [])
    known = {name: DataSource.model_validate(body) for name, body in shipped.sources().items()}
    known |= recipe.data if recipe else {}
    known = {name: data for name, data in known.items() if data.text}
    if text not in known:
        raise UsageError(f"there is no text called {text!r}", did_you_mean(text, list(known)))
    return known[text], recipe.base if recipe else Base(uri=f"file:{source}")
