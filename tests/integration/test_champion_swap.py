"""A server that follows a champion in a real registry, while clients ask without a pause."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from pennyweight.tracking.connection import session


def register(folder: Path) -> str:
    """A version of the model `tiny`, with these files."""
    from mlflow import MlflowException
    from mlflow.entities import LoggedModelStatus

    with session("nothing was registered") as client:
        with contextlib.suppress(MlflowException):
            client.create_registered_model("tiny")
        logged = client.create_logged_model("0", name="tiny")
        client.log_model_artifacts(logged.model_id, str(folder))
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        source = f"models:/{logged.model_id}"
        return str(client.create_model_version("tiny", source=source, model_id=logged.model_id).version)


def set_champion(version: str) -> None:
    with session("nothing was promoted") as client:
        client.set_registered_model_alias("tiny", "champion", version)


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


def with_holes(model: Path, folder: Path) -> Path:
    """The same model with weights that are no numbers."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_champion_is_swapped_under_load_and_a_broken_one_stays_out(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    first, second = register(tiny_model), register(another(tiny_model, tmp_path / "second"))
    broken = register(with_holes(tiny_model, tmp_path / "broken"))
    set_champion(first)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--runtime", "transformers", "--port", str(port), "--follow-seconds", "0.5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pennyweight", "serve", "tiny@champion", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PENNYWEIGHT_HOME": str(tmp_path / "home")},
    )
    try:
        asyncio.run(follow(f"http://127.0.0.1:{port}", process, first, second, broken))
        told = process.stderr.read()
    finally:
        process.kill()
        process.wait()
    assert f"tiny version {second} is served from now on; version {first} ends its requests" in told
    assert f"tiny version {broken} cannot be served" in told
    assert f"version {second} is still served" in told


async def follow(url: str, process: subprocess.Popen[str], first: str, second: str, broken: str) -> None:
    answers: list[dict[str, Any]] = []
    wanted = True

    async def user(client: httpx.AsyncClient) -> None:
        while wanted:
            body = {"prompt": "the river runs", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
            response = await client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            answers.append(response.json())

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def version() -> str:
            return (await client.get("/v1/models")).json()["data"][0]["version"]

        async def happened(condition: Callable[[], Any]) -> None:
            while not await condition():
                assert process.poll() is None, process.stderr.read()
                await asyncio.sleep(0.1)

        async def ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return (await client.get("/ready")).status_code == 200
            return False

        async def failed() -> bool:
            return "pennyweight_failed_swap 1.0" in (await client.get("/metrics")).text

        await asyncio.wait_for(happened(ready), 120)
        assert await version() == first
        users = [asyncio.create_task(user(client)) for _ in range(8)]

        async def is_second() -> bool:
            return await version() == second

        async def more() -> bool:
            return len(answers) >= asked + 16

        asked = 0
        await asyncio.wait_for(happened(more), 60)
        await asyncio.to_thread(set_champion, second)
        await asyncio.wait_for(happened(is_second), 60)
        asked = len(answers)
        await asyncio.wait_for(happened(more), 60)
        await asyncio.to_thread(set_champion, broken)
        await asyncio.wait_for(happened(failed), 60)
        assert await version() == second
        wanted = False
        await asyncio.gather(*users)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 60) == 0
    prints = [answer["system_fingerprint"] for answer in answers]
    assert len({*prints}) == 2
    assert len({json.dumps([answer["system_fingerprint"], answer["choices"][0]["text"]]) for answer in answers}) == 2
    assert prints[0] != prints[-1]
    assert all(answer["usage"]["completion_tokens"] == 24 for answer in answers)
