"""The model registry: winners enter as they are, and a challenger whose files prove to be the same becomes champion."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from pennyweight.errors import SourceError, TrackingError, UsageError, did_you_mean
from pennyweight.records import Candidate, CandidateResult, Record, Registered, RunRecord
from pennyweight.store import file_digest
from pennyweight.tracking import naming
from pennyweight.tracking.connection import is_missing, session, tracking_uri
from pennyweight.tracking.evidence import EVIDENCE, describe_difference, digest_of_files, file_digests, make_evidence

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"

#: Tag of a version that failed verification; its value says how.
DISTRUSTED = "pennyweight.distrusted"

_URI = re.compile(r"models:/(?:(?P<id>m-[0-9a-f]{32})|(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+)))")
_URI_FORMS = "write models:/NAME@ALIAS, models:/NAME/VERSION or models:/m-ID"
_RUN_AGAIN = "run the recipe again: what is still in the store is reused, and the winner is registered anew"


class Promotion(Record):
    """What `promote` did."""

    model: str
    version: str
    candidate: str | None = Field(None, description="the candidate that the version was registered from")
    digest: str | None = Field(None, description="digest that its files were found to have")
    replaced: str | None = Field(None, description="the version that was champion, now `previous`")
    changed: bool = Field(description="False where the version was the champion already")
    uri: str

    def describe(self) -> str:
        what = f"{self.model} version {self.version}" + (f" ({self.candidate})" if self.candidate else "")
        if not self.changed:
            return f"{what} is the champion already; nothing changed"
        before = f"; version {self.replaced} is {PREVIOUS}" if self.replaced else ""
        return f"{what} is the champion now: its files are those that passed the gate{before}"


# --- registering ------------------------------------------------------------------------------------------------------


def register_winner(
    client: MlflowClient, record: RunRecord, experiment_id: str, parent: str, children: Mapping[str, str]
) -> Registered | None:
    """Make the winner's files a version of the recipe's model, without an alias yet; None where there is none to make.

    Files that this recipe has registered already are not uploaded again. `parent` and `children` (by candidate) are
    ids of runs.
    """
    from mlflow.entities import LoggedModelOutput

    model = record.recipe.resolved.get("register")
    winner = naming.result_of(record, record.winner)
    if not model or winner is None:
        return None
    assert winner.candidate is not None
    version = _registered_before(client, model, winner.candidate.digest, record.recipe.digest)
    if version is None:
        version = _register(client, record, winner, experiment_id, parent, children[winner.id], model)
    else:
        client.set_model_version_tag(model, version.version, "pennyweight.run_id", parent)
    for run_id in (parent, children[winner.id]):  # so that both runs' pages link to the model
        client.log_outputs(run_id, [LoggedModelOutput(version.source.removeprefix("models:/"), step=0)])
    return parse_registered(f"models:/{model}/{version.version}")


def set_challenger(client: MlflowClient, registered: Registered) -> None:
    client.set_registered_model_alias(registered.model, CHALLENGER, registered.version)


def parse_registered(uri: str | None) -> Registered | None:
    """`models:/NAME/VERSION` as the record of a registered winner."""
    match = _URI.fullmatch(uri or "")
    if match is None:
        return None
    return Registered(model=match["name"], version=match["version"], alias=CHALLENGER, uri=match[0])


def _registered_before(client: MlflowClient, model: str, digest: str, recipe_digest: str) -> ModelVersion | None:
    """The newest version of `model` with these files from this recipe that has not failed verification."""
    found = [
        version
        for version in client.search_model_versions(f"name = '{model}' and tags.`pennyweight.digest` = '{digest}'")
        if version.tags.get("pennyweight.recipe_digest") == recipe_digest and DISTRUSTED not in version.tags
    ]
    return max(found, key=lambda version: int(version.version), default=None)


def _register(
    client: MlflowClient,
    record: RunRecord,
    winner: CandidateResult,
    experiment_id: str,
    parent: str,
    child: str,
    model: str,
) -> ModelVersion:
    from mlflow.entities import LoggedModelStatus

    assert winner.candidate is not None
    folder = Path(winner.candidate.path)
    files = _judged_files(winner.candidate)
    tags = version_tags(record, winner, parent)
    _create_model(client, model, record)
    logged = client.create_logged_model(
        experiment_id,
        name=re.sub(r"[^\w@-]", "-", winner.id),
        source_run_id=child,
        tags=tags,
        params={name: value for name, value in naming.candidate_params(record, winner).items() if name != "steps"},
        model_type=f"pennyweight/{winner.runtime}",
    )
    client.log_model_artifacts(logged.model_id, str(folder))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / EVIDENCE
        path.write_text(json.dumps(make_evidence(record, winner, files), indent=1, allow_nan=False) + "\n")
        tags["pennyweight.evidence_digest"] = file_digest(path)
        client.log_model_artifacts(logged.model_id, scratch)
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    return client.create_model_version(
        model,
        source=f"models:/{logged.model_id}",
        run_id=parent,
        tags=tags,
        description=version_note(record, winner),
        model_id=logged.model_id,
    )


def version_tags(record: RunRecord, winner: CandidateResult, parent: str) -> dict[str, str]:
    """What a reader of the registry needs to know a version by. Numbers are rounded; the evidence has them whole."""
    assert winner.candidate is not None
    numbers: dict[str, float] = {}
    if point := naming.point_at(winner, naming.decide_at(record)):
        numbers["usd_per_1m_tokens"] = point.usd_per_1m_tokens
        if point.saving:
            numbers |= {"saving": point.saving.value, "saving_low": point.saving.low}
    if winner.quality and "kl_mean" in winner.quality.metrics:
        numbers["kl_mean"] = winner.quality.metrics["kl_mean"].value
    texts = {
        "candidate": winner.id,
        "runtime": winner.runtime,
        "digest": winner.candidate.digest,
        "checkpoint_digest": winner.candidate.checkpoint.digest,
        "verdict": winner.verdict.status,
        "recipe": record.name,
        "recipe_digest": record.recipe.digest,
        "run_id": parent,
    }
    return {f"pennyweight.{name}": value for name, value in texts.items()} | {
        f"pennyweight.{name}": f"{value:.4g}" for name, value in numbers.items()
    }


def version_note(record: RunRecord, winner: CandidateResult) -> str:
    reasons = [f"- {reason}" for reason in winner.verdict.reasons]
    opening = f"{naming.outcome(record)} Recipe `{record.name}`, verdict {winner.verdict.status}:"
    return "\n".join([opening, "", *reasons, "", f"The evidence in full is in `{EVIDENCE}`, beside the model's files."])


def _create_model(client: MlflowClient, model: str, record: RunRecord) -> None:
    from mlflow import MlflowException

    note = (
        f"Winners of Pennyweight recipes. `{CHALLENGER}` passed the gate last, `{CHAMPION}` is served, "
        f"`{PREVIOUS}` was served before. `pennyweight promote {model}` makes the challenger the champion."
    )
    try:
        client.create_registered_model(model, tags={"pennyweight.recipe": record.name}, description=note)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _judged_files(candidate: Candidate) -> dict[str, str]:
    """sha256 of each of the candidate's files. Raises TrackingError unless they are those that were judged."""
    folder = Path(candidate.path)
    if not folder.is_dir():
        raise TrackingError(f"the winner's files are gone from {folder}", _RUN_AGAIN)
    if (folder / EVIDENCE).exists():
        raise TrackingError(
            f"{folder} has a file {EVIDENCE} of its own", "rename it: evidence is registered by that name"
        )
    files = file_digests(folder)
    if digest_of_files(files) != candidate.digest:
        raise TrackingError(f"the winner's files in {folder} are not those that were judged", _RUN_AGAIN)
    return files


