"""The command line in a process of its own, forked from one that has the heavy imports behind it.

They take ten times as long as the whole run of a tiny model.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from functools import cache
from multiprocessing.context import BaseContext
from pathlib import Path

#: Seconds after which a command is taken to hang.
PATIENCE = 600
PRELOADED = (
    "torch", "transformers", "lm_eval.evaluator", "lm_eval.tasks", "mlflow", "onnx", "onnxruntime", "pennyweight.flow",
    "pennyweight.cli", "pennyweight.steps.quantize", "pennyweight.report", "pennyweight.tracking", "command",
)  # fmt: skip


def pennyweight(*arguments: str, cwd: Path, store: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `pennyweight` in `cwd`. `environment` is set before anything is imported, which takes a process from
    nothing."""
    variables = {**os.environ, "PENNYWEIGHT_HOME": str(store), "MLFLOW_TRACKING_URI": "", **environment}
    if environment:
        command = [sys.executable, "-m", "pennyweight", *arguments]
        return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=PATIENCE)
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch) / "out", Path(scratch) / "err"
        process = _forks().Process(target=_run, args=(arguments, str(cwd), variables, str(out), str(err)))
        process.start()
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"pennyweight {' '.join(arguments)} hangs: {err.read_text()}")
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


@cache
def _forks() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _run(arguments: tuple[str, ...], cwd: str, variables: dict[str, str], out: str, err: str) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    for path, descriptor in ((out, 1), (err, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    from pennyweight.cli import main

    main(list(arguments), prog_name="pennyweight")
