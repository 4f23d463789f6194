"""The history of a registered model: a log in the registry that can only grow, and whose order is beyond dispute.

MLflow's aliases have neither a history nor a compare-and-swap. Its version numbers have both: the store gives each
once, in order, together with the version's tags, and not again after a deletion. So the history of `NAME` is a
registered model of its own, `NAME.history`, with a version for each change. A change says which change its writer had
seen last (`after`). It counts when no other that counts came in between; of several that were made at once, therefore,
exactly one does, and every reader agrees which.

A change is written before the aliases move, and is marked as done afterwards. Whoever finds the last one not done moves
the aliases as it says (`complete`).
"""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from pydantic import ConfigDict, Field, ValidationError

from pennyweight.errors import TrackingError
from pennyweight.probe import Trial
from pennyweight.records import Record
from pennyweight.tracking.connection import is_missing, set_alias

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, PREVIOUS = "champion", "previous"

#: Tag of a registered model that is a history; its value names the model.
LEDGER = "pennyweight.ledger"
#: Tag of a registered model; its value names its history.
HISTORY = "pennyweight.history"
CHANGE, STATE, NOTE = "pennyweight.change", "pennyweight.state", "pennyweight.note"

#: Seconds that a change which another process has just written has to be done, before it is taken for abandoned.
PATIENCE = 5.0

Action = Literal["promote", "rollback"]
#: `void`: another change came first; `failed`: its version was gone before the aliases had moved.
State = Literal["begun", "done", "void", "failed"]


class Checks(Record):
    """What was checked of a version before it became champion."""

    model_config = ConfigDict(extra="ignore")

    verdict: str = Field(description="of the gate")
    files_digest: str = Field(description="sha256 that its files were found to have, as judged")
    evidence_digest: str
    signed_by: str | None = Field(None, description="sha256 of the public key that the signature was verified with")
    trial: Trial | None = Field(None, description="None where its runtime is missing or nothing is known to ask")
    overridden: list[str] = Field([], description="what was not as it must be, and was forced")


class Change(Record):
    """One change of the champion. What a later version of this program adds to it is not read, and not lost."""

    model_config = ConfigDict(extra="ignore")

    key: str = Field(default_factory=lambda: uuid4().hex, description="that its writer knows it by")
    action: Action
    version: str = Field(description="that becomes champion")
    replaced: str | None = Field(None, description="champion until then, which becomes `previous`")
    candidate: str | None = Field(None, description="that the version was registered from")
    run_id: str | None = Field(None, description="MLflow run that made it")
    who: str
    when: str = Field(description="ISO 8601, UTC, by the clock of the machine that made the change")
    why: str = ""
    checks: Checks
    noticed: list[str] = Field([], description="what was odd about the aliases before")


class Entry(Record):
    """A change in the history."""

    number: int
    after: int = Field(description="number of the change that its writer had seen last; 0: none")
    change: Change
    state: State
    note: str = ""


def ledger_name(model: str) -> str:
    return f"{model}.history"


def who() -> str:
    """Who asks: the registry's user where one is set, else the machine's, and the machine."""
    try:
        user = os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- reading ----------------------------------------------------------------------------------------------------------


def read(client: MlflowClient, model: str) -> list[Entry]:
    """All changes of a model that are still there, the oldest first."""
    found = client.search_model_versions(f"name = '{ledger_name(model)}'")
    entries = [_parse(version) for version in sorted(found, key=lambda version: int(version.version))]
    last, counted = 0, []
    for entry in entries:
        if entry.after < last:
            counted.append(entry.model_copy(update={"state": "void"}))
            continue
        last = entry.number
        counted.append(entry)
    return counted


def last_that_counts(entries: list[Entry]) -> Entry | None:
    return next((entry for entry in reversed(entries) if entry.state != "void"), None)


def _parse(version: ModelVersion) -> Entry:
    try:
        return Entry(
            number=int(version.version),
            after=int(version.tags["pennyweight.after"]),
            change=Change.model_validate_json(version.tags[CHANGE]),
            state=version.tags.get(STATE, "begun"),
            note=version.tags.get(NOTE, ""),
        )
    except (LookupError, ValueError, ValidationError) as error:
        raise TrackingError(
            f"version {version.version} of {version.name} is no entry of a history",
            f"Pennyweight keeps changes of the champion under that name: delete the version, or rename {version.name}",
        ) from error


# --- writing ----------------------------------------------------------------------------------------------------------


def append(client: MlflowClient, model: str, after: int, change: Change) -> Entry:
    """Claim the next place in the history for a change. Raises TrackingError where another change came first."""
    _refuse_overtaken(read(client, model), model, after)
    failure = None
    try:
        client.create_model_version(
            ledger_name(model),
            source=f"models:/{model}/{change.version}",
            tags=_tags(after, change),
            description=describe(model, change),
        )
    except Exception as error:  # it may be written all the same: an answer can be lost
        failure = error
    entries = read(client, model)
    mine = next((entry for entry in entries if entry.change.key == change.key), None)
    if mine is None:
        _refuse_overtaken(entries, model, after)
        assert failure
        raise failure
    if mine.state == "void":
        with contextlib.suppress(Exception):  # every reader sees that without the mark, which is for people
            mark(client, model, mine.number, "void", "another change came first")
        _refuse_overtaken([entry for entry in entries if entry.number < mine.number], model, after)
    return mine