# --- promoting --------------------------------------------------------------------------------------------------------


def promote(model: str, version: int | None = None) -> Promotion:
    """Make the challenger, or the version given, the champion; the champion before it becomes `previous`.

    First its files must prove to be those that passed the gate: their digest, the evidence and its verdict are
    checked. Nothing moves otherwise. Raises UsageError for an unknown model or version, or where there is no
    challenger, and TrackingError for files or evidence that cannot be trusted.
    """
    with session(f"{model} was not promoted") as client:
        aliases = _aliases(client, model)
        chosen = _chosen(client, model, version, aliases)
        number, before = str(chosen.version), aliases.get(CHAMPION)  # MLflow's SQL stores say int, its server str
        facts = {
            "model": model,
            "version": number,
            "candidate": chosen.tags.get("pennyweight.candidate"),
            "uri": f"models:/{model}@{CHAMPION}",
        }
        if before == number:
            return Promotion(**facts, changed=False)
        try:
            digest = verify(client, chosen)
        except TrackingError as error:
            _distrust(client, chosen, error)
            raise
        if before is not None:
            client.set_registered_model_alias(model, PREVIOUS, before)
        client.set_registered_model_alias(model, CHAMPION, number)
        return Promotion(**facts, digest=digest, replaced=before, changed=True)


def verify(client: MlflowClient, version: ModelVersion) -> str:
    """The digest of a version's files, when they are those that passed the gate. Raises TrackingError when not."""
    name = f"{version.name} version {version.version}"
    recorded, evidence_digest = (version.tags.get(f"pennyweight.{key}") for key in ("digest", "evidence_digest"))
    if not recorded or not evidence_digest:
        raise TrackingError(
            f"{name} carries no evidence that it passed a gate", "promote versions that `pennyweight run` registered"
        )
    with _located(client, client.get_model_version_download_uri(version.name, version.version)) as folder:
        path = folder / EVIDENCE
        if not path.is_file():
            raise TrackingError(f"{name} has lost its evidence, {EVIDENCE}", _RUN_AGAIN)
        if file_digest(path) != evidence_digest:
            raise TrackingError(f"{name}: the evidence, {EVIDENCE}, was changed after it was registered", _RUN_AGAIN)
        attached = json.loads(path.read_text())
        files = file_digests(folder)
    status = attached["verdict"]["status"]
    if status != "pass":
        raise TrackingError(
            f"{name} did not pass the gate: its verdict is {status}", "only what passed can be promoted"
        )
    digest = digest_of_files(files)
    if digest != recorded or attached["candidate"]["digest"] != recorded:
        difference = describe_difference(attached["files"], files)
        raise TrackingError(f"{name}: its files are not those that passed the gate: {difference}", _RUN_AGAIN)
    return digest


