"""The command line: thin, no logic. Data goes to stdout, progress and messages to stderr."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from pennyweight import __version__
from pennyweight.commands.common import Commands, friendly, json_option, print_json, say
from pennyweight.commands.lifecycle import history, promote, rollback
from pennyweight.commands.load import bench, cost, list_prices
from pennyweight.commands.models import models
from pennyweight.commands.prune import prune_scan
from pennyweight.commands.serve import serve
from pennyweight.commands.store import store
from pennyweight.errors import PennyweightError, UsageError, did_you_mean


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="pennyweight")
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
def main(debug: bool) -> None:
    """Declare how to make a language model cheaper; get the cheapest variant that is still good.

    Exit codes: 0 there is a winner, or the command did its work; 1 nothing passed, or nothing was cheaper; 2 a bad
    recipe or a wrong call; 3 inconclusive, more samples needed; 4 a stage failed.
    """
    click.get_current_context().obj = {"debug": debug}


def recipe_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.argument("more", nargs=-1, metavar="[KEY=VALUE]...")(command)
    command = click.argument("recipe", metavar="RECIPE")(command)
    return click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a value of the recipe; can be repeated."
    )(command)


def runs_option(command: Callable[..., Any]) -> Callable[..., Any]:
    option = click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
    return option(command)


def limit_option(command: Callable[..., Any]) -> Callable[..., Any]:
    option = click.option("--limit", type=int, default=10, show_default=True, help="Flipped questions to print.")
    return option(command)


def junit_option(command: Callable[..., Any]) -> Callable[..., Any]:
    option = click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write JUnit XML too.")
    return option(command)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


@main.command()
@recipe_arguments
@json_option
@friendly
def validate(recipe: str, more: tuple[str, ...], overrides: tuple[str, ...], as_json: bool) -> int:
    """Check a recipe, or a suite, without running anything."""
    from pennyweight.recipe import is_suite, load_suite

    if is_suite(recipe) and not (overrides or more):
        suite = load_suite(recipe)
        if as_json:
            print_json(suite.model_dump(mode="json", by_alias=True))
        else:
            click.echo(f"{recipe}: valid; measures {', '.join(suite.metrics())}")
        return 0
    loaded, _ = _load(recipe, overrides, more)
    if as_json:
        print_json(loaded.dump())
    else:
        names = ", ".join(f"{variant}@{runtime}" for variant, runtime in loaded.candidates())
        click.echo(f"{recipe}: valid; candidates {names}")
    return 0


@main.command()
@recipe_arguments
@json_option
@friendly
def plan(recipe: str, more: tuple[str, ...], overrides: tuple[str, ...], as_json: bool) -> int:
    """Estimate sizes, memory, time and disk of a run, and say what will not fit. Downloads nothing."""
    from pennyweight.plan import format_plan, make_plan
    from pennyweight.store import Store

    loaded, path = _load(recipe, overrides, more)
    made = make_plan(loaded, Store(), file=str(path))
    if as_json:
        print_json(made.model_dump(mode="json"))
    else:
        click.echo(format_plan(made))
    return 2 if made.problems else 0


@main.command()
@recipe_arguments
@runs_option
@json_option
@friendly
def run(recipe: str, more: tuple[str, ...], overrides: tuple[str, ...], runs: Path, as_json: bool) -> int:
    """Run a recipe: make the variants, judge them, price them, register the winner."""
    from pennyweight import flow, show
    from pennyweight.distillation import crew
    from pennyweight.gate import EXIT_CODES
    from pennyweight.store import Store

    together = crew.join()
    if together and together.rank:
        return together.follow(say)
    with together or nullcontext():
        loaded, path = _load(recipe, overrides, more)
        if together:
            together.check(loaded)
        record = flow.run(loaded, path, runs, Store(), say)
    if as_json:
        print_json(record.model_dump(mode="json", by_alias=True))
    else:
        click.echo(show.format_run(record))
    say(f"report: {Path(record.run_dir) / flow.REPORT_FILE}")
    if record.tracking_error:
        say(f"error: {record.tracking_error}")
        say("hint: nothing is lost; `pennyweight report --log`, or the next run, logs it")
        return 4
    return EXIT_CODES[record.status]


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path), default=Path("runs/latest"))
@click.option("--candidate", metavar="ID", help="List the answers of this candidate that differ.")
@click.option("--task", metavar="NAME", help="Only those of one task.")
@click.option("--markdown", is_flag=True, help="Print Markdown, for a pull request.")
@limit_option
@junit_option
@json_option
@friendly
def show(
    run_dir: Path,
    candidate: str | None,
    task: str | None,
    markdown: bool,
    limit: int,
    junit: Path | None,
    as_json: bool,
) -> int:
    """Print a run's outcome (the newest by default), or what one candidate answers otherwise than the base."""
    from pennyweight import show as show_

    if markdown and (candidate or task):
        raise UsageError("--markdown prints the outcome", "leave --candidate and --task out")
    record = show_.load_run(run_dir)
    if junit:
        from pennyweight import junit as junit_

        _write(junit, junit_.of_run(record))
    if candidate or task:
        _show_flips(record, candidate, task, limit, as_json)
    elif as_json:
        print_json(record.model_dump(mode="json", by_alias=True))
    else:
        click.echo(show_.format_markdown(record) if markdown else show_.format_run(record))
    return 0


