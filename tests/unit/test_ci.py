"""The gate for users' CI: the script for real, with a stub of the command and a forge on this machine; the workflows as
data."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from test_tracking import make_run

from pennyweight import flow, show
from pennyweight.cli import main

ROOT = Path(__file__).parents[2]
GATE = ROOT / "ci" / "gate.sh"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TOKEN = "a-token-that-nobody-may-see"

STUB = """#!/bin/sh
echo "$@" >>"$STUB_CALLS"
case $1 in
    run)
        if [ -n "${STUB_RECORD:-}" ]; then echo "$STUB_RECORD"; fi
        exit "${STUB_CODE:-0}"
        ;;
    report) echo "$STUB_REPORT" ;;
    promote) exit "${STUB_PROMOTE:-0}" ;;
    show)
        case $3 in
            --markdown) echo '| the "table" |' ;;
            --junit) echo "<testsuites/>" >"$4" ;;
        esac
        ;;
esac
"""
CURL = """#!/bin/sh
echo "$@" >>"$STUB_CURL"
exec {curl} "$@"
"""
RECORD = {"registered": {"model": "a-model", "version": "7"}}


class Forge(ThreadingHTTPServer):
    """GitHub's and GitLab's comments on one pull request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.comments: list[dict[str, Any]] = [{"id": 1, "body": "a person's"}]
        self.seen: list[tuple[str, str]] = []
        self.keys: set[str] = set()
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Forge

    def _answer(self) -> None:
        self.server.seen.append((self.command, self.path))
        self.server.keys |= {self.headers["Authorization"], self.headers["PRIVATE-TOKEN"]} - {None}
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.server.refuses:
            self.send_error(403)
            return
        answer: Any = self.server.comments
        if self.command != "GET":
            text = json.loads(body)["body"]
            if self.command == "POST":
                self.server.comments.append({"id": len(self.server.comments) + 1, "body": text})
            else:
                self.server.comments[int(self.path.rsplit("/", 1)[1]) - 1]["body"] = text
            answer = {}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_GET = do_POST = do_PATCH = do_PUT = _answer  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def forge() -> Iterator[Forge]:
    with Forge() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Gate:
    """A folder in which gate.sh runs with the stub on its path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls, self.curl_calls = folder / "calls", folder / "curl-calls"
        (folder / "bin").mkdir()
        _script(folder / "bin" / "pennyweight", STUB)
        _script(folder / "bin" / "curl", CURL.format(curl=shutil.which("curl")))
        (folder / "report.html").write_text("<html>")

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "STUB_CALLS": str(self.calls),
            "STUB_CURL": str(self.curl_calls),
            "STUB_REPORT": str(self.folder / "report.html"),
            "STUB_RECORD": json.dumps(RECORD),
            **environment,
        }
        command = ["sh", str(GATE), *arguments]
        return subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True, timeout=60)

    def said(self) -> list[str]:
        return self.calls.read_text().splitlines()

    def comment(self) -> str:
        return (self.folder / "pennyweight-report" / "comment.md").read_text()


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    return Gate(tmp_path)


def github(forge: Forge) -> dict[str, str]:
    return {
        "GITHUB_TOKEN": TOKEN,
        "GITHUB_REPOSITORY": "me/mine",
        "GITHUB_API_URL": forge.url,
        "GITHUB_REF": "refs/pull/12/merge",
        "GITHUB_RUN_ID": "99",
    }


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "passed"), (1, "failed: nothing passed"), (2, "bad recipe"), (3, "inconclusive"), (4, "a stage failed")],
)
def test_the_gate_ends_with_the_exit_code_of_the_run(gate: Gate, code: int, words: str) -> None:
    done = gate.run("a.yaml", "seed=1", STUB_CODE=str(code))
    assert done.returncode == code
    assert words in done.stderr
    assert gate.said()[0] == "run a.yaml seed=1 --runs runs --json"
    assert '| the "table" |' in gate.comment()
    assert f"(exit code {code})" in gate.comment()
    kept = {path.name for path in (gate.folder / "pennyweight-report").iterdir()}
    assert kept == {"run.json", "report.html", "verdicts.xml", "comment.md"}
    assert not gate.curl_calls.exists()  # without a token nobody is called


def test_without_an_outcome_no_older_one_is_shown(gate: Gate) -> None:
    gate.run("a.yaml")
    done = gate.run("a.yaml", STUB_CODE="2", STUB_RECORD="")
    assert done.returncode == 2
    assert "There is no outcome" in gate.comment()
    assert "the table" not in gate.comment()
    assert not (gate.folder / "pennyweight-report" / "report.html").exists()


def test_called_wrongly_it_says_how(gate: Gate) -> None:
    for arguments in ([], ["--promote"]):
        done = gate.run(*arguments)
        assert done.returncode == 2
        assert "usage: gate.sh" in done.stderr
    assert not gate.calls.exists()


def test_a_pull_request_on_github_has_one_comment_a_recipe(gate: Gate, forge: Forge) -> None:
    for code in ("1", "0"):
        done = gate.run("a.yaml", STUB_CODE=code, **github(forge))
        assert done.returncode == int(code)
        assert TOKEN not in done.stdout + done.stderr
    gate.run("b.yaml", **github(forge))
    assert [comment["body"].splitlines()[0] for comment in forge.comments] == [
        "a person's",
        "<!-- pennyweight: a.yaml -->",
        "<!-- pennyweight: b.yaml -->",
    ]
    assert '| the "table" |' in forge.comments[1]["body"]
    assert "The gate passed: there is a winner (exit code 0)." in forge.comments[1]["body"]
    assert "(https://github.com/me/mine/actions/runs/99)" in forge.comments[1]["body"]
    listing = ("GET", "/repos/me/mine/issues/12/comments?per_page=100")
    posting = ("POST", "/repos/me/mine/issues/12/comments")
    assert forge.seen == [listing, posting, listing, ("PATCH", "/repos/me/mine/issues/comments/2"), listing, posting]
    assert forge.keys == {f"Bearer {TOKEN}"}
    assert TOKEN not in gate.curl_calls.read_text()  # nor in a list of processes
    assert not any(TOKEN in path.read_text() for path in gate.folder.rglob("*") if path.is_file())


def test_a_merge_request_on_gitlab_too(gate: Gate, forge: Forge) -> None:
    settings = {
        "GITLAB_TOKEN": TOKEN,
        "CI_API_V4_URL": f"{forge.url}/api/v4",
        "CI_PROJECT_ID": "5",
        "CI_MERGE_REQUEST_IID": "3",
        "CI_JOB_URL": "https://gitlab.example.com/job/1",
    }
    for _ in range(2):
        assert gate.run("a.yaml", **settings).returncode == 0
    assert len(forge.comments) == 2
    assert "(https://gitlab.example.com/job/1)" in forge.comments[1]["body"]
    notes = "/api/v4/projects/5/merge_requests/3/notes"
    listing = ("GET", f"{notes}?per_page=100")
    assert forge.seen == [listing, ("POST", notes), listing, ("PUT", f"{notes}/2")]
    assert forge.keys == {TOKEN}


@pytest.mark.parametrize("code", ["0", "1"])
def test_a_forge_that_refuses_does_not_change_the_verdict(gate: Gate, forge: Forge, code: str) -> None:
    forge.refuses = True
    done = gate.run("a.yaml", STUB_CODE=code, **github(forge))
    assert done.returncode == int(code)
    assert "the comment was not written" in done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_a_push_has_no_pull_request(gate: Gate, forge: Forge) -> None:
    gate.run("a.yaml", **{**github(forge), "GITHUB_REF": "refs/heads/main"})
    assert forge.seen == []


def test_the_summary_page_gets_the_table(gate: Gate) -> None:
    summary = gate.folder / "summary.md"
    gate.run("a.yaml", GITHUB_STEP_SUMMARY=str(summary))
    assert summary.read_text() == gate.comment()


def test_what_the_run_registered_is_promoted(gate: Gate) -> None:
    assert gate.run("--promote", "a.yaml").returncode == 0
    assert gate.said()[-1] == "promote a-model --version 7"
    assert gate.run("--promote", "a.yaml", STUB_PROMOTE="4").returncode == 4


def test_nothing_is_promoted_that_did_not_pass_or_was_not_registered(gate: Gate) -> None:
    assert gate.run("--promote", "a.yaml", STUB_CODE="3").returncode == 3
    done = gate.run("--promote", "a.yaml", STUB_RECORD='{"registered": null}')
    assert done.returncode == 2
    assert "nothing was registered" in done.stderr
    assert gate.run("a.yaml").returncode == 0
    assert not any(line.startswith("promote") for line in gate.said())


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_outcome_as_markdown(tmp_path: Path) -> None:
    record = make_run(tmp_path)
    text = show.format_markdown(record)
    assert text.startswith(
        "### `tiny`\n\n**winner: int8@onnxruntime at $0.200 per million tokens, 50% less than base@onnxruntime"
    )
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0] == "| candidate | verdict | MB | kl_mean | tok/s | $/1M tokens | saving |"
    assert table[2:] == [
        "| `base@onnxruntime` | base | 0 | - | 100.0 | 0.400 | - |",
        "| **`int8@onnxruntime`** | pass | 0 | 0.020 | 100.0 | 0.200 | 50% |",
    ]
    assert len({line.count("|") for line in table}) == 1
    assert "- int8@onnxruntime: because it is pass" in text


def test_reasons_read_as_they_are_in_markdown(tmp_path: Path) -> None:
    record = make_run(tmp_path)
    result = record.candidates[1]
    verdict = result.verdict.model_copy(update={"reasons": ["fail: kl_mean 0.2 > 0.1\n|Δ| <b> $1 `x` [y](z)"]})
    record = record.model_copy(update={"candidates": [result.model_copy(update={"verdict": verdict})]})
    (line,) = [line for line in show.format_markdown(record).splitlines() if line.startswith("- ")]
    assert line == r"- fail: kl\_mean 0.2 \> 0.1 \|Δ\| \<b\> \$1 \`x\` \[y\](z)"


def test_show_prints_markdown(tmp_path: Path) -> None:
    record = make_run(tmp_path)
    flow.write_record(record)
    done = CliRunner().invoke(main, ["show", record.run_dir, "--markdown"])
    assert done.exit_code == 0
    assert done.stdout == show.format_markdown(record) + "\n"
    assert CliRunner().invoke(main, ["show", record.run_dir, "--markdown", "--task", "piqa"]).exit_code == 2


# --- the workflows ----------------------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text())
    found["on"] = found.pop(True)  # YAML 1.1 reads the key `on` as a truth value
    return found


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_safe(path: Path) -> None:
    workflow = load(path)
    assert "permissions" in workflow or all("permissions" in job for job in workflow["jobs"].values())
    for step in steps(workflow):
        # What a caller or a pull request writes must not become part of a script.
        assert "${{" not in step.get("run", "")
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])


def test_the_reusable_workflow_runs_the_script() -> None:
    gate = load(ROOT / ".github" / "workflows" / "gate.yml")
    declared = gate["on"]["workflow_call"]
    assert declared["inputs"]["recipe"]["required"] is True
    assert declared["inputs"]["comment"]["type"] == declared["inputs"]["promote"]["type"] == "boolean"
    assert gate["jobs"]["gate"]["permissions"] == {"contents": "read", "pull-requests": "write"}
    (step,) = [step for step in steps(gate) if step.get("name") == "gate"]
    assert ".pennyweight/source/ci/gate.sh" in step["run"]
    assert os.access(GATE, os.X_OK)
    # What is not merged reaches neither the team's registry nor its champion.
    for name in ("PROMOTE", "MLFLOW_TRACKING_URI"):
        assert "!startsWith(github.event_name, 'pull_request') && " in step["env"][name]


def test_the_example_calls_it_with_what_it_takes() -> None:
    declared = load(ROOT / ".github" / "workflows" / "gate.yml")["on"]["workflow_call"]
    example = load(ROOT / ".github" / "workflows" / "gate-a-model.yml")
    job = example["jobs"]["gate"]
    assert (ROOT / job["uses"]).is_file()
    assert job["with"].keys() <= declared["inputs"].keys()
    assert job["secrets"].keys() <= declared["secrets"].keys()
    assert (ROOT / job["with"]["recipe"]).is_file()
    assert example["permissions"] == {"contents": "read", "pull-requests": "write"}  # a callee cannot have more


def test_workflows_pass_actionlint() -> None:
    command = shutil.which("actionlint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if command is None:
        pytest.skip("actionlint is not installed")
    done = subprocess.run([command, *map(str, WORKFLOWS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
