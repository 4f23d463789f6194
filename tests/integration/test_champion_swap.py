"""A server that follows a champion in a real registry, while clients ask without a pause."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from champions import another, register, serving, set_champion


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
    first, second = (register("tiny", folder) for folder in (tiny_model, another(tiny_model, tmp_path / "second")))
    broken = register("tiny", with_holes(tiny_model, tmp_path / "broken"))
    set_champion("tiny", first)
    with serving("tiny@champion", tmp_path / "home") as (url, process):
        asyncio.run(follow(url, process, first, second, broken))
        told = process.stderr.read()
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

        async def failed() -> bool:
            return "pennyweight_failed_swap 1.0" in (await client.get("/metrics")).text

        assert await version() == first
        users = [asyncio.create_task(user(client)) for _ in range(8)]

        async def is_second() -> bool:
            return await version() == second

        async def more() -> bool:
            return len(answers) >= asked + 16

        asked = 0
        await asyncio.wait_for(happened(more), 60)
        await asyncio.to_thread(set_champion, "tiny", second)
        await asyncio.wait_for(happened(is_second), 60)
        asked = len(answers)
        await asyncio.wait_for(happened(more), 60)
        await asyncio.to_thread(set_champion, "tiny", broken)
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
