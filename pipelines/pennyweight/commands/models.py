"""`models`: looking after the registry's versions and their files."""

from __future__ import annotations

import click

from pennyweight.commands.common import Commands, friendly, json_option, print_json


@click.group(cls=Commands)
def models() -> None:
    """Registered models and the files that they take up."""


@models.command("gc")
@click.argument("model", required=False)
@click.option("--keep", type=click.IntRange(0), default=3, show_default=True, help="Newest versions of each model.")
@click.option(
    "--older-than",
    type=click.FloatRange(0),
    default=7.0,
    show_default=True,
    help="Days since a version, and the run that made it, were last touched.",
)
@click.option("--dry-run", is_flag=True, help="Only list what would go.")
@json_option
@friendly
def models_gc(model: str | None, keep: int, older_than: float, dry_run: bool, as_json: bool) -> int:
    """Remove old versions that no alias points at, and files that no version refers to.

    Of MODEL, or of all models. Versions that `pennyweight run` did not register, and those of runs that are not
    finished, stay; so does one that another version is a copy of. An alias of any name keeps a version.
    """
    from pennyweight import show, tracking

    found = tracking.collect_models(model, keep, older_than, dry_run)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        click.echo(show.format_models_collection(found))
    return 0
