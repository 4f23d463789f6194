"""What a notebook serves, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import pennyweight
from pennyweight import Server, serve
from pennyweight.errors import UsageError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENNYWEIGHT_HOME", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)


def test_a_model_is_served_until_the_block_ends(tiny_model: Path) -> None:
    with serve(str(tiny_model), runtime="transformers", max_queue=3) as server:
        assert isinstance(server, Server)
        body = {"model": tiny_model.name, "prompt": "Once", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
        assert answer["usage"]["completion_tokens"] == 4
    assert server.process.returncode == 0


def test_what_cannot_be_served_says_why() -> None:
    with pytest.raises(UsageError, match="there is no model at 'nowhere'"):
        serve("nowhere")
    with pytest.raises(UsageError, match="No such option"):
        serve("nowhere", colour="blue")


def test_importing_it_is_cheap_and_its_names_are_not_modules() -> None:
    heavy = ["torch", "transformers", "mlflow", "pydantic"]
    program = f"import sys, pennyweight; print([name for name in {heavy} if name in sys.modules], dir(pennyweight))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ")
    for name in pennyweight.__all__:
        assert name in done.stdout
        assert callable(getattr(pennyweight, name))
    with pytest.raises(AttributeError, match="nothing"):
        _ = pennyweight.nothing
