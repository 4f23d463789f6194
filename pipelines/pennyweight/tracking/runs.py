"""One recipe run as MLflow runs: a parent, and a child for each candidate."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pennyweight.compare import flips_of_run
from pennyweight.errors import TrackingError
from pennyweight.records import CandidateResult, Registered, RunRecord, Tracking
from pennyweight.tracking import garbage, naming, registry
from pennyweight.tracking.connection import artifact_folder, redact, session, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_KEY = "pennyweight.run_key"
REGISTERED = "pennyweight.registered"
PARENT = "mlflow.parentRunId"

#: Table of the answers that flipped, which the UI shows.
FLIPS = "flips.json"

#: Files of a run's folder that are logged with it.
ATTACHED = ("report.html", "run.json", "*.log")

#: A batch holds 1,000 metrics, 100 parameters and 1 MB; with strings of 8,000 characters the megabyte comes first.
METRICS_PER_BATCH, STRINGS_PER_BATCH = 1000, 25


def log_run(
    record: RunRecord, run_dir: Path, *, sample_paths: Mapping[str, Path]
) -> tuple[Tracking, Registered | None]:
    """Log a run and its candidates, and register the winner where the recipe says `register`.

    `run_dir` holds report.html, run.json and the logs; `sample_paths` maps candidates to their per-sample results
    (JSONL). Logging the same record again finds the finished run and returns it; a half-logged one is deleted and done
    again. Raises TrackingError, after which `log_run` can be repeated.
    """
    with session(f"{record.name} was not logged") as client:
        experiment_id = open_experiment(client, record.name)
        key = naming.run_key(record, run_dir)
        for earlier in _runs(client, experiment_id, f"tags.`{RUN_KEY}` = '{key}'"):
            if earlier.info.status == "FINISHED":
                return _tracking(record, earlier.info.run_id), registry.parse_registered(
                    earlier.data.tags.get(REGISTERED)
                )
            _discard(client, experiment_id, earlier.info.run_id)
        return _log(client, record, run_dir, sample_paths, experiment_id, key)


def attach_files(tracking: Tracking, run_dir: Path) -> None:
    """Put report.html, run.json and the logs as they are now beside a run that is logged already."""
    with session(f"run {tracking.run_id} was not updated") as client:
        _attach(client, tracking.run_id, run_dir)


def log_serving(tracking: Tracking, files: Iterable[Path], measures: Mapping[str, Mapping[str, float]]) -> None:
    """Put `files` beside a run that is logged already, and `measures` by candidate into its candidates' runs.

    Raises TrackingError, where the run is logged at another place than `tracking_uri()` too.
    """
    here = redact(tracking_uri())
    if here != tracking.uri:
        raise TrackingError(f"the run was logged to {tracking.uri}, and this is {here}", "set MLFLOW_TRACKING_URI")
    with session(f"run {tracking.run_id} was not updated") as client:
        parent = client.get_run(tracking.run_id).info
        now = int(1000 * time.time())
        for run in _runs(client, parent.experiment_id, f"tags.`{PARENT}` = '{parent.run_id}'"):
            found = measures.get(run.data.tags.get("pennyweight.candidate", ""), {})
            log_values(client, run.info.run_id, now, {}, [naming.Measure(*item) for item in found.items()])
        for path in files:
            client.log_artifact(parent.run_id, str(path))


def _log(
    client: MlflowClient,
    record: RunRecord,
    run_dir: Path,
    sample_paths: Mapping[str, Path],
    experiment_id: str,
    key: str,
) -> tuple[Tracking, Registered | None]:
    started = _milliseconds(record.started_at)
    ended = started + int(1000 * record.seconds)
    tags = {**naming.recipe_tags(record), RUN_KEY: key}
    parent = start_run(client, experiment_id, run_dir.resolve().name, started, tags).info.run_id
    log_values(client, parent, ended, naming.recipe_params(record), naming.recipe_measures(record))

    flips = flips_of_run(record)
    children = {}
    for index, result in enumerate(record.candidates):
        first = started + len(record.candidates) - index  # the UI lists the latest first
        samples = sample_paths.get(result.id)
        children[result.id] = _log_candidate(client, record, result, experiment_id, parent, first, samples)
        if found := flips.get(result.id):
            columns = {name: [getattr(flip, name) for flip in found] for name in type(found[0]).model_fields}
            client.log_table(children[result.id], columns, FLIPS)
    tracking = _tracking(record, parent)
    registered = registry.register_winner(client, record, experiment_id, parent, children)

    client.log_text(parent, yaml.safe_dump(record.recipe.resolved, sort_keys=False, allow_unicode=True), "recipe.yaml")
    _attach(client, parent, run_dir)
    logged = record.model_copy(update={"tracking": tracking, "registered": registered, "tracking_error": None})
    client.log_text(parent, json.dumps(logged.model_dump(mode="json", by_alias=True), indent=1) + "\n", "run.json")
    if registered:
        client.set_tag(parent, REGISTERED, registered.uri)
        registry.set_challenger(client, registered)
    client.set_terminated(parent, "FINISHED", ended)
    return tracking, registered


def _log_candidate(
    client: MlflowClient,
    record: RunRecord,
    result: CandidateResult,
    experiment_id: str,
    parent: str,
    started: int,
    samples: Path | None,
) -> str:
    """Log one candidate as a child of `parent`; its duration is the time that the run spent on it. Returns its id."""
    spent = sum(stage.seconds for stage in record.stages if stage.subject in (result.id, result.variant))
    tags = {**naming.candidate_tags(record, result), PARENT: parent}
    child = start_run(client, experiment_id, result.id, started, tags).info.run_id
    ended = started + int(1000 * spent)
    measures = naming.candidate_measures(record, result)
    log_values(client, child, ended, naming.candidate_params(record, result), measures)
    if samples is not None:
        client.log_artifact(child, str(samples), "samples")
    client.set_terminated(child, "FAILED" if result.verdict.status == "error" else "FINISHED", ended)
    return child


def start_run(client: MlflowClient, experiment_id: str, name: str, started: int, tags: dict[str, str]) -> Run:
    cut = {key: redact(value)[: naming.MAX_TAG] for key, value in tags.items()}
    return client.create_run(experiment_id, start_time=started, run_name=name, tags=cut)


def log_values(
    client: MlflowClient, run_id: str, timestamp: int, params: dict[str, str], measures: Iterable[naming.Measure]
) -> None:
    """Log parameters and metrics in batches within MLflow's limits; what is not finite becomes a tag."""
    from mlflow.entities import Metric, Param, RunTag

    finite, nonfinite = naming.split_finite(measures)
    for chunk in batches(list(params.items()), STRINGS_PER_BATCH):
        client.log_batch(run_id, params=[Param(*item) for item in chunk])
    for chunk in batches(list(nonfinite.items()), STRINGS_PER_BATCH):
        client.log_batch(run_id, tags=[RunTag(*item) for item in chunk])
    for chunk in batches(finite, METRICS_PER_BATCH):
        client.log_batch(run_id, [Metric(name, float(value), timestamp, step) for name, value, step in chunk])


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Slices of at most `size` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _attach(client: MlflowClient, run_id: str, run_dir: Path) -> None:
    for path in sorted(path for pattern in ATTACHED for path in run_dir.glob(pattern)):
        client.log_artifact(run_id, str(path))


