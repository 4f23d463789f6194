"""Versions and files in the registry that nothing reaches: found, listed, removed.

Deleting a version in MLflow leaves its logged model, and deleting a logged model leaves its files. Here the three go
together, in an order that a run which is cut short can be repeated from: the version, its files, then the logged
model, by which the files are found.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pennyweight.errors import UsageError, did_you_mean
from pennyweight.records import Record
from pennyweight.store import folder_bytes
from pennyweight.tracking.connection import is_missing, session, tracking_uri
from pennyweight.tracking.ledger import CHANGE, LEDGER

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

#: Days after which a run that never ended no longer keeps files that it did not register.
GIVEN_UP_DAYS = 7.0

_DAY_MS = 86_400_000
_MODEL_ID = re.compile(r"\bm-[0-9a-f]{32}\b")
_COPY = re.compile(r"models:/(?P<name>[^/@]+)/(?P<version>\d+)")


class ModelGarbage(Record):
    """A version that nothing keeps, with its files; or files that no version refers to."""

    model: str | None = Field(None, description="None for files that no version refers to")
    version: str | None = None
    candidate: str | None
    created: str = Field(description="ISO 8601, UTC")
    model_id: str | None = Field(
        None, description="the logged model that holds the files; None: they stay, being shared"
    )
    bytes: int = Field(description="of the files that go")


class KeptVersion(Record):
    model: str
    version: str
    reason: str


class ModelCollection(Record):
    """What `models gc` removed, or would remove."""

    dry_run: bool
    garbage: list[ModelGarbage]
    removed: int
    freed_bytes: int
    kept: list[KeptVersion]


def collect_models(model: str | None, keep: int, older_than_days: float, dry_run: bool = False) -> ModelCollection:
    """Remove versions that no alias points at, and files that no version refers to; of `model`, or of all models.

    What stays: the newest `keep` versions of each model, versions that `pennyweight run` did not register, versions of
    runs that are not finished or were active in the last `older_than_days`, and what a version elsewhere is a copy of.
    Files without a version are only looked for where no model is named. Raises UsageError for an unknown model.
    """
    with session("nothing more was removed") as client:
        chosen = _models(client, model)
        cutoff = time.time() * 1000 - older_than_days * _DAY_MS
        versions = _versions(client)
        doomed, kept = [], []
        for version in sorted(versions, key=lambda version: (version.name, -int(version.version))):
            if version.name in chosen:
                reason = _reason_to_keep(client, version, versions, keep, cutoff)
                if reason is None:
                    doomed.append(version)
                else:
                    kept.append(KeptVersion(model=version.name, version=str(version.version), reason=reason))
        files = _unreferenced(client, versions, doomed, cutoff, only_doomed=model is not None)
        garbage = list(_describe(doomed, files))
        if not dry_run:
            garbage = _remove(client, garbage, files, keep, cutoff)
    return ModelCollection(
        dry_run=dry_run,
        garbage=garbage,
        removed=len(garbage),
        freed_bytes=sum(item.bytes for item in garbage),
        kept=kept,
    )


def remove_files(client: MlflowClient, model: LoggedModel) -> None:
    """Delete a logged model and its files. MLflow's own deletion leaves them to `mlflow gc`, at the server."""
    repository = _repository(model)
    repository.delete_artifacts()
    if folder := _local_folder(repository):
        with contextlib.suppress(OSError):
            folder.parent.rmdir()  # named after the model, and empty now
    client.delete_logged_model(model.model_id)


# --- versions ---------------------------------------------------------------------------------------------------------


def _models(client: MlflowClient, model: str | None) -> list[str]:
    known = [found.name for found in _pages(client.search_registered_models) if LEDGER not in found.tags]
    if model is None:
        return known
    if model not in known:
        raise UsageError(f"no registered model {model!r}", did_you_mean(model, known) or "nothing is registered yet")
    return [model]


