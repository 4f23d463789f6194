"""The embedded registry that tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an embedded store in it, which is the current folder while the module runs."""
    root = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(root)
        yield root


@pytest.fixture(scope="module")
def client(store: Path) -> Any:
    from pennyweight import tracking
    from pennyweight.tracking.connection import prepare_environment

    prepare_environment()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking.tracking_uri())