def open_experiment(client: MlflowClient, name: str) -> str:
    """The id of the recipe's experiment, created where there is none, by us or by another pipeline meanwhile."""
    from mlflow import MlflowException

    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    folder = artifact_folder(tracking_uri())
    location = (folder / name).as_uri() if folder else None
    note = "Runs of one Pennyweight recipe: each run is a recipe run, with its candidates nested in it."
    # The UI asks what kind of work an experiment is until this tag says so.
    tags = {"mlflow.note.content": note, "mlflow.experimentKind": "custom_model_development"}
    try:
        return client.create_experiment(name, artifact_location=location, tags=tags)
    except MlflowException as error:
        found = client.get_experiment_by_name(name)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None or found.lifecycle_stage == "deleted":
            raise
        return found.experiment_id


def _runs(client: MlflowClient, experiment_id: str, condition: str) -> list[Run]:
    return list(client.search_runs([experiment_id], filter_string=condition))


def _discard(client: MlflowClient, experiment_id: str, parent: str) -> None:
    """Delete a half-logged run with its candidates, and files uploaded for it that no model version took."""
    taken = {version.source for version in client.search_model_versions(f"run_id = '{parent}'")}
    for run in _runs(client, experiment_id, f"tags.`{PARENT}` = '{parent}'"):
        for model in client.search_logged_models([experiment_id], f"source_run_id = '{run.info.run_id}'"):
            if model.model_uri not in taken:
                garbage.remove_files(client, model)
        client.delete_run(run.info.run_id)
    client.delete_run(parent)


def _tracking(record: RunRecord, run_id: str) -> Tracking:
    return Tracking(uri=redact(tracking_uri()), run_id=run_id, experiment=record.name)


def _milliseconds(started_at: str) -> int:
    try:
        return int(1000 * datetime.fromisoformat(started_at).timestamp())
    except ValueError:
        return int(1000 * time.time())
