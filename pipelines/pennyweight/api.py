"""What notebooks and programs use: `from pennyweight import load_recipe, run, promote, rollback, serve`."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pennyweight.errors import PennyweightError, StageError, UsageError
from pennyweight.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from pennyweight.records import RunRecord
    from pennyweight.tracking import Promotion

Say = Callable[[str], None]

_LISTENING = re.compile(r"listening on (http://\S+);")
#: Seconds between two looks whether a server is ready.
_PAUSE = 0.1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(recipe: Recipe | str | Path, *, runs: str | Path = "runs", say: Say = _say) -> RunRecord:
    """Run a recipe: make the variants, judge them, price them, register the winner. Returns the run's record.

    `recipe` is one that `load_recipe` read, a file, or the name of a shipped recipe; `runs` is the folder that gets the
    run's own; `say` is told how it goes. Raises RecipeError and StoreError before anything is made; what fails later is
    in the record.
    """
    from pennyweight import flow
    from pennyweight.store import Store

    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return flow.run(loaded, Path(loaded.name if isinstance(recipe, Recipe) else recipe), Path(runs), Store(), say)


def promote(model: str, version: int | None = None, *, reason: str = "") -> Promotion:
    """Make the challenger of a registered model, or the version given, its champion, once it has proved to be what the
    gate judged. Raises UsageError, TrackingError and StageError; nothing has moved then."""
    from pennyweight import tracking

    return tracking.promote(model, version, reason=reason, say=_say)


def rollback(model: str, *, reason: str = "") -> Promotion:
    """Make the champion before the present one champion again, after the same checks as `promote`."""
    from pennyweight import tracking

    return tracking.rollback(model, reason=reason, say=_say)


class Server:
    """A server in a process of its own, at work until `stop`, or to the end of a `with` block."""

    def __init__(self, process: subprocess.Popen[str], say: Say) -> None:
        self.process = process
        self.url = ""
        """Its root: OpenAI's API is at `url + "/v1"`."""
        self._lines: list[str] = []
        self._listens = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(say,), daemon=True)
        self._reader.start()

    def stop(self, seconds: float = 60.0) -> int:
        """Let what is in flight end, for so many seconds at most. Returns the process's exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _read(self, say: Say) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self._lines.append(line)
            say(line.rstrip())
            if not self.url and (found := _LISTENING.search(line)):
                self.url = found[1]
                self._listens.set()
        self._listens.set()

    def _wait(self) -> None:
        """Until it is ready. Raises UsageError or StageError with what it said, where it ends before."""
        self._listens.wait()
        while self.url and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/ready", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(_PAUSE)
        self._reader.join()
        self.process.wait()
        kind: type[PennyweightError] = UsageError if self.process.returncode == 2 else StageError
        raise kind("".join(self._lines).strip() or f"the server ended with {self.process.returncode}")


def serve(target: str, *, host: str = "127.0.0.1", port: int = 0, say: Say = _say, **options: object) -> Server:
    """Serve a model over OpenAI's API in a process of its own; returns when it is ready.

    `target` is a checkpoint's folder, a .gguf file, RUN[:CANDIDATE], or NAME@ALIAS, which is followed. Port 0: any that
    is free. `options` are those of `pennyweight serve`, such as `max_queue=64`. Raises UsageError and StageError where
    it cannot be served.
    """
    command = [sys.executable, "-m", "pennyweight", "serve", target, f"--host={host}", f"--port={port}"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    server = Server(subprocess.Popen(command, stderr=subprocess.PIPE, text=True), say)
    try:
        server._wait()
    except BaseException:
        server.stop()
        raise
    return server
