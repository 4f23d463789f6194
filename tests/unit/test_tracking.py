"""One embedded store is made once for the whole module: MLflow takes seconds to create its database."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pennyweight import tracking
from pennyweight.errors import SourceError, TrackingError, UsageError
from pennyweight.records import (
    Candidate,
    CandidateResult,
    Checkpoint,
    CostPoint,
    CostReport,
    Interval,
    MetricValue,
    Percentiles,
    Pruning,
    QualityReport,
    RecipeRef,
    Roofline,
    RunRecord,
    StageTime,
    Verdict,
)
from pennyweight.store import digest_of, folder_digest
from pennyweight.tracking import evidence, naming, runs
from pennyweight.tracking.connection import artifact_folder, set_alias

RESOLVED = {
    "name": "tiny",
    "base": {"uri": "file:/models/tiny"},
    "device": "cpu",
    "variants": {"int8": [{"quantize": {"scheme": "w8a16", "method": "rtn", "ignore": []}}]},
    "gate": [{"metric": "kl_mean", "max": 0.1}],
    "benchmark": {"decide_at": 1, "workload": {"input_tokens": 8, "output_tokens": 4}},
}


def make_point(concurrency: int, usd: float, saving: float | None = None) -> CostPoint:
    return CostPoint(
        concurrency=concurrency,
        input_tokens=8,
        output_tokens=4,
        rounds=3,
        output_tokens_per_second=100.0 * concurrency,
        total_tokens_per_second=300.0 * concurrency,
        prefill_tokens_per_second=900.0,
        decode_tokens_per_second=120.0,
        ttft_ms=Percentiles(p50=10.0, p95=20.0),
        tpot_ms=Percentiles(p50=5.0, p95=6.0),
        usd_per_1m_tokens=usd,
        usd_per_1m_output_tokens=3 * usd,
        saving=None if saving is None else Interval(value=saving, low=saving - 0.05, high=saving + 0.05),
        saving_against=None if saving is None else "base@onnxruntime",
    )


def make_result(
    root: Path, variant: str, metrics: dict[str, float], *points: CostPoint, status: str
) -> CandidateResult:
    """A candidate whose files are on disk below `root`."""
    folder = root / "store" / variant
    (folder / "nested").mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(bytes(range(256)) * 4 + variant.encode())
    (folder / "nested" / "config.json").write_text('{"model_type": "tiny"}')
    samples = root / f"{variant}.jsonl"
    samples.write_text('{"task": "piqa", "doc_id": 0, "acc": 1.0}\n')
    digest = folder_digest(folder)
    checkpoint = Checkpoint(
        path=str(folder), digest="c" * 64, bytes=1024, weight_bytes=1000, format="safetensors", dtype="float32",
        parameters=500, origin="file:/models/tiny",
    )  # fmt: skip
    name = f"{variant}@onnxruntime"
    return CandidateResult(
        id=name,
        variant=variant,
        runtime="onnxruntime",
        checkpoint=checkpoint,
        candidate=Candidate(
            id=name,
            variant=variant,
            runtime="onnxruntime",
            checkpoint=checkpoint,
            path=str(folder),
            digest=digest,
            bytes=1028,
            weight_bytes=1000,
            dtype="float32",
        ),
        quality=QualityReport(
            candidate=name,
            metrics={
                key: MetricValue(value=value, stderr=0.01, n=10, higher_is_better=False)
                for key, value in metrics.items()
            },
            samples_path=str(samples),
            samples_digest="d" * 64,
            tokens_scored=80,
            seconds=1.0,
        ),
        cost=CostReport(candidate=name, usd_per_hour=0.1, points=list(points)),
        verdict=Verdict(status=status, reasons=[f"{name}: because it is {status}"]),
    )


def make_run(
    root: Path, name: str = "tiny", model: str | None = "tiny-model", winner: str | None = "int8"
) -> RunRecord:
    """A finished run in a folder below `root`, with an int8 winner and a base."""
    run_dir = root / f"{name}-20261124-000000"
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "report.html").write_text("<html>report</html>")
    (run_dir / "run.json").write_text("{}")
    (run_dir / "run.log").write_text("log\n")
    base = make_result(root, "base", {"piqa/acc": 0.65}, make_point(1, 0.4), make_point(8, 0.2), status="base")
    int8 = make_result(
        root, "int8", {"kl_mean": 0.02, "piqa/acc": 0.64, "acc,none": math.nan, "kl_p99": math.inf},
        make_point(1, 0.2, 0.5), make_point(8, 0.1, math.nan), status="pass",
    )  # fmt: skip
    resolved = {**RESOLVED, "name": name, "register": model}
    return RunRecord(
        name=name,
        run_dir=str(run_dir),
        started_at="2026-11-24T00:00:00+00:00",
        recipe=RecipeRef(path=f"{name}.yaml", digest=digest_of(resolved), resolved=resolved),
        environment={"cpu": "Test CPU"},
        status="passed" if winner else "nothing-passed",
        base="base@onnxruntime",
        winner=f"{winner}@onnxruntime" if winner else None,
        seconds=60.0,
        candidates=[base, int8],
        stages=[StageTime(stage="export", subject="int8@onnxruntime", seconds=2.0, library_seconds=2.0, reused=False)],
    )


def log(record: RunRecord) -> tuple[Any, Any]:
    samples = {result.id: Path(result.quality.samples_path) for result in record.candidates if result.quality}
    return tracking.log_run(record, Path(record.run_dir), sample_paths=samples)


def runs_of(client: Any, name: str) -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name(name).experiment_id]))


def aliases_of(client: Any, model: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(model).aliases.items()}


def model_folder(client: Any, model: str, version: str) -> Path:
    location = client.get_model_version_download_uri(model, version)
    return Path(location.removeprefix("file://"))


# --- logging ----------------------------------------------------------------------------------------------------------


def test_a_run_is_a_parent_with_a_child_for_each_candidate(
    store: Path, client: Any, capfd: pytest.CaptureFixture
) -> None:
    record = make_run(store / "logged", "logged", model=None)
    logged, registered = log(record)
    assert capfd.readouterr().out == ""
    assert registered is None
    assert logged.experiment == "logged"

    parent = client.get_run(logged.run_id)
    assert parent.info.run_name == "logged-20261124-000000"
    assert parent.info.status == "FINISHED"
    assert parent.info.end_time - parent.info.start_time == 60_000
    assert parent.data.params["winner"] == "int8@onnxruntime"
    assert parent.data.params["base"] == "file:/models/tiny"
    assert parent.data.params["gate"] == "kl_mean max 0.1"
    assert parent.data.metrics["saving"] == 0.5
    assert parent.data.metrics["saving_low"] == 0.45
    assert parent.data.metrics["usd_per_1m_tokens"] == 0.2
    assert parent.data.metrics["base_usd_per_1m_tokens"] == 0.4
    assert parent.data.metrics["kl_mean"] == 0.02
    assert "**int8@onnxruntime wins: it saves 50% (45 to 55%)" in parent.data.tags["mlflow.note.content"]
    files = {item.path for item in client.list_artifacts(logged.run_id)}
    assert files == {"report.html", "run.json", "run.log", "recipe.yaml"}
    text = Path(client.download_artifacts(logged.run_id, "run.json")).read_text()
    assert json.loads(text)["tracking"]["run_id"] == logged.run_id

    children = {run.info.run_name: run for run in runs_of(client, "logged") if run.info.run_id != logged.run_id}
    assert sorted(children) == ["base@onnxruntime", "int8@onnxruntime"]
    int8 = children["int8@onnxruntime"]
    assert int8.data.tags["mlflow.parentRunId"] == logged.run_id
    assert int8.data.tags["pennyweight.verdict"] == "pass"
    assert int8.data.tags["pennyweight.reasons"] == "int8@onnxruntime: because it is pass"
    assert int8.data.params["steps"] == "quantize scheme=w8a16 method=rtn"
    assert int8.data.metrics["piqa/acc"] == 0.64
    history = client.get_metric_history(int8.info.run_id, "by_concurrency/usd_per_1m_tokens")
    assert [(point.step, point.value) for point in history] == [(1, 0.2), (8, 0.1)]
    assert [item.path for item in client.list_artifacts(int8.info.run_id, "samples")] == ["samples/int8.jsonl"]


def test_flipped_answers_are_a_table(store: Path, client: Any) -> None:
    record = make_run(store / "flips", "flips", model=None)
    metric = MetricValue(value=0.5, n=2, gained=1, lost=0, higher_is_better=True)
    for result, right in zip(record.candidates, (0.0, 1.0)):
        result.quality.metrics["piqa/acc"] = metric
        row = {"task": "piqa", "doc_id": 7, "doc_hash": "h", "prompt": "Why?", "target": 0, "acc": right}
        row |= {"choices": ["so", "no"], "loglikelihoods": [-2.0 + right, -1.5]}
        Path(result.quality.samples_path).write_text(json.dumps(row) + "\n")
    samples = Path(record.run_dir) / "samples"
    samples.mkdir()
    shutil.copy(record.candidates[0].quality.samples_path, samples / "reference.jsonl")
    log(record)
    (int8,) = [run for run in runs_of(client, "flips") if run.info.run_name == "int8@onnxruntime"]
    table = json.loads(Path(client.download_artifacts(int8.info.run_id, "flips.json")).read_text())
    (row,) = [dict(zip(table["columns"], row)) for row in table["data"]]
    assert (row["item"], row["gained"], row["ours"], row["theirs"]) == (7, True, "so", "no")


def test_what_is_not_finite_is_a_tag_and_never_a_number(store: Path, client: Any) -> None:
    record = make_run(store / "nan", "nan", model=None)
    log(record)
    (int8,) = [run for run in runs_of(client, "nan") if run.info.run_name == "int8@onnxruntime"]
    assert "acc_none" not in int8.data.metrics
    assert "kl_p99" not in int8.data.metrics
    assert int8.data.tags["nonfinite.acc_none"] == "nan"
    assert int8.data.tags["nonfinite.kl_p99"] == "inf"
    assert int8.data.tags["nonfinite.by_concurrency/saving at 8"] == "nan"
    assert int8.data.metrics["acc_none.stderr"] == 0.01
    assert all(math.isfinite(value) for value in int8.data.metrics.values())


def test_the_same_record_twice_is_one_run(store: Path, client: Any) -> None:
    record = make_run(store / "twice", "twice", model="twice-model")
    first = log(record)
    assert log(record) == first
    assert len(runs_of(client, "twice")) == 3
    assert len(client.search_model_versions("name = 'twice-model'")) == 1


def test_a_half_logged_run_is_done_again(store: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record = make_run(store / "half", "half", model="half-model")

    def refuse(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_attach", refuse)
        with pytest.raises(TrackingError, match="half was not logged: disk full") as caught:
            log(record)
    assert "pennyweight report --log" in caught.value.hint
    assert aliases_of(client, "half-model") == {}

    logged, registered = log(record)
    left = runs_of(client, "half")
    assert len(left) == 3
    assert {run.info.run_id for run in left} >= {logged.run_id}
    assert len(client.search_model_versions("name = 'half-model'")) == 1
    assert aliases_of(client, "half-model") == {"challenger": registered.version}
    assert client.get_model_version("half-model", "1").tags["pennyweight.run_id"] == logged.run_id


def test_a_failed_candidate_and_a_run_without_a_winner(store: Path, client: Any) -> None:
    record = make_run(store / "none", "none", winner=None)
    broken = CandidateResult(
        id="bad@onnxruntime", variant="bad", runtime="onnxruntime", checkpoint=None, candidate=None, quality=None,
        cost=None, verdict=Verdict(status="error", reasons=["export: no"]),
    )  # fmt: skip
    record = record.model_copy(update={"candidates": [*record.candidates, broken]})
    logged, registered = log(record)
    assert registered is None
    tags = client.get_run(logged.run_id).data.tags
    assert tags["mlflow.note.content"].startswith("**No winner: nothing passed.**")
    status = {run.info.run_name: run.info.status for run in runs_of(client, "none")}
    assert status["bad@onnxruntime"] == "FAILED"
    assert status["int8@onnxruntime"] == "FINISHED"


def test_files_can_be_attached_again(store: Path, client: Any) -> None:
    record = make_run(store / "again", "again", model=None)
    logged, _ = log(record)
    (Path(record.run_dir) / "report.html").write_text("<html>new</html>")
    tracking.attach_files(logged, Path(record.run_dir))
    assert Path(client.download_artifacts(logged.run_id, "report.html")).read_text() == "<html>new</html>"


# --- the registry -----------------------------------------------------------------------------------------------------


def test_the_winner_is_registered_as_it_is(store: Path, client: Any, tmp_path: Path) -> None:
    record = make_run(store / "registered", "registered", model="kept")
    winner = record.candidates[1].candidate
    logged, registered = log(record)
    assert (registered.model, registered.version, registered.alias) == ("kept", "1", "challenger")
    assert registered.uri == "models:/kept/1"

    version = client.get_model_version_by_alias("kept", "challenger")
    assert version.source.startswith("models:/m-")
    assert version.run_id == logged.run_id
    assert version.tags["pennyweight.candidate"] == "int8@onnxruntime"
    assert version.tags["pennyweight.digest"] == winner.digest
    assert version.tags["pennyweight.verdict"] == "pass"
    assert version.tags["pennyweight.gate"] == "pass"
    assert version.tags["pennyweight.quality"] == "kl_mean 0.02"
    assert version.tags["pennyweight.cost"] == "$0.2 per 1M tokens at 1, saves 50% (45 to 55%)"

    for uri in ("models:/kept@challenger", "models:/kept/1", version.source):
        folder = tracking.fetch_model(uri, tmp_path / uri.replace("/", "_"))
        attached = json.loads((folder / evidence.EVIDENCE).read_text())
        assert attached["verdict"]["status"] == "pass"
        assert attached["candidate"]["digest"] == winner.digest
        assert attached["quality"]["acc,none"]["value"] is None
        for name in (evidence.EVIDENCE, evidence.CARD, evidence.BOM):
            (folder / name).unlink()
        assert folder_digest(folder) == winner.digest
        for path in Path(winner.path).rglob("*.*"):
            assert (folder / path.relative_to(winner.path)).read_bytes() == path.read_bytes()


def test_files_registered_by_this_recipe_are_not_uploaded_again(store: Path, client: Any) -> None:
    record = make_run(store / "reuse", "reuse", model="reuse-model")
    _, first = log(record)
    later = record.model_copy(update={"started_at": "2026-11-25T00:00:00+00:00"})
    logged, second = log(later)
    assert second == first
    assert client.get_model_version("reuse-model", "1").tags["pennyweight.run_id"] == logged.run_id
    experiment = client.get_experiment_by_name("reuse").experiment_id
    assert len(client.search_logged_models([experiment])) == 1


def test_files_that_were_not_judged_are_not_registered(store: Path, client: Any) -> None:
    record = make_run(store / "swapped", "swapped", model="swapped-model")
    (Path(record.candidates[1].candidate.path) / "model.onnx").write_bytes(b"other")
    with pytest.raises(TrackingError, match="are not those that were judged"):
        log(record)
    assert client.search_registered_models("name = 'swapped-model'") == []


def register_versions(
    store: Path, name: str, count: int, change: Callable[[RunRecord], RunRecord] = lambda record: record
) -> list[RunRecord]:
    """Runs of one recipe whose winners differ, each registered as a new version of `name`."""
    records = []
    for number in range(1, count + 1):
        record = make_run(store / name / str(number), name, model=name)
        record = record.model_copy(update={"started_at": f"2026-11-24T00:00:0{number}+00:00"})
        result = record.candidates[1]
        folder = Path(result.candidate.path)
        (folder / "model.onnx").write_bytes(f"weights {number}".encode())
        candidate = result.candidate.model_copy(update={"digest": folder_digest(folder)})
        result = result.model_copy(update={"candidate": candidate})
        record = change(record.model_copy(update={"candidates": [record.candidates[0], result]}))
        log(record)
        records.append(record)
    return records


def test_an_alias_that_another_process_makes_at_once_is_replaced(store: Path, client: Any) -> None:
    from mlflow import MlflowException

    calls = []

    class Raced:
        def set_registered_model_alias(self, *named: str) -> None:
            calls.append(named)
            if len(calls) == 1:
                raise MlflowException("duplicate key value violates unique constraint")

    set_alias(Raced(), "model", "challenger", "2")
    assert calls == [("model", "challenger", "2")] * 2
    with pytest.raises(MlflowException, match="not found"):
        set_alias(client, "nobody's", "challenger", "2")


def test_an_alias_names_a_version_or_nothing(store: Path, client: Any) -> None:
    client.create_registered_model("named")
    number = client.create_model_version("named", source=str(store)).version
    client.set_registered_model_alias("named", "champion", number)
    assert tracking.version_at("named", "champion") == str(number)
    assert tracking.version_at("named", "previous") is None
    assert tracking.version_at("unnamed", "champion") is None
    client.delete_model_version("named", number)
    assert tracking.version_at("named", "champion") is None


def test_fetching_tampered_files_is_refused(store: Path, client: Any, tmp_path: Path) -> None:
    log(make_run(store / "tampered", "tampered", model="tampered"))
    (model_folder(client, "tampered", "1") / "model.onnx").write_bytes(b"evil")
    with pytest.raises(SourceError, match=r"model\.onnx was changed"):
        tracking.fetch_model("models:/tampered@challenger", tmp_path)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/NAME", "names no registered model"),
        ("models:/bare-model/latest", "names no registered model"),
        ("models:/no-such-model@champion", "is not registered"),
        ("models:/bare-model@champion", "is not registered"),
        ("models:/bare-model/99", "is not registered"),
        (f"models:/m-{'0' * 32}", "is not registered"),
    ],
)
def test_what_cannot_be_fetched(store: Path, client: Any, tmp_path: Path, uri: str, message: str) -> None:
    if client.search_registered_models("name = 'bare-model'") == []:
        client.create_registered_model("bare-model")
    with pytest.raises(SourceError, match=message) as caught:
        tracking.fetch_model(uri, tmp_path)
    assert caught.value.hint


# --- the connection ---------------------------------------------------------------------------------------------------


@pytest.fixture
def silent_server() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_silent_server_is_given_up_on(silent_server: int) -> None:
    begin = time.monotonic()
    with pytest.raises(TrackingError, match="does not answer: timed out"):
        tracking.check_reachable(f"http://127.0.0.1:{silent_server}", timeout=0.2)
    assert time.monotonic() - begin < 3


def test_an_unreachable_server_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
    begin = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        log(make_run(tmp_path))
    assert time.monotonic() - begin < 5
    assert f"http://***@127.0.0.1:{port} does not answer" in str(caught.value)
    assert "pennyweight report --log" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("https://me:secret@host:5000/path", "https://***@host:5000/path"),
        ("postgresql://me:p@ss#w/o?rd@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("postgresql://db/mlflow?user=me&password=secret", "postgresql://db/mlflow?***"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("GET http://me:secret@host/x failed twice", "GET http://***@host/x failed twice"),
    ],
)
def test_redact(text: str, expected: str) -> None:
    assert tracking.redact(text) == expected


def test_the_embedded_store_is_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    uri = tracking.tracking_uri()
    assert uri == f"sqlite:///{tmp_path}/mlflow/local/mlflow.db"
    assert (tmp_path / "mlflow" / "local").is_dir()
    assert artifact_folder(uri) == tmp_path / "mlflow" / "local" / "artifacts"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking.tracking_uri() == "http://host:5000"


def test_the_ui_serves_the_store_that_is_logged_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.chdir(tmp_path)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    command = tracking.ui_command(5055)
    assert command[:4] == [sys.executable, "-m", "mlflow", "server"]
    assert command[command.index("--port") + 1] == "5055"
    assert command[command.index("--backend-store-uri") + 1] == f"sqlite:///{tmp_path}/mlflow/local/mlflow.db"
    os.environ["MLFLOW_TRACKING_URI"] = "postgresql://me:secret@db/mlflow"
    assert not any("secret" in word for word in tracking.ui_command(5055))
    assert os.environ["MLFLOW_BACKEND_STORE_URI"] == "postgresql://me:secret@db/mlflow"
    os.environ["MLFLOW_TRACKING_URI"] = "https://me:secret@host"
    with pytest.raises(UsageError, match=r"https://\*\*\*@host, which has a UI"):
        tracking.ui_command(5055)


def test_importing_it_does_not_import_mlflow() -> None:
    code = "import sys, pennyweight.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("piqa/acc", "piqa/acc"),
        ("acc,none", "acc_none"),
        ("a//b", "a/b"),
        ("../a", "a"),
        ("", "_"),
        ("x" * 300, "x" * 250),
    ],
)
def test_legal_name(name: str, expected: str) -> None:
    assert naming.legal_name(name) == expected


def test_two_names_that_become_one_are_told_apart() -> None:
    measures = [naming.Measure("acc,none", 1.0), naming.Measure("acc_none", 2.0), naming.Measure("acc,none", 3.0, 8)]
    assert naming.legal_measures(measures) == [
        ("acc_none", 1.0, 0),
        ("acc_none_2", 2.0, 0),
        ("acc_none", 3.0, 8),
    ]


def test_params_fit_the_limits() -> None:
    made = naming.params({"a": "x" * 7000, "b": None, "c": ["x", 1], "d,e": "http://me:secret@host/x"})
    assert made == {"a": "x" * 6000, "c": "x, 1", "d_e": "http://***@host/x"}


def test_batches() -> None:
    assert list(runs.batches([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]
    assert list(runs.batches([], 2)) == []


def test_the_run_key_is_of_the_record(tmp_path: Path) -> None:
    record = make_run(tmp_path)
    key = naming.run_key(record, Path("runs/a"))
    assert key == naming.run_key(record, Path("/elsewhere/a"))
    assert key != naming.run_key(record, Path("runs/b"))
    assert key != naming.run_key(record.model_copy(update={"started_at": "later"}), Path("runs/a"))


def test_digest_of_files_is_the_folder_digest(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.txt", "a.txt", "A/z", "a-b/x"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    expected = folder_digest(tmp_path)
    (tmp_path / evidence.EVIDENCE).write_text("{}")
    assert evidence.digest_of_files(evidence.file_digests(tmp_path)) == expected


def test_bounds_and_energy_are_logged_beside_the_cost() -> None:
    point = make_point(1, 0.2, saving=0.5)
    before = {measure.name for measure in naming.cost_measures(point)}
    bound = Roofline(
        best_output_tokens_per_second=250, bound="memory", realized=0.4, mbu=0.5, mfu=0.1, prefill_seconds=0.1,
        decode_step_seconds=0.01, weight_bytes=10, kv_bytes_per_position=1, read_gb_per_s=17, peak_gops=300,
    )  # fmt: skip
    found = naming.cost_measures(point.model_copy(update={"roofline": bound, "joules_per_output_token": 0.3}))
    assert {measure.name: measure.value for measure in found if measure.name not in before} == {
        "best_output_tokens_per_second": 250,
        "realized": 0.4,
        "mbu": 0.5,
        "mfu": 0.1,
        "joules_per_output_token": 0.3,
    }


def test_what_pruning_cost_is_logged_with_each_candidate(store: Path, client: Any) -> None:
    first = Pruning(
        removed=[2, 5], layers=(10, 8), measure="kl", refitted=8, kl_cut=0.3, kl_influence=0.5, kl=0.2,
        curve=[(1, 0.1), (2, 0.3)], parameters=(1000, 800), weight_bytes=(2000, 1600), reload_difference=0.0,
        seconds=1.0,
    )  # fmt: skip
    changes = {"removed": [0], "layers": (8, 7), "kl": 0.25, "curve": [(1, 0.4)], "parameters": (800, 700)}
    second = first.model_copy(update={**changes, "kl_cut": 0.4, "kl_influence": None, "earlier": first})
    record = make_run(store / "pruned", "pruned", model=None)
    base, int8 = record.candidates
    checkpoint = int8.checkpoint.model_copy(update={"pruning": second})
    record = record.model_copy(update={"candidates": [base, int8.model_copy(update={"checkpoint": checkpoint})]})
    log(record)
    runs = {run.info.run_name: run for run in runs_of(client, "pruned")}
    found = runs["int8@onnxruntime"].data.metrics
    assert {name: value for name, value in found.items() if name.startswith("pruning/")} == {
        "pruning/layers_removed": 3,
        "pruning/parameters_kept": 0.7,
        "pruning/kl_before_fit": 0.4,
        "pruning/kl_after_fit": 0.25,
        "pruning/kl_by_layers": 0.4,
    }
    curve = client.get_metric_history(runs["int8@onnxruntime"].info.run_id, "pruning/kl_by_layers")
    assert [(point.step, point.value) for point in curve] == [(1, 0.1), (2, 0.3), (3, 0.4)]
    assert not [name for name in runs["base@onnxruntime"].data.metrics if name.startswith("pruning/")]


def test_a_trainings_curves_are_there_while_it_goes_on(client: Any) -> None:
    with tracking.training_curves("curves", "distill taught") as measure:
        measure(0, {"held_out_kl": 1.5})
        experiment = client.get_experiment_by_name("curves").experiment_id
        (run,) = client.search_runs([experiment])
        assert run.info.status == "RUNNING"
        measure(20, {"held_out_kl": 0.5, "training_loss": 0.75})
    history = client.get_metric_history(run.info.run_id, "held_out_kl")
    assert [(point.step, point.value) for point in history] == [(0, 1.5), (20, 0.5)]
    run = client.get_run(run.info.run_id)
    assert (run.info.run_name, run.info.status) == ("distill taught", "FINISHED")
    with pytest.raises(ZeroDivisionError), tracking.training_curves("curves", "another") as measure:
        measure(0, {"held_out_kl": 1.0})
        raise ZeroDivisionError
    (failed,) = client.search_runs([experiment], "attributes.status = 'FAILED'")
    assert failed.info.run_name == "another"


def test_a_server_that_is_gone_costs_the_curves_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with tracking.training_curves("curves", "distill taught") as measure:
        measure(0, {"held_out_kl": 1.5})
        measure(1, {"held_out_kl": 1.4})
    assert capsys.readouterr().err.count("does not answer") == 1
