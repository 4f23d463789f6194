"""Content-addressed results of stages: resume, reuse, garbage collection.

A stage's result is keyed by its inputs' digests, its settings and the versions that matter. It is built under a
temporary name and renamed when complete, so a reader never sees half a result and a killed run loses one stage at most.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight.errors import StoreError
from pennyweight.uses import Uses, take_lock

RECORD = "record.json"
#: Where results are built before they are moved into place.
TEMPORARY = "tmp"
#: Where work that goes on after it was killed keeps its state until it has ended.
WORK = "work"
_READ_CHUNK = 1 << 20
#: A full disk in the words of libraries: the system's, numpy's and torch's.
_FULL = re.compile(rf"{os.strerror(errno.ENOSPC)}|\d+ requested and \d+ written|PytorchStreamWriter failed writing")


def default_root() -> Path:
    """`$PENNYWEIGHT_HOME`, else a folder of ours in the user's cache folder."""
    if home := os.environ.get("PENNYWEIGHT_HOME"):
        return Path(home).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "pennyweight"


def canonical_json(value: Any) -> str:
    """JSON with one spelling for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """sha256 of a JSON value's canonical spelling, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """sha256 over the relative names and contents of all files below `folder`, in hex."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest_of([[path.relative_to(folder).as_posix(), file_digest(path)] for path in files])


@dataclass(frozen=True)
class Entry:
    """One complete result in the store."""

    stage: str
    key: str
    folder: Path
    record: dict[str, Any]
    reused: bool

    @property
    def files(self) -> Path:
        return self.folder / "files"


class Store:
    """Results under `root/<stage>/<key>/`: `record.json` and `files/`."""

    def __init__(self, root: Path | None = None):
        self.root = root or default_root()
        self.uses = Uses(self.root)

    def check_writable(self) -> None:
        """Raise StoreError when nothing can be written below the root."""
        probe = self.root / TEMPORARY / f"probe-{os.getpid()}"
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise StoreError(
                f"the store {self.root} cannot be written: {error.strerror}",
                "make it writable, or name another folder in PENNYWEIGHT_HOME",
            ) from error

    def find(self, stage: str, inputs: dict[str, Any]) -> Entry | None:
        """The result for these inputs, or None. A result whose record cannot be read counts as none."""
        return self._read(stage, digest_of(inputs))

    def get_or_build(self, stage: str, inputs: dict[str, Any], build: Callable[[Path], dict[str, Any]]) -> Entry:
        """The result of `stage` for `inputs`, built by `build(files_folder) -> record` where there is none yet.

        Two processes that build the same result both do the work; the first to finish is kept. Raises StoreError when
        the disk is full or the store is read-only.
        """
        key = digest_of(inputs)
        with self.uses.steady():
            if found := self._read(stage, key):
                self.uses.note(stage, key)
                return found
        self.uses.begin()
        temporary = self.root / TEMPORARY / f"{stage}-{key[:16]}-{os.getpid()}"
        final = self.root / stage / key
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "files").mkdir(parents=True)
            record = build(temporary / "files")
            body = {"stage": stage, "inputs": inputs, "created": time.time(), "record": record}
            (temporary / RECORD).write_text(json.dumps(body, indent=1, sort_keys=True))
            with self.uses.steady():
                final.parent.mkdir(parents=True, exist_ok=True)
                _move_into_place(temporary, final)
                self.uses.note(stage, key)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) or is_full(error):
                raise explain(error, self.root) from error
            raise
        return Entry(stage, key, final, record, reused=False)

    @contextlib.contextmanager
    def workspace(self, stage: str, key: str) -> Iterator[Path]:
        """A folder for the state of long work, found again by whoever does the same work after a failure or a kill, and
        removed once the block ends without an error.

        While another process is in it, the caller gets an empty one of its own, which does not outlast it.
        """
        folder = self.root / WORK / f"{stage}-{key[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("a") as lock:
            if not take_lock(lock):
                private = self.root / TEMPORARY / f"{stage}-{key[:16]}-work-{os.getpid()}"
                private.mkdir(parents=True)
                try:
                    yield private
                finally:
                    shutil.rmtree(private, ignore_errors=True)
                return
            yield folder
            shutil.rmtree(folder, ignore_errors=True)

    def discard(self, entry: Entry) -> None:
        """Forget one result, so that it is built again."""
        shutil.rmtree(entry.folder, ignore_errors=True)

    def results(self) -> Iterator[tuple[str, str, Path, float]]:
        """(stage, key, folder, last use in seconds since 1970) of every complete result."""
        for record_path in sorted(self.root.glob(f"*/*/{RECORD}")):
            folder = record_path.parent
            if folder.parent.name != TEMPORARY:
                yield folder.parent.name, folder.name, folder, record_path.stat().st_mtime

    def entries(self) -> Iterator[tuple[str, str, Path, float, int]]:
        """`results`, each with its bytes."""
        for result in self.results():
            yield *result, folder_bytes(result[2])

    def _read(self, stage: str, key: str) -> Entry | None:
        folder = self.root / stage / key
        try:
            body = json.loads((folder / RECORD).read_text())
        except (OSError, json.JSONDecodeError):
            return None
        with contextlib.suppress(OSError):
            os.utime(folder / RECORD)  # garbage collection goes by last use
        return Entry(stage, key, folder, body["record"], reused=True)


def is_at_work(workspace: Path) -> bool:
    """Whether a living process is in a workspace."""
    with (workspace / "lock").open("a") as stream:
        return not take_lock(stream)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`. What vanishes meanwhile does not count."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _move_into_place(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if (final / RECORD).exists():  # another process finished the same work first
            shutil.rmtree(temporary)
        else:
            shutil.rmtree(final)
            temporary.rename(final)


def is_full(error: BaseException) -> bool:
    """It says that the disk is full. Libraries with writers of their own say so in words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return _FULL.search(str(error)) is not None


def explain(error: BaseException, root: Path) -> StoreError:
    """What the user can do about an error of the disk that holds the store."""
    if is_full(error):
        return StoreError(
            f"no space left on the disk that holds the store {root}",
            "free some, or `pennyweight store gc`, or name a folder on another disk in PENNYWEIGHT_HOME; "
            "finished stages are kept, so run the same command again",
        )
    assert isinstance(error, OSError)
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StoreError(
            f"the store {root} cannot be written: {error.strerror}",
            "make it writable, or name another folder in PENNYWEIGHT_HOME",
        )
    return StoreError(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
