"""The team's MLflow server, as data: there is no Docker where the tests run."""

import configparser
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MLFLOW = ROOT / "mlflow"
DOCKERFILE = (MLFLOW / "Dockerfile").read_text()
README = (MLFLOW / "README.md").read_text()


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((MLFLOW / "compose.yaml").read_text())


def test_images_are_pinned(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert re.fullmatch(r"[\w./-]+:v?\d+(\.\d+)+(-\w+)?", service["image"])
    assert re.search(r"^FROM python:3\.11-slim-bookworm$", DOCKERFILE, re.M)


def test_versions_are_those_that_pennyweight_is_tested_with(compose: dict[str, Any]) -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (version,) = [package.partition("==")[2] for package in packages if package.startswith("mlflow==")]
    assert f"mlflow[auth]=={version}" in DOCKERFILE
    assert compose["services"]["server"]["image"] == f"pennyweight-mlflow:{version}"
    assert re.search(r"psycopg2-binary==[\d.]+ boto3==[\d.]+", DOCKERFILE)


def test_every_service_says_whether_it_is_well(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, service in services.items():
        assert "healthcheck" in service or ("build" in service and "HEALTHCHECK" in DOCKERFILE), name
        assert service["restart"] == "unless-stopped"
    waits = services["server"]["depends_on"]
    assert waits == {"database": {"condition": "service_healthy"}, "objects": {"condition": "service_healthy"}}


def test_no_secret_is_written_down_and_none_has_a_default(compose: dict[str, Any]) -> None:
    required = set()
    for service in compose["services"].values():
        for name, value in service["environment"].items():
            if re.search("PASSWORD|SECRET", name):
                found = re.fullmatch(r"\$\{(\w+):\?[^}]+\}", value)
                assert found, name
                required.add(found[1])
    assert required == {
        "POSTGRES_PASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "MLFLOW_AUTH_ADMIN_PASSWORD",
        "MLFLOW_FLASK_SERVER_SECRET_KEY",
    }
    start = README.partition("## Start it")[2].partition("## ")[0]
    assert all(name in start for name in required)


def test_only_the_server_is_published_and_only_here(compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert published == {"server": ["${MLFLOW_BIND:-127.0.0.1}:${MLFLOW_PUBLISHED_PORT:-5000}:5000"]}


def test_the_server_asks_for_a_login(compose: dict[str, Any]) -> None:
    server = compose["services"]["server"]
    assert server["command"] == ["mlflow", "server", "--app-name", "basic-auth"]
    path = server["environment"]["MLFLOW_AUTH_CONFIG_PATH"]
    assert server["volumes"] == [f"./basic-auth.ini:{path}:ro"]
    settings = configparser.ConfigParser()
    settings.read(MLFLOW / "basic-auth.ini")
    auth = settings["mlflow"]
    assert auth["database_uri"] == server["environment"]["MLFLOW_BACKEND_STORE_URI"]
    assert "admin_password" not in auth
    assert auth["default_permission"] == "READ"


def test_artifacts_go_to_the_store_that_comes_along(compose: dict[str, Any]) -> None:
    server, objects = compose["services"]["server"]["environment"], compose["services"]["objects"]
    bucket = re.search(r"s3://([\w-]+)", server["MLFLOW_ARTIFACTS_DESTINATION"])
    assert bucket
    assert objects["volumes"] == [f"objects:/data/{bucket[1]}"]  # a folder is a bucket
    assert objects["command"] == ["posix", "/data"]
    assert "http://objects:7070" in server["MLFLOW_S3_ENDPOINT_URL"]
    keys = objects["environment"]
    assert server["AWS_ACCESS_KEY_ID"] == keys["ROOT_ACCESS_KEY_ID"]
    assert server["AWS_SECRET_ACCESS_KEY"] == keys["ROOT_SECRET_ACCESS_KEY"]


def test_every_setting_is_explained(compose: dict[str, Any]) -> None:
    text = (MLFLOW / "compose.yaml").read_text()
    settings = set(re.findall(r"\$\{(\w+)", text))
    assert [name for name in sorted(settings) if f"`{name}`" not in README] == []


def test_the_folder_is_no_package() -> None:
    assert not list(MLFLOW.glob("*.py"))
