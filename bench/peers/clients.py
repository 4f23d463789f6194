"""Load generators: how each is called for the same load, and where its answer stands."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from environments import python_of
from servers import on_cores

GUIDELLM = "guidellm==0.8.1"
#: The newest torch that guidellm runs with has no say in its speed; this one has builds without GPU libraries.
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Load:
    """A load on one server. Both files hold the same prompts: as one text, and as a line of JSON each."""

    url: str
    model: str
    tokenizer: Path
    """Its folder, for those that count a prompt's tokens themselves."""
    text: Path
    prompts: Path
    input_tokens: int
    output_tokens: int
    concurrency: int
    requests: int
    rate: float | None = None
    """Requests a second, evenly spaced; None: a closed loop of `concurrency` users."""


@dataclass(frozen=True)
class Stated:
    """What a load generator says, in the words of its own report: medians over requests, and a rate."""

    ttft_ms: float
    tpot_ms: float
    """(last − first token) / (tokens − 1)"""
    output_tokens_per_second: float
    requests: int
    """Served, warm-up included where it is left out of the rest."""
    failed: int


@dataclass(frozen=True)
class Client:
    command: Callable[[Load, Path], list[str]]
    """(load, file for the report) → what to run."""
    read: Callable[[Any], Stated]
    """Of the report's JSON."""
    environment: Mapping[str, str]
    prints: bool = False
    """The report is what it prints."""


@dataclass(frozen=True)
class Turn:
    stated: Stated
    cpu_seconds: float
    """Of the client and everything that it started, from its start to its end."""
    serving_cpu_seconds: float | None
    """Of these, from when its first request arrived until its last one was done, where the server tells."""
    seconds: float


def clients() -> dict[str, Client]:
    """All that can run here; ours first."""
    offline = {"HF_HUB_OFFLINE": "1"}
    found = {
        "pennyweight": Client(_pennyweight, read_pennyweight, {}, prints=True),
        "guidellm": Client(_guidellm, read_guidellm, offline),
        "guidellm, 1 worker": Client(_guidellm, read_guidellm, offline | {"GUIDELLM__MAX_WORKER_PROCESSES": "1"}),
    }
    if importlib.util.find_spec("vllm"):
        found["vllm bench serve"] = Client(_vllm, read_vllm, offline)
    return found


