"""What the registry lets go, and what stays byte for byte, on a real embedded store that the module shares."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_tracking import log, make_run, register_versions

from pennyweight import tracking
from pennyweight.cli import main
from pennyweight.errors import TrackingError, UsageError
from pennyweight.store import folder_bytes, folder_digest
from pennyweight.tracking import collect_models, garbage


def folder_of(client: Any, model: str, version: int) -> Path:
    """The folder, named after its logged model, that holds a version's files."""
    location = client.get_model_version_download_uri(model, str(version))
    return Path(location.removeprefix("file://")).parent


def versions_of(client: Any, model: str) -> list[int]:
    return sorted(int(found.version) for found in client.search_model_versions(f"name = '{model}'"))


def upload(client: Any, store: Path, experiment: str, run_id: str = "", kind: str = "pennyweight/onnxruntime") -> Path:
    """Files of a logged model that no version refers to. Returns the folder that holds them."""
    tags = {"pennyweight.digest": "d" * 64, "pennyweight.run_id": run_id, "pennyweight.candidate": "int8@onnxruntime"}
    logged = client.create_logged_model(
        client.get_experiment_by_name(experiment).experiment_id, name="alone", tags=tags, model_type=kind
    )
    (store / "upload").mkdir(exist_ok=True)
    (store / "upload" / "weights").write_bytes(bytes(700))
    client.log_model_artifacts(logged.model_id, str(store / "upload"))
    return Path(logged.artifact_location.removeprefix("file://")).parent


def test_old_versions_go_with_their_files_and_the_rest_stays_byte_for_byte(store: Path, client: Any) -> None:
    register_versions(store, "old", 6)
    client.set_registered_model_alias("old", "champion", "1")
    client.set_registered_model_alias("old", "audited", "2")
    folders = {number: folder_of(client, "old", number) for number in range(1, 7)}
    digests = {number: folder_digest(folders[number]) for number in (1, 2, 5, 6)}
    whole = folder_digest(store / "mlflow" / "local" / "artifacts")
    expected = folder_bytes(folders[3]) + folder_bytes(folders[4])
    assert expected > 0

    listed = collect_models("old", keep=2, older_than_days=0, dry_run=True)
    assert [(item.version, item.candidate) for item in listed.garbage] == [
        ("4", "int8@onnxruntime"),
        ("3", "int8@onnxruntime"),
    ]
    assert (listed.removed, listed.freed_bytes) == (2, expected)
    assert {item.version: item.reason for item in listed.kept} == {
        "1": "it is champion",
        "2": "it is audited",
        "5": "it is one of the newest 2",
        "6": "it is challenger",
    }
    assert versions_of(client, "old") == [1, 2, 3, 4, 5, 6]
    assert folder_digest(store / "mlflow" / "local" / "artifacts") == whole

    done = collect_models("old", keep=2, older_than_days=0)
    assert done.garbage == listed.garbage
    assert done.freed_bytes == expected
    assert versions_of(client, "old") == [1, 2, 5, 6]
    assert not folders[3].exists()
    assert not folders[4].exists()
    assert {number: folder_digest(folders[number]) for number in digests} == digests
    assert tracking.promote("old", force=True, reason="nothing is known to ask").version == "6"  # its files are whole
    assert {item.model for item in collect_models(None, keep=0, older_than_days=9).kept} == {"old"}
    assert collect_models("old", keep=2, older_than_days=0).removed == 0


def test_what_is_young_stays(store: Path, client: Any) -> None:
    register_versions(store, "young", 2)
    found = collect_models("young", keep=0, older_than_days=1)
    assert found.removed == 0
    assert {item.version: item.reason for item in found.kept} == {"1": "it is recent", "2": "it is challenger"}


def test_what_an_unfinished_run_made_or_found_stays(store: Path, client: Any) -> None:
    register_versions(store, "unfinished", 2)
    version = client.get_model_version("unfinished", "1")
    client.update_run(version.run_id, status="RUNNING")
    found = collect_models("unfinished", keep=1, older_than_days=0)
    assert found.removed == 0
    assert found.kept[1].reason == f"its run {version.run_id} is not finished"
    # A later run that has the same winner takes the version as it is, and says so in a tag only.
    client.update_run(version.run_id, status="FINISHED")
    experiment = client.get_experiment_by_name("unfinished").experiment_id
    later = client.create_run(experiment).info.run_id
    client.set_model_version_tag("unfinished", "1", "pennyweight.run_id", later)
    assert collect_models("unfinished", keep=1, older_than_days=0).removed == 0
    client.delete_run(later)
    assert collect_models("unfinished", keep=1, older_than_days=0).removed == 1


