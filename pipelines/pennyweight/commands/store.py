"""`store`: what finished stages left, how large it is, and what of it can go."""

from __future__ import annotations

from pathlib import Path

import click

from pennyweight.commands.common import Commands, friendly, json_option, print_json


@click.group(cls=Commands)
def store() -> None:
    """Finished stages, kept for resume and reuse."""


@store.command("list")
@json_option
@friendly
def store_list(as_json: bool) -> int:
    """List finished stages."""
    from pennyweight import show
    from pennyweight.store import Store

    entries = list(Store().entries())
    if as_json:
        print_json([{"stage": s, "key": k, "path": str(f), "used": t, "bytes": b} for s, k, f, t, b in entries])
    else:
        click.echo(show.format_store(entries))
    return 0


@store.command("size")
@json_option
@friendly
def store_size(as_json: bool) -> int:
    """Say where the store is and how large."""
    from pennyweight.store import Store, folder_bytes

    here = Store()
    size = folder_bytes(here.root) if here.root.exists() else 0
    if as_json:
        print_json({"path": str(here.root), "bytes": size})
    else:
        click.echo(f"{here.root}: {size / 1e6:,.0f} MB")
    return 0


@store.command("gc")
@click.option("--older-than", type=click.FloatRange(0), default=30.0, show_default=True, help="Days since last use.")
@click.option(
    "--runs",
    type=click.Path(path_type=Path),
    multiple=True,
    default=[Path("runs")],
    show_default=True,
    help="A folder of runs that the store may not know of: moved, or older than this account; can be repeated.",
)
@click.option("--dry-run", is_flag=True, help="Only list what would go.")
@json_option
@friendly
def store_gc(older_than: float, runs: tuple[Path, ...], dry_run: bool, as_json: bool) -> int:
    """Remove results that were not used for a while and that no run uses, and what killed runs left.

    A run uses its results for as long as its folder is there: delete a run's folder to let them go.
    """
    from pennyweight import show
    from pennyweight.garbage import collect
    from pennyweight.store import Store

    found = collect(Store(), older_than, runs, dry_run)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        click.echo(show.format_store_collection(found))
    return 0