def take_turn(client: Client, load: Load, cores: set[int], events: int | None = None) -> Turn:
    """Run a load generator to its end on these cores. `events` is a descriptor that tells when requests arrive and end.

    Raises SystemExit where it fails, or not all was served.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report, printed, log = (Path(scratch) / name for name in ("report.json", "printed.json", "log"))
        command = client.command(load, report)
        environment = os.environ | client.environment | {"HF_DATASETS_CACHE": f"{scratch}/datasets"}
        begin = time.perf_counter()
        with on_cores(cores), printed.open("w") as out, log.open("w") as told:
            process = subprocess.Popen(command, stdout=out, stderr=told, cwd=scratch, env=environment)
        serving = None if events is None else _serving_cpu(process.pid, events, load.requests)
        _, status, used = os.wait4(process.pid, 0)  # with what its own children used
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begin
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}\n{printed.read_text()[-2000:]}{log.read_text()[-2000:]}")
        stated = client.read(json.loads((printed if client.prints else report).read_text()))
    if (stated.requests, stated.failed) != (load.requests, 0):
        raise SystemExit(f"{command[0]} served {stated.requests} of {load.requests}, {stated.failed} failed")
    return Turn(stated, used.ru_utime + used.ru_stime, serving, seconds)


def _serving_cpu(pid: int, events: int, requests: int) -> float | None:
    """CPU seconds of a process tree from the first arrival (`a`) to the last request's end (`d`); None where it ends
    before that."""
    begin, done = None, 0
    while done < requests:
        if not select.select([events], [], [], 1.0)[0]:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return None
            continue
        if begin is None:
            begin = _tree_cpu(pid)
        done += os.read(events, 1 << 16).count(b"d")
    return _tree_cpu(pid) - begin


def _tree_cpu(pid: int) -> float:
    """CPU seconds of a process, of what it started, and of what those have waited for."""
    root, total = psutil.Process(pid), 0.0
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def _pennyweight(load: Load, report: Path) -> list[str]:
    shape = f"{load.input_tokens}:{load.output_tokens}"
    arrivals = ["--workload", shape, "--concurrency", str(load.concurrency), "--requests", str(load.requests)]
    if load.rate is not None:
        trace = report.with_name("trace.jsonl")
        sizes = {"input_tokens": load.input_tokens, "output_tokens": load.output_tokens}
        rows = (json.dumps({"arrival": number / load.rate, **sizes}) for number in range(load.requests))
        trace.write_text("\n".join(rows))
        arrivals = ["--trace", str(trace)]
    return [
        sys.executable, "-m", "pennyweight", "bench", load.url, "--model", load.model, *arrivals,
        "--text", str(load.text), "--json",
    ]  # fmt: skip


def _guidellm(load: Load, report: Path) -> list[str]:
    python = python_of("guidellm", [GUIDELLM, TORCH])
    server = {
        "kind": "openai_http", "target": load.url, "model": load.model, "request_format": "/v1/completions",
        "extras": {"body": {"temperature": 0}},
    }  # fmt: skip
    profile = f"kind=concurrent,streams={load.concurrency}"
    if load.rate is not None:
        profile = f"kind=constant,rate={load.rate:g}"
    return [
        str(python.with_name("guidellm")), "run", "--backend", json.dumps(server), "--profile", profile,
        "--constraint", f"kind=max_requests,count={load.requests}",
        "--data", f"kind=json_file,path={load.prompts}", "--output", f"kind=json,path={report}", "--disable-console",
    ]  # fmt: skip


def _vllm(load: Load, report: Path) -> list[str]:
    paced = [] if load.rate is None else ["--request-rate", f"{load.rate:g}", "--burstiness", "1e6"]
    return [
        str(Path(sys.executable).with_name("vllm")), "bench", "serve", "--backend", "openai",
        "--base-url", load.url, "--endpoint", "/v1/completions", "--model", load.model,
        "--tokenizer", str(load.tokenizer), "--dataset-name", "custom", "--dataset-path", str(load.prompts),
        "--disable-shuffle", "--skip-chat-template", "--custom-output-len", str(load.output_tokens),
        "--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency), "--temperature", "0",
        "--ignore-eos", *paced, "--num-warmups", "0", "--ready-check-timeout-sec", "0", "--disable-tqdm",
        "--save-result", "--result-dir", str(report.parent), "--result-filename", report.name,
    ]  # fmt: skip


def read_pennyweight(report: Any) -> Stated:
    """Of `pennyweight bench --json`."""
    (load,) = report["loads"]
    return Stated(
        ttft_ms=load["ttft_ms"]["p50"],
        tpot_ms=load["tpot_ms"]["p50"],
        output_tokens_per_second=load["output_tokens_per_second"]["value"],
        requests=load["requests"] + load["steady"]["warm_up_requests"],
        failed=sum(load["failed"].values()),
    )


def read_guidellm(report: Any) -> Stated:
    """Of `guidellm run --output kind=json` (version 2 of its report). Its inter-token latency is a mean for each
    request, so what others call TPOT."""
    (benchmark,) = report["benchmarks"]
    metrics = benchmark["metrics"]
    return Stated(
        ttft_ms=metrics["time_to_first_token_ms"]["successful"]["median"],
        tpot_ms=metrics["inter_token_latency_ms"]["successful"]["median"],
        output_tokens_per_second=metrics["output_tokens_per_second"]["successful"]["mean"],
        requests=metrics["request_totals"]["successful"],
        failed=metrics["request_totals"]["errored"] + metrics["request_totals"]["incomplete"],
    )


def read_vllm(report: Any) -> Stated:
    """Of `vllm bench serve --save-result`."""
    return Stated(
        ttft_ms=report["median_ttft_ms"],
        tpot_ms=report["median_tpot_ms"],
        output_tokens_per_second=report["output_throughput"],
        requests=report["completed"],
        failed=report["failed"],
    )