def _distrust(client: MlflowClient, version: ModelVersion, error: TrackingError) -> None:
    """Note on one of our versions that it failed verification, so that the next run registers the files anew."""
    if "pennyweight.digest" in version.tags:
        client.set_model_version_tag(version.name, version.version, DISTRUSTED, error.message)


def _aliases(client: MlflowClient, model: str) -> dict[str, str]:
    """Alias → version of a registered model. Raises UsageError when there is no such model."""
    from mlflow import MlflowException

    try:
        return {alias: str(version) for alias, version in client.get_registered_model(model).aliases.items()}
    except MlflowException as error:
        if not is_missing(error):
            raise
        raise UsageError(f"no registered model {model!r}", _known_models(client, model)) from error


def _known_models(client: MlflowClient, model: str) -> str:
    known = [found.name for found in client.search_registered_models(max_results=1000)]
    return (
        did_you_mean(model, known)
        or "nothing is registered yet: a run registers the winner of a recipe with `register`"
    )


def _chosen(client: MlflowClient, model: str, version: int | None, aliases: Mapping[str, str]) -> ModelVersion:
    from mlflow import MlflowException

    number = str(version) if version is not None else aliases.get(CHALLENGER)
    if number is None:
        raise UsageError(
            f"{model} has no {CHALLENGER}", "a run that has a winner makes one; or choose a version with --version"
        )
    try:
        return client.get_model_version(model, number)
    except MlflowException as error:
        if not is_missing(error):
            raise
        known = sorted(int(found.version) for found in client.search_model_versions(f"name = '{model}'"))
        hint = f"versions: {', '.join(map(str, known))}" if known else "it has no versions"
        raise UsageError(f"{model} has no version {number}", hint) from error


# --- fetching ---------------------------------------------------------------------------------------------------------


def fetch_model(uri: str, dst: Path) -> Path:
    """Download a registered model's files into `dst`, which is returned.

    `uri` is `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `models:/m-ID`. Where evidence lies beside the files, they
    are checked against it. Raises SourceError for a URI of another form, for what is not registered, and for files that
    are not those that were registered.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise SourceError(f"{uri!r} names no registered model", _URI_FORMS)
    with session(f"{uri} was not fetched") as client:
        location = _location(client, match)
        dst.mkdir(parents=True, exist_ok=True)
        with _located(client, location, dst) as folder:
            if not any(folder.iterdir()):
                raise SourceError(f"{uri} has no files", "it may be a record of a model that is kept elsewhere")
            _check_evidence(folder, uri)
    return dst


def _check_evidence(folder: Path, uri: str) -> None:
    if not (folder / EVIDENCE).is_file():
        return
    try:
        registered = json.loads((folder / EVIDENCE).read_text())["files"]
    except (ValueError, LookupError, TypeError) as error:
        raise SourceError(f"{uri}: its evidence, {EVIDENCE}, cannot be read", _RUN_AGAIN) from error
    found = file_digests(folder)
    if found != registered:
        difference = describe_difference(registered, found)
        raise SourceError(f"{uri}: its files are not those that were registered: {difference}", _RUN_AGAIN)


def _location(client: MlflowClient, match: re.Match[str]) -> str:
    """Where the files of a `models:/` URI are."""
    from mlflow import MlflowException

    try:
        if match["id"]:
            model = client.get_logged_model(match["id"])
            if model.status.value == "READY":
                return model.artifact_location
            raise SourceError(
                f"{match[0]} was never uploaded to its end (it is {model.status.value.lower()})", _RUN_AGAIN
            )
        name, number = match["name"], match["version"]
        if match["alias"]:
            number = client.get_model_version_by_alias(name, match["alias"]).version
        return client.get_model_version_download_uri(name, number)
    except MlflowException as error:
        if not is_missing(error) and "not found" not in str(error):
            raise
        raise SourceError(f"{match[0]} is not registered", _what_there_is(client, match)) from error


def _what_there_is(client: MlflowClient, match: re.Match[str]) -> str:
    if match["id"]:
        return _URI_FORMS
    try:
        aliases = _aliases(client, match["name"])
    except UsageError as error:
        return error.hint or _URI_FORMS
    known = ", ".join(f"{alias} (version {version})" for alias, version in sorted(aliases.items()))
    return f"{match['name']} has these aliases: {known}" if known else f"{match['name']} has no aliases; name a version"


# --- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def _located(client: MlflowClient, location: str, dst: Path | None = None) -> Iterator[Path]:
    """A folder with the files at an artifact location: `dst`, else where they are, else a temporary folder."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    repository = get_artifact_repository(location, tracking_uri=tracking_uri())
    if dst is None and isinstance(repository, LocalArtifactRepository):
        yield Path(repository.artifact_dir)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = dst or Path(scratch)
        repository.download_artifacts("", dst_path=str(folder))
        yield folder