def test_a_version_that_got_an_alias_meanwhile_stays(store: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    register_versions(store, "meanwhile", 3)
    folder = folder_of(client, "meanwhile", 2)
    describe = garbage._describe

    def promoted(*arguments: Any) -> Any:
        found = list(describe(*arguments))
        client.set_registered_model_alias("meanwhile", "champion", "2")
        return found

    monkeypatch.setattr(garbage, "_describe", promoted)
    found = collect_models("meanwhile", keep=1, older_than_days=0)
    assert [item.version for item in found.garbage] == ["1"]
    assert versions_of(client, "meanwhile") == [2, 3]
    assert (folder / "artifacts" / "model.onnx").read_bytes() == b"weights 2"


def test_what_a_version_elsewhere_refers_to_stays(store: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.tracking_uri())  # MLflow looks sources up there
    register_versions(store, "original", 3)
    folder = folder_of(client, "original", 2)
    client.copy_model_version("models:/original/1", "copied")
    client.create_registered_model("shared")
    client.create_model_version("shared", source=client.get_model_version("original", "2").source)
    found = collect_models("original", keep=1, older_than_days=0)
    assert [(item.version, item.model_id, item.bytes) for item in found.garbage] == [("2", None, 0)]
    assert {item.version: item.reason for item in found.kept}["1"] == "copied version 1 is a copy of it"
    assert (folder / "artifacts" / "model.onnx").read_bytes() == b"weights 2"
    client.delete_model_version("original", "1")
    assert collect_models(None, keep=1000, older_than_days=0).removed == 0  # the copy has its original's files
    assert tracking.fetch_model("models:/copied/1", store / "fetched").is_dir()


def test_versions_of_others_stay(store: Path, client: Any) -> None:
    client.create_registered_model("foreign")
    client.create_model_version("foreign", source="s3://bucket/model")
    found = collect_models("foreign", keep=0, older_than_days=0)
    assert found.removed == 0
    assert found.kept[0].reason == "`pennyweight run` did not register it"


def test_files_that_no_version_refers_to_go(store: Path, client: Any) -> None:
    register_versions(store, "alone", 1)
    registered = folder_of(client, "alone", 1)
    before = folder_digest(registered)
    lost = upload(client, store, "alone")
    foreign = upload(client, store, "alone", kind="sklearn")
    assert collect_models("alone", keep=0, older_than_days=0).removed == 0  # only of all models
    found = collect_models(None, keep=1000, older_than_days=0)
    assert [(item.model, item.model_id, item.bytes) for item in found.garbage] == [(None, lost.name, 700)]
    assert not lost.exists()
    assert foreign.exists()
    assert folder_digest(registered) == before
    assert collect_models(None, keep=1000, older_than_days=0).removed == 0


def test_files_that_a_run_is_about_to_register_stay(store: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    log(make_run(store / "uploading", "uploading", model=None))
    run_id = client.create_run(client.get_experiment_by_name("uploading").experiment_id).info.run_id
    folder = upload(client, store, "uploading", run_id)
    assert collect_models(None, keep=1000, older_than_days=0).removed == 0
    assert folder.exists()
    monkeypatch.setattr(garbage, "GIVEN_UP_DAYS", 0.0)  # the run was killed, and that long ago
    assert collect_models(None, keep=1000, older_than_days=0).removed == 1
    assert not folder.exists()


def test_files_of_versions_deleted_in_mlflow_go_too(store: Path, client: Any) -> None:
    register_versions(store, "by-hand", 1)
    folder = folder_of(client, "by-hand", 1)
    client.delete_model_version("by-hand", "1")
    assert folder.exists()  # MLflow leaves them
    assert [item.model_id for item in collect_models(None, keep=1000, older_than_days=0).garbage] == [folder.name]
    assert not folder.exists()


def test_logging_a_half_logged_run_again_leaves_no_files_behind(
    store: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    record = make_run(store / "halved", "halved", model="halved")

    def die(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("the server is gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", die)
        with pytest.raises(TrackingError, match="the server is gone"):
            log(record)
    log(record)
    folders = list((store / "mlflow" / "local" / "artifacts" / "halved" / "models").iterdir())
    assert folders == [folder_of(client, "halved", 1)]


def test_an_unknown_model_is_refused(store: Path, client: Any) -> None:
    register_versions(store, "known-model", 1)
    with pytest.raises(UsageError, match="no registered model 'known-modle'") as caught:
        collect_models("known-modle", keep=3, older_than_days=7)
    assert caught.value.hint == "did you mean 'known-model'?"


def test_the_command_lists_and_removes(store: Path, client: Any) -> None:
    register_versions(store, "by-command", 2)
    runner = CliRunner()
    options = ["models", "gc", "by-command", "--keep", "1", "--older-than", "0"]
    listed = runner.invoke(main, [*options, "--dry-run"])
    assert listed.exit_code == 0
    assert "by-command  1        int8@onnxruntime" in listed.stdout
    assert "by-command version 2 stays: it is challenger" in listed.stdout
    assert "would remove 1, would free 0.0 MB" in listed.stdout
    done = json.loads(runner.invoke(main, [*options, "--json"]).stdout)
    assert (done["removed"], done["dry_run"], done["garbage"][0]["version"]) == (1, False, "1")
    assert versions_of(client, "by-command") == [2]