def _versions(client: MlflowClient) -> list[ModelVersion]:
    """Every version of every model. Entries of histories name versions, and hold none."""
    return [version for version in _pages(client.search_model_versions) if CHANGE not in version.tags]


def _reason_to_keep(
    client: MlflowClient, version: ModelVersion, versions: Iterable[ModelVersion], keep: int, cutoff: float
) -> str | None:
    """Why a version stays; None where nothing keeps it. `versions` are those of all models."""
    number = str(version.version)
    aliases = client.get_registered_model(version.name).aliases
    if names := sorted(alias for alias, target in aliases.items() if str(target) == number):
        return f"it is {', '.join(names)}"
    newer = sum(other.name == version.name and int(other.version) > int(number) for other in versions)
    if newer < keep:
        return f"it is one of the newest {keep}"
    if "pennyweight.digest" not in version.tags:
        return "`pennyweight run` did not register it"
    for other in versions:
        match = _COPY.fullmatch(other.source or "")
        if match and (match["name"], match["version"]) == (version.name, number):
            return f"{other.name} version {other.version} is a copy of it"
    return _reason_of_runs(client, version, cutoff)


def _reason_of_runs(client: MlflowClient, version: ModelVersion, cutoff: float) -> str | None:
    """Why its age, or the runs that made it or found it registered already, keep a version."""
    if max(version.creation_timestamp, version.last_updated_timestamp or 0) > cutoff:
        return "it is recent"
    for run_id in {version.run_id, version.tags.get("pennyweight.run_id")} - {None, ""}:
        state = _state_of_run(client, run_id)
        if state == "going on":
            return f"its run {run_id} is not finished"
        if state is not None and state > cutoff:
            return f"its run {run_id} is recent"
    return None


def _state_of_run(client: MlflowClient, run_id: str) -> float | str | None:
    """`going on`, or when a run ended in milliseconds since 1970; None for one that is gone."""
    from mlflow import MlflowException

    try:
        info = client.get_run(run_id).info
    except MlflowException as error:
        if not is_missing(error):
            raise
        return None
    if info.lifecycle_stage == "deleted":
        return None
    return "going on" if info.status in ("RUNNING", "SCHEDULED") else float(info.end_time or info.start_time)


# --- files ------------------------------------------------------------------------------------------------------------


def _unreferenced(
    client: MlflowClient,
    versions: Iterable[ModelVersion],
    doomed: Iterable[ModelVersion],
    cutoff: float,
    *,
    only_doomed: bool,
) -> dict[str, LoggedModel]:
    """Logged models of ours, by id, that no version but the doomed refers to."""
    gone = {(version.name, str(version.version)) for version in doomed}
    referred, freed = set(), set()
    for version in versions:
        ids = _logged_models_of(client, version)
        (freed if (version.name, str(version.version)) in gone else referred).update(ids)
    if only_doomed:
        found = [model for model_id in sorted(freed - referred) if (model := _logged_model(client, model_id))]
    else:
        found = [model for model in _logged_models(client) if model.model_id not in referred]
    return {
        model.model_id: model
        for model in found
        if _is_ours(model) and (model.model_id in freed or not _may_be_wanted(client, model, cutoff))
    }


def _logged_models_of(client: MlflowClient, version: ModelVersion) -> list[str]:
    """Ids of the logged models that hold a version's files; those of a copy are its original's, deleted or not."""
    source = version.source or ""
    if _COPY.fullmatch(source):
        source = client.get_model_version_download_uri(version.name, str(version.version)) or ""
    return _MODEL_ID.findall(source)


def _logged_models(client: MlflowClient) -> Iterator[LoggedModel]:
    for experiment in _pages(client.search_experiments):
        yield from _pages(client.search_logged_models, experiment_ids=[experiment.experiment_id])


def _logged_model(client: MlflowClient, model_id: str) -> LoggedModel | None:
    from mlflow import MlflowException

    try:
        return client.get_logged_model(model_id)
    except MlflowException as error:
        if not is_missing(error):
            raise
        return None


