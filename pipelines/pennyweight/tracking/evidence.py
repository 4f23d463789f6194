"""The evidence that is registered beside a candidate's files: which files they are, and why they may be served."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pennyweight.records import Candidate, CandidateResult, Probe, RunRecord
from pennyweight.store import digest_of, file_digest

#: Its name, at the top of the candidate's folder.
EVIDENCE = "pennyweight.json"
EVIDENCE_VERSION = 2
#: Names of what else is registered beside the judged files: for people, for machines, and the signature of it all.
CARD, BOM, SIGNATURE = "MODEL_CARD.md", "mlbom.cdx.json", "model.sig"
DOCUMENTS = (EVIDENCE, CARD, BOM, SIGNATURE)

#: What a registered file may be: weights and graphs without code, and text. `.data` are the tensors of an ONNX file,
#: `.model` and `.tiktoken` are tokenizers.
HARMLESS = (".safetensors", ".onnx", ".data", ".gguf", ".json", ".txt", ".jinja", ".model", ".tiktoken", ".md")
#: What can run code when it is loaded: pickles and programs.
HARMFUL = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".py", ".pyc", ".so", ".dll", ".dylib")


def make_evidence(
    record: RunRecord, result: CandidateResult, files: Mapping[str, str], documents: Mapping[str, str]
) -> dict[str, Any]:
    """Why a candidate may be served, as JSON: `files` maps the names of its files to their sha256, `documents` those of
    the card and the bill of materials."""
    assert result.candidate is not None
    shown = json.loads(result.model_dump_json())  # what is not finite becomes null
    return {
        "schema_version": EVIDENCE_VERSION,
        "candidate": {**shown["candidate"], "path": None, "checkpoint": None},
        "checkpoint": {**shown["candidate"]["checkpoint"], "path": None},
        "files": dict(files),
        "documents": dict(documents),
        "verdict": shown["verdict"],
        "quality": (shown["quality"] or {}).get("metrics"),
        "cost": shown["cost"],
        "price": record.price and record.price.model_dump(mode="json"),
        "probe": record.probe and record.probe.model_dump(mode="json"),
        "base": record.base,
        "recipe": {"name": record.name, "digest": record.recipe.digest},
        "run": {"started_at": record.started_at, "environment": record.environment},
    }


def candidate_in(folder: Path, evidence: Mapping[str, Any]) -> Candidate:
    """The candidate that evidence is of, its files in `folder`."""
    checkpoint = {**evidence["checkpoint"], "path": str(folder)}
    return Candidate.model_validate({**evidence["candidate"], "path": str(folder), "checkpoint": checkpoint})


def probe_in(folder: Path) -> Probe | None:
    """What the candidate in a folder said when it was judged; None where no evidence lies there that knows it."""
    file = folder / EVIDENCE
    known = json.loads(file.read_text()).get("probe") if file.is_file() else None
    return Probe.model_validate(known) if known else None


def file_digests(folder: Path) -> dict[str, str]:
    """Relative name → sha256 of all files below `folder` but the evidence and the signature."""
    own = (folder / EVIDENCE, folder / SIGNATURE)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path not in own)
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def expected_digests(evidence: Mapping[str, Any]) -> dict[str, str]:
    """What `file_digests` must find, by evidence of any version."""
    return {**evidence["files"], **evidence.get("documents", {})}


def digest_of_files(files: Mapping[str, str]) -> str:
    """The `pennyweight.store.folder_digest` of a folder with these files, in the order of `file_digests`."""
    return digest_of([[name, digest] for name, digest in files.items()])


def describe_difference(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """Which files are changed, missing or new, at most five of them."""
    changes = [
        *(f"{name} is missing" for name in expected if name not in found),
        *(f"{name} was changed" for name in expected if name in found and found[name] != expected[name]),
        *(f"{name} is new" for name in found if name not in expected),
    ]
    more = [f"and {len(changes) - 5} more"] if len(changes) > 5 else []
    return ", ".join(changes[:5] + more)


def unknown_formats(names: Iterable[str]) -> list[str]:
    """Files that are none of safetensors, ONNX, GGUF and text."""
    return [name for name in names if (suffix := Path(name).suffix.lower()) and suffix not in HARMLESS]


def harmful_formats(names: Iterable[str]) -> list[str]:
    """Files that can run code when they are loaded."""
    return [name for name in names if Path(name).suffix.lower() in HARMFUL]
