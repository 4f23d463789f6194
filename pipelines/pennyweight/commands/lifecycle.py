"""`promote`, `rollback` and `history`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pennyweight.commands.common import friendly, json_option, print_json, say

if TYPE_CHECKING:
    from pennyweight.tracking import Promotion


def change_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What all commands that move aliases take."""
    command = click.option("--reason", default="", metavar="TEXT", help="Kept in the history.")(command)
    command = click.option(
        "--force",
        is_flag=True,
        help="Override a verdict, a missing probe or a missing runtime, for a --reason; never changed files.",
    )(command)
    return click.option(
        "--verify-key",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        metavar="FILE",
        help="Public key that the version must be signed with; else that in $PENNYWEIGHT_VERIFY_KEY.",
    )(command)


@click.command()
@click.argument("model")
@click.option("--version", type=int, help="A version; the challenger by default.")
@change_options
@json_option
@friendly
def promote(model: str, version: int | None, reason: str, force: bool, verify_key: Path | None, as_json: bool) -> int:
    """Make the challenger the champion, once it has proved to be what passed the gate.

    Its files, evidence and signature are checked; then it is loaded, must say what it said when it was judged, and must
    answer a prompt. Only then the aliases move: the champion until now becomes `previous`.
    """
    from pennyweight import tracking

    done = tracking.promote(model, version, reason=reason, force=force, verify_key=verify_key, say=say)
    return _show(done, as_json)


@click.command()
@click.argument("model")
@change_options
@json_option
@friendly
def rollback(model: str, reason: str, force: bool, verify_key: Path | None, as_json: bool) -> int:
    """Make the previous champion the champion again, after the same checks."""
    from pennyweight import tracking

    return _show(tracking.rollback(model, reason=reason, force=force, verify_key=verify_key, say=say), as_json)


@click.command()
@click.argument("model")
@json_option
@friendly
def history(model: str, as_json: bool) -> int:
    """Print who changed a model's champion, when, why and after which checks; finish what was left half done."""
    from pennyweight import tracking

    found = tracking.history(model)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        click.echo(tracking.format_history(found))
    return 0


def _show(done: Promotion, as_json: bool) -> int:
    if as_json:
        print_json(done.model_dump(mode="json"))
    else:
        click.echo(done.describe())
    return 0
