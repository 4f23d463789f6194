"""Reaching an MLflow server: where it is, whether it answers, and how its errors read."""

from __future__ import annotations

import logging
import os
import re
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from pennyweight.errors import PennyweightError, TrackingError, UsageError

if TYPE_CHECKING:
    from mlflow import MlflowClient

#: The embedded store's database, below the current folder.
EMBEDDED = Path("mlflow/local/mlflow.db")

#: Seconds that a server has to answer a first, empty question.
PROBE_SECONDS = 5.0

_MISSING = ("RESOURCE_DOES_NOT_EXIST", "ENDPOINT_NOT_FOUND")
_GATEWAY_ERRORS = (502, 503, 504)
_LONGEST_REASON = 500

#: Words in MLflow's errors → what the user can do.
_HINTS = {
    "Invalid Host header": "the server must name this address in MLFLOW_SERVER_ALLOWED_HOSTS",
    "401": "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    "out-of-date database schema": "another version of MLflow made this database: `mlflow db upgrade` brings it here",
    "database is locked": "another process is writing to the store; try again when it is done",
    "deleted state": "`mlflow experiments restore --experiment-id ID` brings a deleted experiment back",
}
_LATER = "nothing is lost: a run that was not logged keeps its record, and `pennyweight report --log` logs it later"


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, else the embedded store in the current folder, `mlflow/local/mlflow.db`.

    Creates the embedded store's folder; raises TrackingError where that cannot be written.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    database = Path.cwd() / EMBEDDED
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackingError(
            f"{database.parent} cannot be written: {error.strerror}",
            "run from a folder of your own, or name a server in MLFLOW_TRACKING_URI",
        ) from error
    return f"sqlite:///{database}"


def redact(text: str) -> str:
    """A URI, or a text with URIs in it, without the users, the passwords and the queries that they carry."""
    without_credentials = re.sub(r"://(?!/)\S*@", "://***@", text)
    return re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]+", r"\1?***", without_credentials)


def check_reachable(uri: str, timeout: float = PROBE_SECONDS) -> None:
    """Raise TrackingError when an http(s) server does not answer within `timeout` seconds.

    Any answer will do, a refusal too: MLflow itself then says what is wrong. Other URIs are not asked.
    """
    if uri.partition("://")[0] not in ("http", "https"):
        return
    address = re.sub(r"://\S*@", "://", uri).rstrip("/")
    try:
        urlopen(Request(f"{address}/health"), timeout=timeout).close()
        return
    except HTTPError as error:
        if error.code not in _GATEWAY_ERRORS:
            return
        reason = f"a gateway says {error.code} {error.reason}"
    except (OSError, HTTPException, ValueError) as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, ssl.SSLError):  # it did answer, and MLflow has its own settings for certificates
            return
        reason = getattr(cause, "strerror", None) or str(cause)
    raise TrackingError(
        f"the MLflow server {redact(uri)} does not answer: {reason}",
        f"start it, or correct MLFLOW_TRACKING_URI; {_LATER}",
    )


def ui_command(port: int) -> list[str]:
    """The command that serves the MLflow UI for the store that runs are logged to, on 127.0.0.1.

    A URI with a password goes into the environment, never into the command. Raises UsageError when runs are logged to
    a server, which has a UI of its own.
    """
    uri = tracking_uri()
    if uri.startswith(("http://", "https://")):
        raise UsageError(
            f"runs are logged to {redact(uri)}, which has a UI of its own", "open that address in a browser"
        )
    prepare_environment()
    # The UI needs no job runner; without it the server starts in half the time.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    if folder := artifact_folder(uri):
        command += ["--artifacts-destination", str(folder)]
    if redact(uri) == uri:
        return [*command, "--backend-store-uri", uri]
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri
    return command


def artifact_folder(uri: str) -> Path | None:
    """Where a SQLite store keeps its artifacts: `artifacts/` beside the database. None for other stores."""
    match = re.match(r"sqlite:///(?P<path>[^?]+)", uri)
    return Path(match["path"]).absolute().parent / "artifacts" if match else None


def prepare_environment() -> None:
    """Settings that MLflow reads from the environment. What the user has set stays."""
    settings = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        # MLflow's 7 retries, each after twice the wait, add up to minutes. Its timeout of 120 s stays, because
        # a server answers an upload only when it has passed the file on.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)


@contextmanager
def session(doing: str) -> Iterator[MlflowClient]:
    """A client of the store at `tracking_uri()`; `doing` opens the message of whatever goes wrong with it.

    Raises TrackingError at once where the server does not answer, and for every error that is not one of ours.
    """
    uri = tracking_uri()
    check_reachable(uri)
    prepare_environment()
    try:
        with redirect_stdout(sys.stderr), _environment("MLFLOW_TRACKING_URI", uri):
            from mlflow import MlflowClient

            yield MlflowClient(tracking_uri=uri)
    except PennyweightError:
        raise
    except Exception as error:  # MLflow lets through what its database, HTTP and storage libraries raise
        raise _explain(error, doing) from error


def is_missing(error: Exception) -> bool:
    """MLflow says that it has no such thing."""
    return getattr(error, "error_code", None) in _MISSING


def set_alias(client: MlflowClient, model: str, alias: str, version: str) -> None:
    """Let an alias name a version. MLflow looks whether there is one, and then inserts it: of two processes that do so
    at once one fails, and finds it to be replaced when it tries again."""
    try:
        client.set_registered_model_alias(model, alias, version)
    except Exception as error:
        if is_missing(error):
            raise
        client.set_registered_model_alias(model, alias, version)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """MLflow's SQL registry looks a version's source up through a client of its own, which goes by the environment."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _explain(error: Exception, doing: str) -> TrackingError:
    text = redact(str(error)).strip() or type(error).__name__
    reason = text.splitlines()[0][:_LONGEST_REASON]
    hint = next((hint for words, hint in _HINTS.items() if words in text), _LATER)
    return TrackingError(f"{doing}: {reason}", hint)
