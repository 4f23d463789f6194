"""What all commands share: errors that read as messages, exit codes, printing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from pennyweight.errors import PennyweightError, did_you_mean
from pennyweight.store import is_full

EXIT_INTERRUPTED = 130


class Commands(click.Group):
    """A group that helps with a mistyped command, and lists commands in the order that they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise click.UsageError(f"no command {args[0]!r}; {did_you_mean(args[0], list(self.commands))}", ctx)
        return super().resolve_command(ctx, args)


def friendly(command: Callable[..., int | None]) -> Callable[..., None]:
    """Turn our errors into a message and an exit code, and a returned number into the exit code."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        debug = (click.get_current_context().find_root().obj or {}).get("debug")
        try:
            code = command(*args, **kwargs)
        except PennyweightError as error:
            if debug:
                raise
            say(f"error: {error}")
            code = error.exit_code
        except KeyboardInterrupt:
            say("stopped; finished stages are kept, so the same command goes on where it was")
            code = EXIT_INTERRUPTED
        except Exception as error:
            if debug:
                raise
            if is_full(error):
                message, hint = f"the disk is full: {error}", "free some and run the same command again"
            else:
                message = f"{type(error).__name__}: {error}"
                hint = "this is a fault of ours or of a library; `pennyweight --debug …` shows where it happened"
            say(f"error: {message}\nhint: {hint}")
            code = 4
        sys.exit(code or 0)

    return wrapped


def say(line: str) -> None:
    click.echo(line, err=True)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1))
