"""The model registry: winners enter as they are, with what must be known of them, and are fetched as they entered."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight import checkpoints
from pennyweight.errors import SourceError, TrackingError, UsageError, did_you_mean
from pennyweight.records import Candidate, CandidateResult, Registered, RunRecord
from pennyweight.store import file_digest
from pennyweight.tracking import naming, signing
from pennyweight.tracking.bom import make_bom
from pennyweight.tracking.card import make_card, make_description
from pennyweight.tracking.checks import RUN_AGAIN, check_evidence, refuse_formats
from pennyweight.tracking.connection import is_missing, session, set_alias, tracking_uri
from pennyweight.tracking.evidence import (
    BOM,
    CARD,
    DOCUMENTS,
    EVIDENCE,
    EVIDENCE_VERSION,
    SIGNATURE,
    digest_of_files,
    file_digests,
    make_evidence,
    unknown_formats,
)
from pennyweight.tracking.ledger import CHAMPION, LEDGER, PREVIOUS, ledger_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER = "challenger"

#: Tag of a version that failed verification; its value says how.
DISTRUSTED = "pennyweight.distrusted"

_URI = re.compile(r"models:/(?:(?P<id>m-[0-9a-f]{32})|(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+)))")
_URI_FORMS = "write models:/NAME@ALIAS, models:/NAME/VERSION or models:/m-ID"


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
    version = _registered_before(client, model, winner.candidate.digest, record)
    if version is None:
        version = _register(client, record, winner, experiment_id, parent, children[winner.id], model)
    else:
        client.set_model_version_tag(model, version.version, "pennyweight.run_id", parent)
    for run_id in (parent, children[winner.id]):  # so that both runs' pages link to the model
        client.log_outputs(run_id, [LoggedModelOutput(version.source.removeprefix("models:/"), step=0)])
    return parse_registered(f"models:/{model}/{version.version}")


def set_challenger(client: MlflowClient, registered: Registered) -> None:
    set_alias(client, registered.model, CHALLENGER, registered.version)


def parse_registered(uri: str | None) -> Registered | None:
    """`models:/NAME/VERSION` as the record of a registered winner."""
    match = _URI.fullmatch(uri or "")
    if match is None:
        return None
    return Registered(model=match["name"], version=match["version"], alias=CHALLENGER, uri=match[0])


def _registered_before(client: MlflowClient, model: str, digest: str, record: RunRecord) -> ModelVersion | None:
    """The newest version of `model` with these files from this recipe that has not failed verification, and has all
    that would be registered with it now."""
    key = signing.signing_key()
    wanted = {
        "pennyweight.recipe_digest": record.recipe.digest,
        "pennyweight.evidence_version": str(EVIDENCE_VERSION),
        **({"pennyweight.probe": "yes"} if record.probe else {}),
        **({"pennyweight.signed_by": signing.fingerprint_of(key)} if key else {}),
    }
    found = [
        version
        for version in client.search_model_versions(f"name = '{model}' and tags.`pennyweight.digest` = '{digest}'")
        if DISTRUSTED not in version.tags and wanted.items() <= version.tags.items()
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
    files = _judged_files(winner.candidate)
    with tempfile.TemporaryDirectory() as scratch:
        tags = version_tags(record, winner, parent) | _write_documents(Path(scratch), record, winner, files)
        _create_model(client, model, record)
        logged = client.create_logged_model(
            experiment_id,
            name=re.sub(r"[^\w@-]", "-", winner.id),
            source_run_id=child,
            tags=tags,
            params={name: value for name, value in naming.candidate_params(record, winner).items() if name != "steps"},
            model_type=f"pennyweight/{winner.runtime}",
        )
        for folder in (winner.candidate.path, scratch):
            client.log_model_artifacts(logged.model_id, folder)
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    return client.create_model_version(
        model,
        source=f"models:/{logged.model_id}",
        run_id=parent,
        tags=tags,
        description=make_description(record, winner),
        model_id=logged.model_id,
    )


def version_tags(record: RunRecord, winner: CandidateResult, parent: str) -> dict[str, str]:
    """What a version is found by, and what its reader sees of it in MLflow's list. The evidence has the numbers."""
    assert winner.candidate is not None
    tags = {
        "candidate": winner.id,
        "digest": winner.candidate.digest,
        "verdict": winner.verdict.status,
        "recipe": record.name,
        "recipe_digest": record.recipe.digest,
        "run_id": parent,
        "gate": naming.describe_verdict(winner.verdict),
        "quality": naming.describe_quality(winner),
        "cost": naming.describe_cost(naming.point_at(winner, naming.decide_at(record))),
    }
    return {f"pennyweight.{name}": value for name, value in tags.items() if value}


def _write_documents(
    target: Path, record: RunRecord, winner: CandidateResult, files: Mapping[str, str]
) -> dict[str, str]:
    """Write what is registered beside the judged files: card, bill of materials, evidence, and a signature where there
    is a key. Returns the tags that say what they are."""
    assert winner.candidate is not None
    (target / CARD).write_text(make_card(record, winner))
    bill = make_bom(record, winner, files, _config_of(winner.candidate))
    (target / BOM).write_text(json.dumps(bill, indent=1, allow_nan=False) + "\n")
    evidence = make_evidence(record, winner, files, file_digests(target))
    (target / EVIDENCE).write_text(json.dumps(evidence, indent=1, allow_nan=False) + "\n")
    tags = {
        "pennyweight.evidence_digest": file_digest(target / EVIDENCE),
        "pennyweight.evidence_version": str(EVIDENCE_VERSION),
        **({"pennyweight.probe": "yes"} if record.probe else {}),
    }
    if key := signing.signing_key():
        folder = Path(winner.candidate.path)
        tags["pennyweight.signed_by"] = signing.sign([folder, target], key, target / SIGNATURE)
    return tags


