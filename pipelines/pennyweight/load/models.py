"""A model for `bench`, by any of its names: found, exported where its runtime wants that, and loaded if it fits."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight import checkpoints, compare, doctor, installed, machine, runtimes, sources, stages
from pennyweight.errors import PennyweightError, SourceError, StageError, StoreError, UsageError
from pennyweight.formats.gguf import engines
from pennyweight.load.engine import Engine
from pennyweight.plan import format_bytes
from pennyweight.plan.constants import COPIES, WARM_UP
from pennyweight.plan.sizes import ITEMSIZE
from pennyweight.progress import output_to
from pennyweight.recipe import RuntimeName
from pennyweight.records import Candidate, Checkpoint
from pennyweight.runtimes import MOST_AT_ONCE, Limits
from pennyweight.store import Store, file_digest, folder_digest

#: Runtimes that a checkpoint is tried in where nobody names one, by device.
PREFERENCE: dict[str, tuple[RuntimeName, ...]] = {
    "cpu": ("openvino", "onnxruntime", "transformers"),
    "cuda": ("onnxruntime", "transformers"),
}
#: Of the memory that is free, how much weights and requests may take together.
SHARE = 0.9
#: What exporting and loading print.
LOG = "bench.log"

#: Files that tell an exported model.
GGUF, ONNX = "model.gguf", "genai_config.json"

_REGISTERED = re.compile(r"[^/:@]+@[^/:@]+")


@dataclass(frozen=True)
class Model:
    """What a target names: files that a runtime loads, a checkpoint, or both."""

    target: str
    name: str
    candidate: Candidate | None = None
    checkpoint: Checkpoint | None = None
    note: str = ""
    """What a reader of its numbers must know."""


@dataclass(frozen=True)
class Demand:
    """What a workload asks for."""

    sizes: Sequence[tuple[int, int]]
    """(tokens in, tokens out) of requests that it has."""
    users: int | None
    """Requests in flight at once at most; None where arrivals decide."""
    cut: bool = False
    """Longer requests than the model's context are not sent."""

    def within(self, context: int | None) -> Demand:
        """With `cut`: what is asked of a model with this context, no more than fits, at least half of it to be read."""
        if not self.cut or context is None:
            return self
        sizes = [(min(into, context - min(out, context // 2)), min(out, context // 2)) for into, out in self.sizes]
        return replace(self, sizes=sizes)


def open_engine(
    model: Model, runtime: RuntimeName | None, demand: Demand, stop_at_eos: bool, store: Store, stack: ExitStack,
    say: Callable[[str], None], log_name: str = LOG,
) -> Engine:  # fmt: skip
    """A model in this process, loaded and warm; `stack` closes it.

    Where nobody names a runtime a candidate keeps its own, and a checkpoint gets the first that can run it. Raises
    UsageError for a runtime or a demand that cannot work, StageError where no runtime can run the model.
    """
    names = _runtimes_for(model, runtime)
    store.check_writable()
    log = store.root / log_name
    log.unlink(missing_ok=True)
    say(f"loading {model.name}; what libraries print is in {log}")
    if model.note:
        say(f"note: {model.note}")
    reasons: list[str] = []
    for name in names:
        try:
            with output_to(log):
                engine = _open(model, name, demand, stop_at_eos, store)
        except (UsageError, StoreError):
            raise
        except Exception as error:
            reason = error.message if isinstance(error, PennyweightError) else f"{type(error).__name__}: {error}"
            reasons.append(f"{name}: {reason}")
            continue
        stack.callback(engine.session.close)
        for reason in reasons:
            say(f"not in {reason}")
        return engine
    raise StageError(f"{model.name} cannot be run in {'; in '.join(reasons)}")


def _open(model: Model, name: RuntimeName, demand: Demand, stop_at_eos: bool, store: Store) -> Engine:
    device, kind, candidate = _device(name), runtimes.get(name), model.candidate
    if candidate is None or candidate.runtime != name:
        assert model.checkpoint
        candidate = stages.export_alone(model.checkpoint, name, device, store)
    limits = kind.limits(candidate)
    demand = demand.within(limits.context)
    check_context(limits, demand)
    at_once = check_room(limits, loaded_bytes(candidate), machine.free_memory(device), demand)
    session = kind.load(candidate, device)
    session.at_once = at_once
    try:
        (into, out), (most_in, most_out) = demand.sizes[0], WARM_UP
        session.generate(np.zeros((1, min(into, most_in)), np.int64), min(out, most_out))
    except BaseException:
        session.close()
        raise
    return Engine(model.target, model.name, name, session.batching, session, limits.vocabulary, stop_at_eos, candidate)


# --- whether it fits --------------------------------------------------------------------------------------------------


def check_context(limits: Limits, demand: Demand) -> None:
    """Raise UsageError for requests that are longer than the model's context."""
    into, out = max(demand.sizes, key=sum)
    if limits.context is not None and into + out > limits.context:
        raise UsageError(
            f"the model's context is {limits.context:,} tokens; the workload asks for {into:,} in and {out:,} out, "
            f"{into + out:,} together",
            "ask for shorter requests with --workload or --trace-length",
        )


def check_room(limits: Limits, weights: int, free: int, demand: Demand) -> int:
    """Requests that are to be served at once. Raises UsageError where fewer fit into memory than the users ask for.

    A request's keys and values count twice, as caches grow by being copied.
    """
    into, out = (float(mean) for mean in np.mean(demand.sizes, 0))
    each = 2 * limits.token_bytes * (into + out) + limits.prompt_bytes * into
    fit = int((SHARE * free - weights) // each)
    if fit >= (demand.users or 1):
        return min(fit, max(MOST_AT_ONCE, demand.users or 0))
    users = demand.users or 1
    raise UsageError(
        f"{users} request{'s' if users > 1 else ''} at once with {into:.0f} tokens in and {out:.0f} out need about "
        f"{format_bytes(int(users * each))} beside {format_bytes(weights)} of weights; {format_bytes(free)} are free",
        f"at most {fit} fit: lower --concurrency or --knee" if fit > 0 else "take a smaller model or shorter requests",
    )


def loaded_bytes(candidate: Candidate) -> int:
    """Memory that a candidate's weights take once they are loaded."""
    if candidate.runtime == "transformers":
        return candidate.checkpoint.parameters * ITEMSIZE[candidate.dtype]
    return int(COPIES[candidate.runtime] * candidate.weight_bytes)


# --- which runtime ----------------------------------------------------------------------------------------------------


def _device(runtime: RuntimeName) -> str:
    return "cpu" if runtime == "openvino" else machine.resolve_device("auto")


def _runtimes_for(model: Model, wanted: RuntimeName | None) -> tuple[RuntimeName, ...]:
    """Runtimes to try. Raises UsageError where none can load the model, or the one that must is not installed."""
    own = model.candidate.runtime if model.candidate else None
    if wanted not in (None, own) and model.checkpoint is None:
        raise UsageError(
            f"{model.target} is what {own} loads, and no checkpoint for {wanted}", "name the checkpoint's own folder"
        )
    if name := wanted or own:
        if missing := installed.missing_packages(name, _device(name)):
            raise UsageError(
                f"{name} is not installed: it needs {', '.join(missing)}", doctor.how_to_get(name, _device(name))
            )
        return (name,)
    device = machine.resolve_device("auto")
    names = [name for name in PREFERENCE[device] if not installed.missing_packages(name, device)]
    if not names:
        raise UsageError("no runtime is installed", doctor.how_to_get("onnxruntime", device))
    return tuple(names)


# --- what a target names ----------------------------------------------------------------------------------------------


def is_registered(target: str) -> bool:
    """Whether a target has the form NAME@ALIAS, and is no file of that name."""
    return bool(_REGISTERED.fullmatch(target)) and not Path(target).exists()


def find(target: str, store: Store, stack: ExitStack) -> Model:
    """What a target names. What it fetches goes with `stack`. Raises UsageError, SourceError, TrackingError."""
    path = Path(target)
    if target.startswith("models:") or is_registered(target):
        return _registered(target, store, stack)
    if path.is_file() and path.suffix == ".gguf":
        return _gguf(path.absolute(), target)
    if path.is_dir() and not (path / "run.json").is_file():
        return _folder(path.absolute(), target, store)
    if not Path(target.partition(":")[0]).exists():
        raise UsageError(
            f"there is no model at {target!r}",
            "name a checkpoint's folder, a .gguf file, RUN[:CANDIDATE], or a registered NAME@ALIAS; "
            "the address of a server begins with http://",
        )
    return _of_run(target)


def _of_run(target: str) -> Model:
    record, result = compare.locate(target)
    name, candidate = f"{Path(record.run_dir).name}:{result.id}", result.candidate
    if candidate is None:
        raise UsageError(f"{name} was not made: {'; '.join(result.verdict.reasons)}")
    if not Path(candidate.path).is_dir():
        raise UsageError(
            f"the files of {name} are gone: there is no {candidate.path}",
            "run the recipe again; what is in the store is not computed twice",
        )
    checkpoint = candidate.checkpoint
    return Model(target, name, candidate, checkpoint if Path(checkpoint.path).is_dir() else None)


def _registered(target: str, store: Store, stack: ExitStack) -> Model:
    from pennyweight import tracking
    from pennyweight.tracking.evidence import EVIDENCE, candidate_in

    uri = target if target.startswith("models:") else f"models:/{target}"
    fetched = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pennyweight-")))
    tracking.fetch_model(uri, fetched)
    folders = {path.parent for mark in (GGUF, ONNX, "config.json") for path in fetched.rglob(mark)}
    if not folders:
        raise SourceError(f"{uri} holds no model that can be loaded here")
    folder = min(folders, key=lambda path: len(path.parts))
    name = uri.removeprefix("models:/")
    if not (folder / EVIDENCE).is_file():
        return replace(_folder(folder, target, store), name=name)
    candidate = candidate_in(folder, json.loads((folder / EVIDENCE).read_text()))
    return Model(target, name, candidate, candidate.checkpoint if candidate.runtime == "transformers" else None)


def _folder(folder: Path, target: str, store: Store) -> Model:
    """A checkpoint, or what was exported from one."""
    if (folder / GGUF).is_file():
        return replace(_gguf(folder / GGUF, target), name=folder.name)
    if (folder / ONNX).is_file():
        return _exported(folder, "onnxruntime", target)
    if checkpoints.read_config(folder).get("auto_map"):
        raise UsageError(f"{target} comes with Python code of its own, which loading it would run")
    return Model(target, folder.name, checkpoint=sources.describe_folder(folder, target, store)[0])


def _gguf(file: Path, target: str) -> Model:
    try:
        reason, untried = engines.openvino_misreads(file)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise SourceError(f"{target} cannot be read as a GGUF file: {error}") from error
    if reason:
        raise UsageError(
            f"{target} is a GGUF file that OpenVINO GenAI cannot be trusted with: {reason}",
            "name the checkpoint's folder instead",
        )
    note = f"whether OpenVINO GenAI reads {', '.join(untried)} rightly was not tried" if untried else ""
    return replace(_exported(file, "openvino", target), note=note)


def _exported(path: Path, runtime: RuntimeName, target: str) -> Model:
    """Files that a runtime loads, without the checkpoint that they came from."""
    kind, digest = runtimes.get(runtime), folder_digest(path) if path.is_dir() else file_digest(path)
    try:
        size, weight_bytes = kind.sizes(path)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{target} cannot be read as a model of {runtime}: {error}") from error
    checkpoint = Checkpoint(
        path=str(path), digest=digest, bytes=size, weight_bytes=weight_bytes, format=runtime, dtype="unknown",
        parameters=0, origin=target,
    )  # fmt: skip
    candidate = Candidate(
        id=f"{path.name}@{runtime}", variant="base", runtime=runtime, checkpoint=checkpoint, path=str(path),
        digest=digest, bytes=size, weight_bytes=weight_bytes, dtype=kind.compute_dtype(checkpoint, _device(runtime)),
    )  # fmt: skip
    return Model(target, path.name, candidate)


def load_tokenizer(model: Model) -> Any:
    """The model's own tokenizer. Raises UsageError where it has none that can be read."""
    from transformers import AutoTokenizer

    found = [part.path for part in (model.checkpoint, model.candidate) if part]
    reasons = []
    for path in map(Path, found):
        file = path / GGUF if path.is_dir() else path
        where = {"gguf_file": file.name} if file.is_file() else {}
        try:
            return AutoTokenizer.from_pretrained(file.parent, **where)
        except Exception as error:  # readers raise whatever a file makes them trip over
            reasons.append(next(iter(str(error).splitlines()), type(error).__name__))
    raise UsageError(
        f"{model.name} has no tokenizer that can be read: {'; '.join(reasons)}", "name one: --tokenizer FOLDER"
    )
