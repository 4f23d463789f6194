"""Models in a real registry, and a server that follows their champion."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from pennyweight.tracking.connection import session

PATIENCE = 120


def register(name: str, folder: Path) -> str:
    """A version of a model, with these files and no evidence."""
    from mlflow import MlflowException
    from mlflow.entities import LoggedModelStatus

    with session("nothing was registered") as client:
        with contextlib.suppress(MlflowException):
            client.create_registered_model(name)
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else client.create_experiment(name)
        logged = client.create_logged_model(experiment, name=name)
        client.log_model_artifacts(logged.model_id, str(folder))
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        source = f"models:/{logged.model_id}"
        return str(client.create_model_version(name, source=source, model_id=logged.model_id).version)


def set_champion(name: str, version: str) -> None:
    with session("nothing was promoted") as client:
        client.set_registered_model_alias(name, "champion", version)


def another(model: Path, folder: Path) -> Path:
    """The same model with other weights."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    noise = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
    changed = {name: (tensor + 0.05 * noise[name]).to(tensor.dtype) for name, tensor in weights.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@contextlib.contextmanager
def serving(target: str, home: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(address, process) of `pennyweight serve` in transformers, once it is ready; it looks for a new champion twice a
    second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--runtime", "transformers", "--port", str(port), "--follow-seconds", "0.5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pennyweight", "serve", target, *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PENNYWEIGHT_HOME": str(home)},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + PATIENCE
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                raise RuntimeError(process.stderr.read())
            time.sleep(0.1)
        yield url, process
    finally:
        process.kill()
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/ready", timeout=5).close()
    except OSError:
        return False
    return True
