"""`serve`."""

from __future__ import annotations

import os
import shlex
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import click

from pennyweight.commands.common import friendly, say
from pennyweight.installed import RUNTIME_PACKAGES

POSITIVE = click.IntRange(1)
SECONDS = click.FloatRange(min=0, min_open=True)


@click.command()
@click.argument("target")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--name", help="That clients ask for; the target's own by default.")
@click.option("--runtime", type=click.Choice(list(RUNTIME_PACKAGES)), help="A candidate's own by default.")
@click.option("--tokenizer", help="Folder or name; the model's own by default.")
@click.option("--max-queue", type=click.IntRange(0), default=256, show_default=True, help="Requests that may wait.")
@click.option("--max-prompt-tokens", type=POSITIVE, default=8192, show_default=True)
@click.option("--max-output-tokens", type=POSITIVE, default=4096, show_default=True)
@click.option("--max-body-bytes", type=POSITIVE, default=2 * 2**20, show_default=True)
@click.option("--timeout", type=SECONDS, default=600.0, show_default=True, help="Seconds for one request.")
@click.option("--drain-seconds", type=click.FloatRange(min=0), default=30.0, show_default=True)
@click.option(
    "--follow-seconds", type=SECONDS, default=15.0, show_default=True, help="Of NAME@ALIAS: how often to look at it."
)
@click.option(
    "--api-keys-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keys that clients may show, one a line; $PENNYWEIGHT_API_KEYS adds more, between commas.",
)
@click.option(
    "--price-card",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What `pennyweight cost RUN --json` printed; spending is counted by it.",
)
@click.option("--price-per-1m", metavar="IN:OUT", help="Dollars for a million tokens in and out, in its place.")
@click.option("--print-command", is_flag=True, help="Print the command that serves it with vLLM, and do no more.")
@friendly
def serve(
    target: str, host: str, port: int, name: str | None, runtime: str | None, tokenizer: str | None, max_queue: int,
    max_prompt_tokens: int, max_output_tokens: int, max_body_bytes: int, timeout: float, drain_seconds: float,
    follow_seconds: float, api_keys_file: Path | None, price_card: Path | None, price_per_1m: str | None,
    print_command: bool,
) -> int:  # fmt: skip
    """Serve a model over OpenAI's API.

    TARGET is a checkpoint's folder, a .gguf file, RUN[:CANDIDATE], or NAME@ALIAS of the registry, which is followed: a
    new version is loaded and checked beside the old one, and no request is lost when it takes over.

    On a machine with a GPU and vLLM, vLLM is started in place of our own server, unless --runtime names one.
    """
    from pennyweight.serving import vllm
    from pennyweight.serving.server import serve as serve_
    from pennyweight.serving.settings import Settings, read_keys, read_prices
    from pennyweight.store import Store

    settings = Settings(
        target, name, runtime, tokenizer, host, port, max_queue, max_prompt_tokens, max_output_tokens, max_body_bytes,
        timeout, drain_seconds, follow_seconds, read_keys(api_keys_file), read_prices(price_card, price_per_1m),
    )  # type: ignore[arg-type]  # fmt: skip
    if print_command or (runtime is None and vllm.is_here()):
        with ExitStack() as stack:
            command = vllm.command(settings, Store(), stack)
            environment = vllm.environment(settings)
            if print_command:
                click.echo(shlex.join(command))
                return 0
            say(f"starting vLLM: {shlex.join(command)}")
            os.execvpe(command[0], command, os.environ | environment)
    # Of its own: standard error goes to a log while libraries load a model.
    with os.fdopen(os.dup(2), "w") as stderr:
        serve_(settings, Store(), partial(print, file=stderr, flush=True))
    return 0
