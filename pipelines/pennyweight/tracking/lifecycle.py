"""From challenger to champion and back: checked, recorded in the registry, and safe against crashes and rivals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from pennyweight.errors import PennyweightError, TrackingError, UsageError
from pennyweight.records import Record
from pennyweight.tracking import checks, ledger, signing
from pennyweight.tracking.audit import drift
from pennyweight.tracking.connection import redact, session
from pennyweight.tracking.ledger import CHAMPION, PREVIOUS, Action, Change, Checks, Entry
from pennyweight.tracking.registry import CHALLENGER, DISTRUSTED, aliases_of, located, version_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


class Promotion(Record):
    """What `promote` or `rollback` did."""

    action: Action
    model: str
    version: str = Field(description="the champion now")
    candidate: str | None = Field(None, description="the candidate that the version was registered from")
    digest: str | None = Field(None, description="digest that its files were found to have")
    replaced: str | None = Field(None, description="the version that was champion, now `previous`")
    changed: bool = Field(description="False where the version was the champion already")
    uri: str
    number: int | None = Field(None, description="of the change in the history")
    checks: Checks | None = None
    noticed: list[str] = Field([], description="what was mended, or odd about the aliases before")

    def describe(self) -> str:
        what = f"{self.model} version {self.version}" + (f" ({self.candidate})" if self.candidate else "")
        if not self.changed:
            return f"{what} is the {CHAMPION} already; nothing changed"
        before = f"; version {self.replaced} is {PREVIOUS}" if self.replaced else ""
        lines = [f"{what} is the {CHAMPION} now: its files are those that passed the gate{before}"]
        if self.checks and self.checks.trial:
            lines.append(f"loaded: {self.checks.trial.describe()}")
        lines += [f"forced: {reason}" for reason in (self.checks.overridden if self.checks else [])]
        return "\n".join(lines)


def promote(
    model: str,
    version: int | None = None,
    *,
    reason: str = "",
    force: bool = False,
    verify_key: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Promotion:
    """Make the challenger, or the version given, the champion; the champion before it becomes `previous`.

    First the version must prove to be what passed the gate: files, evidence, verdict, signature (where there is a
    `verify_key`, or one in PENNYWEIGHT_VERIFY_KEY), and what it says when it is loaded. `force` overrides a verdict, a
    missing probe and a missing runtime, for a `reason`. Nothing moves otherwise. Raises UsageError for an unknown model
    or version, or where there is no challenger; TrackingError for what cannot be trusted, or where another process
    changed the champion meanwhile; StageError where the version does not say what was judged.
    """

    def choose(client: MlflowClient, aliases: Mapping[str, str], last: Entry | None) -> ModelVersion:
        number = str(version) if version is not None else aliases.get(CHALLENGER)
        if number is None:
            raise UsageError(
                f"{model} has no {CHALLENGER}", "a run that has a winner makes one; or choose a version with --version"
            )
        if version is None and last and last.change.action == "rollback" and last.change.replaced == number:
            why = f": {last.change.why}" if last.change.why else ""
            raise UsageError(
                f"the {CHALLENGER} of {model}, version {number}, was rolled back by {last.change.who}{why}",
                f"to promote it again, say --version {number}",
            )
        return version_of(client, model, number)

    return _change("promote", model, choose, reason, force, verify_key, say)


def rollback(
    model: str,
    *,
    reason: str = "",
    force: bool = False,
    verify_key: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Promotion:
    """Make `previous` the champion again, after the same checks as `promote`; the champion becomes `previous`.

    Raises UsageError where there is no version to go back to, and otherwise what `promote` raises.
    """

    def choose(client: MlflowClient, aliases: Mapping[str, str], last: Entry | None) -> ModelVersion:
        number = aliases.get(PREVIOUS)
        if number is None:
            raise UsageError(
                f"{model} has no {PREVIOUS} version to go back to",
                f"`pennyweight history {model}` says what there was, and `pennyweight promote` takes a --version",
            )
        if number == aliases.get(CHAMPION):
            raise UsageError(
                f"{CHAMPION} and {PREVIOUS} of {model} are both version {number}: there is nothing to go back to",
                f"`pennyweight promote {model} --version N` serves another version",
            )
        return version_of(client, model, number)

    return _change("rollback", model, choose, reason, force, verify_key, say)


def _change(
    action: Action,
    model: str,
    choose: Callable[[MlflowClient, Mapping[str, str], Entry | None], ModelVersion],
    reason: str,
    force: bool,
    verify_key: Path | None,
    say: Callable[[str], None],
) -> Promotion:
    if force and not reason.strip():
        raise UsageError("--force needs a --reason, which is kept in the history")
    with session(f"{model} was not {'promoted' if action == 'promote' else 'rolled back'}") as client:
        aliases_of(client, model)  # there is such a model
        entries, mended = ledger.settle(client, model)
        aliases, last = aliases_of(client, model), ledger.last_that_counts(entries)
        noticed = [*([mended] if mended else []), *drift(aliases, last)]
        for line in noticed:
            say(f"note: {line}")
        chosen = choose(client, aliases, last)
        number, before = str(chosen.version), aliases.get(CHAMPION)
        facts = {
            "action": action,
            "model": model,
            "version": number,
            "candidate": chosen.tags.get("pennyweight.candidate"),
            "uri": f"models:/{model}@{CHAMPION}",
            "noticed": noticed,
        }
        if before == number:
            return Promotion(**facts, changed=False)
        ledger.prepare(client, model)
        checked = _check(client, chosen, force, verify_key or signing.verify_key(), say)
        change = Change(
            action=action, version=number, replaced=before, candidate=facts["candidate"], run_id=chosen.run_id,
            who=ledger.who(), when=ledger.now(), why=reason.strip(), checks=checked, noticed=noticed,
        )  # fmt: skip
        with _half_way(model, action):
            entry = ledger.append(client, model, last.number if last else 0, change)
            if not ledger.complete(client, model, entry):
                raise TrackingError(f"{model} version {number} was deleted before the aliases had moved")
        return Promotion(
            **facts, digest=checked.files_digest, replaced=before, changed=True, number=entry.number, checks=checked
        )


def _check(
    client: MlflowClient, chosen: ModelVersion, force: bool, verify_key: Path | None, say: Callable[[str], None]
) -> Checks:
    checks.require_evidence(chosen)
    with located(client, client.get_model_version_download_uri(chosen.name, chosen.version)) as folder:
        try:
            evidence = checks.verify(chosen, folder)
        except TrackingError as error:
            _distrust(client, chosen, error)
            raise
        return checks.examine(chosen, folder, evidence, force, verify_key, say)


def _distrust(client: MlflowClient, version: ModelVersion, error: TrackingError) -> None:
    """Note on a version that it failed verification, so that the next run registers the files anew."""
    client.set_model_version_tag(version.name, version.version, DISTRUSTED, error.message)


@contextmanager
def _half_way(model: str, action: Action) -> Iterator[None]:
    """What goes wrong in here may leave a change half done, which the next command finishes."""
    try:
        yield
    except PennyweightError:
        raise
    except Exception as error:
        reason = next(iter(redact(str(error)).splitlines()), type(error).__name__)
        raise TrackingError(
            f"{model}: the registry failed in the middle of the {action}: {reason}",
            f"`pennyweight history {model}` says whether it was recorded, and finishes it if it was",
        ) from error
