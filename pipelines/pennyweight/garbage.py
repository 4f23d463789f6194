"""Results of the store that nothing uses any more: found, listed, removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from pydantic import Field

from pennyweight.records import Record
from pennyweight.store import TEMPORARY, WORK, Store, explain, folder_bytes, is_at_work
from pennyweight.uses import Reached, reached

_DAY = 86400


class StoreGarbage(Record):
    """One result that nothing uses, or a rest that a killed process left."""

    stage: str = Field(description="`tmp` for what a killed process left, `work` for where it could go on")
    key: str
    path: str
    used: float = Field(description="when it was last used, seconds since 1970")
    bytes: int


class StoreCollection(Record):
    """What `store gc` removed, or would remove."""

    path: str
    dry_run: bool
    results: list[StoreGarbage]
    removed: int
    freed_bytes: int
    kept: int
    kept_bytes: int


def collect(store: Store, older_than_days: float, runs: Iterable[Path] = (), dry_run: bool = False) -> StoreCollection:
    """Remove the results that were not used for so many days and that no run and no process at work uses, and what
    killed processes left half-built.

    A run uses results for as long as its folder is there; `runs` are folders of runs that the store may not know of.
    Raises StoreError where the store cannot be written.
    """
    cutoff = time.time() - older_than_days * _DAY
    try:
        with store.uses.alone():
            in_use = reached(store.root, runs, own=store.uses.path)
            doomed, kept = _sort(store, in_use, cutoff)
            if not dry_run:
                doomed = [(*item[:2], _set_aside(store, *item[:3]), item[3]) for item in doomed]
                for path in in_use.forgotten:
                    path.unlink(missing_ok=True)
        found = [_describe(store, *item) for item in doomed]
        if not dry_run:
            for _, _, folder, _ in doomed:
                with contextlib.suppress(FileNotFoundError):  # another collector's work
                    shutil.rmtree(folder)
    except OSError as error:
        raise explain(error, store.root) from error
    return StoreCollection(
        path=str(store.root),
        dry_run=dry_run,
        results=found,
        removed=len(found),
        freed_bytes=sum(item.bytes for item in found),
        kept=len(kept),
        kept_bytes=sum(folder_bytes(folder) for folder in kept),
    )


_Item = tuple[str, str, Path, float]


def _sort(store: Store, in_use: Reached, cutoff: float) -> tuple[list[_Item], list[Path]]:
    """(what can go: stage, key, folder, last use; folders of what stays)."""
    doomed: list[_Item] = []
    kept = []
    for stage, key, folder, used in store.results():
        if used >= cutoff or f"{stage}/{key}" in in_use.results:
            kept.append(folder)
        else:
            doomed.append((stage, key, folder, used))
    for folder in sorted((store.root / TEMPORARY).glob("*-*-*")):
        if not (_alive(folder) or _pid(folder) in in_use.pids):
            doomed.append((TEMPORARY, folder.name, folder, folder.stat().st_mtime))
    for folder in sorted((store.root / WORK).glob("*-*")):
        used = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        if used >= cutoff or is_at_work(folder):
            kept.append(folder)
        else:
            doomed.append((WORK, folder.name, folder, used))
    return doomed, kept


def _set_aside(store: Store, stage: str, key: str, folder: Path) -> Path:
    """Where a result is moved to in one step, so that nobody finds half of it while it is deleted."""
    if stage in (TEMPORARY, WORK):
        return folder
    aside = store.root / TEMPORARY / f"{stage}-{key}-{os.getpid()}"
    aside.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(aside)
    return aside


def _describe(store: Store, stage: str, key: str, folder: Path, used: float) -> StoreGarbage:
    path = folder if stage in (TEMPORARY, WORK) else store.root / stage / key
    return StoreGarbage(stage=stage, key=key, path=str(path), used=used, bytes=folder_bytes(folder))


def _pid(temporary: Path) -> int | None:
    """The number of the process that made a temporary folder."""
    word = temporary.name.rsplit("-", 1)[-1]
    return int(word) if word.isdecimal() else None


def _alive(temporary: Path) -> bool:
    pid = _pid(temporary)
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
