"""Is a registered version what the gate judged: its files, evidence, signature, and what it says when it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight import probe
from pennyweight.errors import SourceError, TrackingError
from pennyweight.probe import Trial, UnavailableError
from pennyweight.progress import output_to
from pennyweight.records import Probe
from pennyweight.store import Store, file_digest
from pennyweight.tracking import signing
from pennyweight.tracking.evidence import (
    EVIDENCE,
    candidate_in,
    describe_difference,
    digest_of_files,
    expected_digests,
    file_digests,
    harmful_formats,
    unknown_formats,
)
from pennyweight.tracking.ledger import Checks

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

RUN_AGAIN = "run the recipe again: what is still in the store is reused, and the winner is registered anew"
#: What a candidate that is tried prints.
LOG = "promote.log"


def require_evidence(version: ModelVersion) -> None:
    """Raise TrackingError for a version that says nothing of a gate. To be asked before its files are fetched."""
    if not {"pennyweight.digest", "pennyweight.evidence_digest"} <= version.tags.keys():
        raise TrackingError(
            f"{version.name} version {version.version} carries no evidence that it passed a gate",
            "promote versions that `pennyweight run` registered",
        )


def verify(version: ModelVersion, folder: Path) -> dict[str, Any]:
    """The evidence of a version whose files, in `folder`, are those that were judged. Raises TrackingError otherwise.

    The verdict in it is not looked at.
    """
    name = f"{version.name} version {version.version}"
    recorded, evidence_digest = (version.tags[f"pennyweight.{key}"] for key in ("digest", "evidence_digest"))
    path = folder / EVIDENCE
    if not path.is_file():
        raise TrackingError(f"{name} has lost its evidence, {EVIDENCE}", RUN_AGAIN)
    if file_digest(path) != evidence_digest:
        raise TrackingError(f"{name}: the evidence, {EVIDENCE}, was changed after it was registered", RUN_AGAIN)
    evidence = json.loads(path.read_text())
    found, expected = file_digests(folder), expected_digests(evidence)
    judged = {file: digest for file, digest in found.items() if file not in evidence.get("documents", {})}
    if found != expected or not digest_of_files(judged) == recorded == evidence["candidate"]["digest"]:
        difference = describe_difference(expected, found)
        raise TrackingError(f"{name}: its files are not those that passed the gate: {difference}", RUN_AGAIN)
    refuse_formats(TrackingError, name, unknown_formats(found))
    return evidence


def check_evidence(folder: Path, uri: str) -> None:
    """Raise SourceError unless files that were fetched are those that were registered, where evidence says which."""
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    refuse_formats(SourceError, uri, harmful_formats(files))
    if not (folder / EVIDENCE).is_file():
        return
    try:
        registered = expected_digests(json.loads((folder / EVIDENCE).read_text()))
    except (ValueError, LookupError, TypeError) as error:
        raise SourceError(f"{uri}: its evidence, {EVIDENCE}, cannot be read", RUN_AGAIN) from error
    found = file_digests(folder)
    if found != registered:
        difference = describe_difference(registered, found)
        raise SourceError(f"{uri}: its files are not those that were registered: {difference}", RUN_AGAIN)


def refuse_formats(kind: type[TrackingError] | type[SourceError], name: str, bad: list[str]) -> None:
    """Raise `kind` where there are `bad` files."""
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise kind(
            f"{name} holds {', '.join(bad[:3])}{more}: only safetensors, ONNX, GGUF and text are taken, as other "
            "formats can run code when they are loaded"
        )


def examine(
    version: ModelVersion,
    folder: Path,
    evidence: Mapping[str, Any],
    force: bool,
    verify_key: Path | None,
    say: Callable[[str], None],
) -> Checks:
    """All else that is checked of a version before it becomes champion; with `force`, what may be overridden is noted.

    A wrong signature, and a candidate that does not say what was judged, or does not answer, are never overridden.
    Raises TrackingError, UnavailableError and StageError.
    """
    name = f"{version.name} version {version.version}"
    signed_by = signing.check(folder, verify_key, name) if verify_key else None
    overridden: list[str] = []
    status = evidence["verdict"]["status"]
    if status != "pass":
        message = f"{name} did not pass the gate: its verdict is {status}"
        if not force:
            raise TrackingError(message, "only what passed is promoted; --force with a --reason goes on all the same")
        overridden.append(message)
    trial = _try_out(name, folder, evidence, force, overridden, say)
    return Checks(
        verdict=status,
        files_digest=version.tags["pennyweight.digest"],
        evidence_digest=version.tags["pennyweight.evidence_digest"],
        signed_by=signed_by,
        trial=trial,
        overridden=overridden,
    )


def _try_out(
    name: str, folder: Path, evidence: Mapping[str, Any], force: bool, overridden: list[str], say: Callable[[str], None]
) -> Trial | None:
    candidate = candidate_in(folder, evidence)
    if not evidence.get("probe"):
        message = f"{name} was registered without a probe: what it said when it was judged is not known"
        if not force:
            raise TrackingError(message, f"{RUN_AGAIN}; --force with a --reason goes on without")
        overridden.append(message)
        return None
    known = Probe.model_validate(evidence["probe"])
    try:
        probe.check_available(candidate, known.engine["device"])
    except UnavailableError as error:
        if not force:
            raise
        overridden.append(error.message)
        return None
    store = Store()
    store.check_writable()
    say(f"loading {name} ({candidate.id}); what libraries print is in {store.root / LOG}")
    with output_to(store.root / LOG):
        return probe.try_out(candidate, known)
