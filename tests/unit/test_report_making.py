"""The report's section on how variants were made."""

from __future__ import annotations

from test_report import make_record

from pennyweight.records import Allocation, Healing, Rounding
from pennyweight.report.page import render

ALLOCATION = Allocation(
    budget=10_000_000, bytes=9_900_000, layers={"a": "4 bits"}, predicted_kl=0.2, measured_kl=0.15,
    uniform_kl={"4 bits, groups of 64": 0.21}, trials=40,
)  # fmt: skip
ROUNDING = Rounding(
    backend="pennyweight", method="gptq", layers={"4 bits, symmetric, groups of 64": 210}, allocation=ALLOCATION,
    reload_difference=2.5e-5, seconds=40.0,
)  # fmt: skip
HEALING = Healing(
    steps=12, tokens=12_288, ended_by="steps", trained=1_700_000, moved=3, kl_before=0.2, kl_after=0.1,
    curve=[(0, 0.2), (12, 0.1)], tokens_per_second=60.0, seconds=200.0,
)  # fmt: skip


def test_steps_integers_and_healing_are_shown_for_each_variant() -> None:
    record = make_record()
    made = next(result for result in record.candidates if result.variant != "base")
    checkpoint = made.checkpoint.model_copy(
        update={"origin": "base → quantize x → recover y", "rounding": ROUNDING, "healing": HEALING}
    )
    changed = [
        result.model_copy(update={"checkpoint": checkpoint}) if result.variant == made.variant else result
        for result in record.candidates
    ]
    page = render(record.model_copy(update={"candidates": changed}))
    section = page.partition("How the variants were made")[2].partition("</section>")[0]
    for words in (
        "quantize x",
        "recover y",
        "210 layers: 4 bits, symmetric, groups of 64",
        "2.5e-05 nats",
        "0.200 → 0.100",
        "12 steps, 12,288 tokens, ended by steps, 3 integers moved",
        "best uniform choice 0.210; 40 trials",
        "4 min 0 s",
    ):
        assert words in section
    assert section.count("<tr>") == 2


def test_a_run_without_records_of_its_steps_has_no_such_section() -> None:
    assert "How the variants were made" not in render(make_record())