def _is_ours(model: LoggedModel) -> bool:
    """`pennyweight run` uploaded it, to a folder of its own."""
    return (
        "pennyweight.digest" in model.tags
        and (model.model_type or "").startswith("pennyweight/")
        and model.model_id in model.artifact_location
    )


def _may_be_wanted(client: MlflowClient, model: LoggedModel, cutoff: float) -> bool:
    """A run may be about to register it."""
    touched = max(model.creation_timestamp, model.last_updated_timestamp or 0)
    if touched > cutoff:
        return True
    given_up = touched < time.time() * 1000 - GIVEN_UP_DAYS * _DAY_MS
    run_id = model.tags.get("pennyweight.run_id")
    return not given_up and bool(run_id) and _state_of_run(client, run_id) == "going on"


def _repository(model: LoggedModel) -> ArtifactRepository:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(model.artifact_location, tracking_uri=tracking_uri())


def _local_folder(repository: ArtifactRepository) -> Path | None:
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    return Path(repository.artifact_dir) if isinstance(repository, LocalArtifactRepository) else None


def _bytes(model: LoggedModel) -> int:
    repository = _repository(model)
    if folder := _local_folder(repository):
        return folder_bytes(folder)
    return _remote_bytes(repository, None)


def _remote_bytes(repository: ArtifactRepository, folder: str | None) -> int:
    items = repository.list_artifacts(folder)
    return sum(_remote_bytes(repository, item.path) if item.is_dir else item.file_size or 0 for item in items)


# --- both -------------------------------------------------------------------------------------------------------------


def _describe(doomed: Iterable[ModelVersion], files: dict[str, LoggedModel]) -> Iterator[ModelGarbage]:
    """Each version with the files that go with it, then the files that have none."""
    left = dict(files)
    for version in doomed:
        ids = [model_id for model_id in _MODEL_ID.findall(version.source or "") if model_id in left]
        model = left.pop(ids[0]) if ids else None
        yield ModelGarbage(
            model=version.name,
            version=str(version.version),
            candidate=version.tags.get("pennyweight.candidate"),
            created=_moment(version.creation_timestamp),
            model_id=model and model.model_id,
            bytes=_bytes(model) if model else 0,
        )
    for model in left.values():
        yield ModelGarbage(
            candidate=model.tags.get("pennyweight.candidate"),
            created=_moment(model.creation_timestamp),
            model_id=model.model_id,
            bytes=_bytes(model),
        )


def _remove(
    client: MlflowClient, garbage: Iterable[ModelGarbage], files: dict[str, LoggedModel], keep: int, cutoff: float
) -> list[ModelGarbage]:
    """Remove what still has no reason to stay, all versions before any files. Returns what went."""
    gone = [item for item in garbage if item.model is None or _delete_version(client, item, keep, cutoff)]
    referred = {model_id for version in _versions(client) for model_id in _logged_models_of(client, version)}
    removed = []
    for item in gone:
        if item.model_id in referred:
            item = item.model_copy(update={"model_id": None, "bytes": 0})
        elif item.model_id is not None:
            remove_files(client, files[item.model_id])
        if item.model is not None or item.model_id is not None:
            removed.append(item)
    return removed


def _delete_version(client: MlflowClient, item: ModelGarbage, keep: int, cutoff: float) -> bool:
    """Delete a version, unless it got an alias, a run or a copy meanwhile."""
    assert item.model is not None and item.version is not None
    versions = _versions(client)
    found = next((v for v in versions if (v.name, str(v.version)) == (item.model, item.version)), None)
    if found is None or _reason_to_keep(client, found, versions, keep, cutoff) is not None:
        return False
    client.delete_model_version(item.model, item.version)
    return True


def _moment(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def _pages(search: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    """Everything that one of MLflow's searches finds, page by page."""
    token = None
    while True:
        page = search(**arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