def _show_flips(record: Any, candidate: str | None, task: str | None, limit: int, as_json: bool) -> None:
    from pennyweight import compare as compare_

    name = candidate or record.winner
    if name is None:
        raise UsageError("the run has no winner", "name a candidate with --candidate")
    theirs = compare_.reference_rows(record)
    tasks = sorted({row["task"] for row in theirs})
    if task is not None and task not in tasks:
        raise UsageError(f"the run has no task {task!r}", did_you_mean(task, tasks))
    found = compare_.flips_of_candidate(record, compare_.find(record, name), theirs)
    flips = [flip for flip in found if task in (None, flip.task)]
    if as_json:
        print_json([flip.model_dump(mode="json") for flip in flips])
    else:
        click.echo(f"{name} (ours) against the base in transformers (theirs)\n")
        click.echo("\n".join(compare_.format_flips(flips, limit)))


@main.command()
@click.argument("ours", metavar="RUN[:CANDIDATE]")
@click.argument("theirs", metavar="RUN[:CANDIDATE]")
@click.option("--markdown", is_flag=True, help="Print Markdown, for a pull request.")
@limit_option
@junit_option
@json_option
@friendly
def compare(ours: str, theirs: str, markdown: bool, limit: int, junit: Path | None, as_json: bool) -> int:
    """Compare two candidates of any runs, question by question (each run's winner by default)."""
    from pennyweight import compare as compare_

    found = compare_.compare(compare_.locate(ours), compare_.locate(theirs))
    if junit:
        from pennyweight import junit as junit_

        _write(junit, junit_.of_comparison(found))
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        click.echo(compare_.format_markdown(found) if markdown else compare_.format_comparison(found, limit))
    return 0


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path), default=Path("runs/latest"))
@click.option(
    "--log", is_flag=True, help="Log the run to MLflow too, and register its winner, where that failed before."
)
@friendly
def report(run_dir: Path, log: bool) -> int:
    """Write a run's HTML report again."""
    from pennyweight import flow
    from pennyweight import show as show_
    from pennyweight.report import write_report

    record = show_.load_run(run_dir)
    if log:
        record = flow.log_again(record)
    target = Path(record.run_dir) / flow.REPORT_FILE
    write_report(record, target)
    click.echo(str(target))
    if record.tracking_error and log:
        raise PennyweightError(
            record.tracking_error, "the run's own record is complete; try again when the server answers"
        )
    return 0


main.add_command(promote)
main.add_command(rollback)
main.add_command(history)


@main.command()
@click.argument("source", metavar="RUN[:CANDIDATE]|CHECKPOINT")
@click.option("--format", "kind", required=True, metavar="FORMAT", help="gguf, gptq, compressed-tensors or onnx.")
@click.option("--to", "target", required=True, type=click.Path(path_type=Path), metavar="PATH", help="What to write.")
@json_option
@friendly
def export(source: str, kind: str, target: Path, as_json: bool) -> int:
    """Write a checkpoint (a run's winner by default) as a file for another engine, its integers unchanged."""
    from pennyweight import formats

    done = formats.export(source, kind, target)
    if as_json:
        print_json(done.model_dump(mode="json"))
    else:
        click.echo(done.describe())
    return 0


@main.command()
@click.option("--port", type=int, default=5000, show_default=True)
@friendly
def ui(port: int) -> int:
    """Open the MLflow UI on the store that runs are logged to."""
    from pennyweight import tracking

    command = tracking.ui_command(port)
    # Without the parameter MLflow opens on its pages for traces of agents.
    say(f"MLflow on http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning (Ctrl-C stops it)")
    os.execvp(command[0], command)


main.add_command(serve)
main.add_command(store)
main.add_command(models)
main.add_command(prune_scan)
main.add_command(bench)
main.add_command(cost)
main.add_command(list_prices)


@main.command()
@json_option
@friendly
def doctor(as_json: bool) -> int:
    """Say what this machine has, and what each runtime can do here."""
    from pennyweight import doctor as doctor_
    from pennyweight import show as show_

    found = doctor_.doctor()
    if as_json:
        print_json(found)
    else:
        click.echo(show_.format_doctor(found))
    return 0


def _load(recipe: str, overrides: tuple[str, ...], more: tuple[str, ...]) -> Any:
    from pennyweight import shipped
    from pennyweight.recipe import load_recipe

    for word in more:
        if "=" not in word:
            raise UsageError(f"unexpected argument {word!r}", "after the recipe come KEY=VALUE pairs")
    return load_recipe(recipe, [*overrides, *more]), shipped.recipe_path(recipe)