def _config_of(candidate: Candidate) -> dict[str, Any]:
    """The checkpoint's config.json; empty where there is none any more."""
    with contextlib.suppress(SourceError, OSError):
        return checkpoints.read_config(Path(candidate.checkpoint.path))
    return {}


def _create_model(client: MlflowClient, model: str, record: RunRecord) -> None:
    from mlflow import MlflowException

    note = (
        f"Winners of Pennyweight recipes. `{CHALLENGER}` passed the gate last, `{CHAMPION}` is served, "
        f"`{PREVIOUS}` was served before. `pennyweight promote {model}` makes the challenger the champion, "
        f"`pennyweight rollback {model}` goes back, and each change is kept in `{ledger_name(model)}`."
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
        raise TrackingError(f"the winner's files are gone from {folder}", RUN_AGAIN)
    if taken := [name for name in DOCUMENTS if (folder / name).exists()]:
        raise TrackingError(
            f"{folder} has a file {taken[0]} of its own", "rename it: Pennyweight registers one by that name"
        )
    files = file_digests(folder)
    refuse_formats(TrackingError, str(folder), unknown_formats(files))
    if digest_of_files(files) != candidate.digest:
        raise TrackingError(f"the winner's files in {folder} are not those that were judged", RUN_AGAIN)
    return files


# --- looking up -------------------------------------------------------------------------------------------------------


def aliases_of(client: MlflowClient, model: str) -> dict[str, str]:
    """Alias → version of a registered model. Raises UsageError when there is no such model."""
    from mlflow import MlflowException

    try:
        found = client.get_registered_model(model)
    except MlflowException as error:
        if not is_missing(error):
            raise
        raise UsageError(f"no registered model {model!r}", _known_models(client, model)) from error
    if of := found.tags.get(LEDGER):
        raise UsageError(f"{model} is the history of {of}, and no model", f"`pennyweight history {of}` prints it")
    return {alias: str(version) for alias, version in found.aliases.items()}


def _known_models(client: MlflowClient, model: str) -> str:
    known = [found.name for found in client.search_registered_models(max_results=1000) if LEDGER not in found.tags]
    return (
        did_you_mean(model, known)
        or "nothing is registered yet: a run registers the winner of a recipe with `register`"
    )


def version_of(client: MlflowClient, model: str, number: str) -> ModelVersion:
    """A version of a registered model. Raises UsageError when it has none of that number."""
    from mlflow import MlflowException

    try:
        return client.get_model_version(model, number)
    except MlflowException as error:
        if not is_missing(error):
            raise
        known = sorted(int(found.version) for found in client.search_model_versions(f"name = '{model}'"))
        hint = f"versions: {', '.join(map(str, known))}" if known else "it has no versions"
        raise UsageError(f"{model} has no version {number}: it was never registered, or was deleted", hint) from error


# --- fetching ---------------------------------------------------------------------------------------------------------


def version_at(model: str, alias: str) -> str | None:
    """The version that an alias of a registered model points at; None where there is no such alias, or no such model.

    Raises TrackingError where the registry cannot be asked.
    """
    with session(f"{model}@{alias} was not looked up") as client:
        from mlflow import MlflowException

        try:
            return str(client.get_model_version_by_alias(model, alias).version)
        except MlflowException as error:
            if not is_missing(error) and "not found" not in str(error):
                raise
            return None


def fetch_model(uri: str, dst: Path) -> Path:
    """Download a registered model's files into `dst`, which is returned.

    `uri` is `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `models:/m-ID`. Where evidence lies beside the files, they
    are checked against it; where PENNYWEIGHT_VERIFY_KEY names a key, they must be signed with it. Raises SourceError
    for a URI of another form, for what is not registered, and for files that are not those that were registered;
    TrackingError for a signature that is missing or wrong.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise SourceError(f"{uri!r} names no registered model", _URI_FORMS)
    with session(f"{uri} was not fetched") as client:
        location = _location(client, match)
        dst.mkdir(parents=True, exist_ok=True)
        with located(client, location, dst) as folder:
            if not any(folder.iterdir()):
                raise SourceError(f"{uri} has no files", "it may be a record of a model that is kept elsewhere")
            check_evidence(folder, uri)
            if key := signing.verify_key():
                signing.check(folder, key, uri)
    return dst


def _location(client: MlflowClient, match: re.Match[str]) -> str:
    """Where the files of a `models:/` URI are."""
    from mlflow import MlflowException

    try:
        if match["id"]:
            model = client.get_logged_model(match["id"])
            if model.status.value == "READY":
                return model.artifact_location
            raise SourceError(
                f"{match[0]} was never uploaded to its end (it is {model.status.value.lower()})", RUN_AGAIN
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
        aliases = aliases_of(client, match["name"])
    except UsageError as error:
        return error.hint or _URI_FORMS
    known = ", ".join(f"{alias} (version {version})" for alias, version in sorted(aliases.items()))
    return f"{match['name']} has these aliases: {known}" if known else f"{match['name']} has no aliases; name a version"


# --- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def located(client: MlflowClient, location: str, dst: Path | None = None) -> Iterator[Path]:
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