def mark(client: MlflowClient, model: str, number: int, state: State, note: str = "") -> None:
    client.set_model_version_tag(ledger_name(model), str(number), STATE, state)
    if note:
        client.set_model_version_tag(ledger_name(model), str(number), NOTE, note)


def complete(client: MlflowClient, model: str, entry: Entry, note: str = "") -> bool:
    """Move the aliases as a change says, and mark it as done; False where its version is gone.

    A process that was held up may do this late, after others have changed the champion again. So whoever has moved
    aliases looks at the history once more, and ends with what the last change says.
    """
    while True:
        try:
            move(client, model, entry.change)
        except Exception as error:
            if not is_missing(error):
                raise
            mark(client, model, entry.number, "failed", "its version was deleted before the aliases had moved")
            return False
        mark(client, model, entry.number, "done", note)
        newest = last_that_counts(read(client, model))
        if newest is None or newest.number <= entry.number:
            return True
        entry, note = newest, ""


def move(client: MlflowClient, model: str, change: Change) -> None:
    """`previous` first: until the champion has moved too, nobody is served anything else."""
    if change.replaced is not None:
        try:
            set_alias(client, model, PREVIOUS, change.replaced)
        except Exception as error:
            if not is_missing(error):  # a version that was deleted cannot be gone back to
                raise
    set_alias(client, model, CHAMPION, change.version)


def settle(client: MlflowClient, model: str) -> tuple[list[Entry], str | None]:
    """The history with its last change done, and what had to be mended for that."""
    deadline = time.monotonic() + PATIENCE
    while True:
        entries = read(client, model)
        last = last_that_counts(entries)
        if last is None or last.state != "begun":
            return entries, None
        if time.monotonic() >= deadline:
            break
        time.sleep(0.2)
    what = f"change {last.number}, a {last.change.action} by {last.change.who}, was left half done"
    complete(client, model, last, f"finished by {who()}, {now()}")
    entries = read(client, model)
    outcome = next(entry for entry in entries if entry.number == last.number)
    if outcome.state == "failed":
        return entries, f"{what}; {outcome.note}"
    return entries, f"{what}; the aliases were moved as it says: version {last.change.version} is {CHAMPION}"


def _refuse_overtaken(entries: list[Entry], model: str, after: int) -> None:
    first = next((entry for entry in entries if entry.number > after and entry.state != "void"), None)
    if first is None:
        return
    done = first.change
    raise TrackingError(
        f"{model}: nothing was moved, as {done.who} made version {done.version} the {CHAMPION} meanwhile "
        f"({done.action}, change {first.number})",
        f"look at `pennyweight history {model}`, and try again if it is still wanted",
    )


def prepare(client: MlflowClient, model: str) -> None:
    """Make the history of a model where there is none. To be called before `append`.

    Raises what MLflow does where the caller may not change the model, and TrackingError where another model has the
    history's name.
    """
    from mlflow import MlflowException

    name = ledger_name(model)
    note = (
        f"The history of the registered model `{model}`: a version for each promotion and rollback, with who, when, "
        f"why and what was checked. It holds no model of its own; `pennyweight history {model}` prints it. "
        "Pennyweight reads it before it moves an alias, so leave it as it is."
    )
    # Whoever may not change the model must not begin a change either, which the next command would finish.
    client.set_registered_model_tag(model, HISTORY, name)
    try:
        client.create_registered_model(name, tags={LEDGER: model}, description=note)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        if client.get_registered_model(name).tags.get(LEDGER) != model:
            raise TrackingError(
                f"{name} is a registered model, and the history of {model} is kept under that name",
                "rename it",
            ) from error


def _tags(after: int, change: Change) -> dict[str, Any]:
    shown = {
        "action": change.action,
        "version": change.version,
        "replaced": change.replaced,
        "candidate": change.candidate,
        "who": change.who,
        "why": change.why,
        "forced": "; ".join(change.checks.overridden),
    }
    return {
        **{f"pennyweight.{name}": value for name, value in shown.items() if value},
        "pennyweight.after": after,
        CHANGE: change.model_dump_json(),
        STATE: "begun",
    }


def describe(model: str, change: Change) -> str:
    """A change in Markdown, for a reader of the registry."""
    before = f", in place of version {change.replaced}" if change.replaced else ""
    candidate = f" ({change.candidate})" if change.candidate else ""
    lines = [f"**{change.action}**: {model} version {change.version}{candidate} became {CHAMPION}{before}.", ""]
    lines += [f"- {line}" for line in facts(change)]
    return "\n".join(lines)


def facts(change: Change) -> list[str]:
    """Who, why, and what was checked, a line each."""
    checks = change.checks
    lines = [f"{change.when}, {change.who}" + (f": {change.why}" if change.why else "")]
    signed = f", signed by key {checks.signed_by[:12]}" if checks.signed_by else ""
    lines.append(f"gate: {checks.verdict}; files {checks.files_digest[:12]} are those that were judged{signed}")
    if checks.trial:
        lines.append(f"loaded: {checks.trial.describe()}")
    lines += [f"forced: {reason}" for reason in checks.overridden]
    lines += [f"noticed: {what}" for what in change.noticed]
    if change.run_id:
        lines.append(f"run {change.run_id}")
    return lines
