"""The report's section on how variants were made."""

from __future__ import annotations

import re

from test_report import make_record

from pennyweight.records import Allocation, Distillation, Healing, Pruning, Rounding, RunRecord
from pennyweight.report.page import render

ALLOCATION = Allocation(
    budget=10_000_000, bytes=9_900_000, layers={"a": "4 bits"}, predicted_kl=0.2, measured_kl=0.15,
    uniform_kl={"4 bits, groups of 64": 0.21}, trials=40,
)  # fmt: skip
ROUNDING = Rounding(
    backend="pennyweight", method="gptq", layers={"4 bits, symmetric, groups of 64": 210}, allocation=ALLOCATION,
    reload_difference=2.5e-5, seconds=40.0,
)  # fmt: skip
DEPTH = Pruning(
    removed=[3, 4, 5, 8], layers=(12, 8), measure="kl", refitted=1, kl_cut=0.3, kl_influence=0.5, kl=0.2,
    curve=[(1, 0.1), (4, 0.3)], parameters=(1_000_000, 800_000), weight_bytes=(2_000_000, 1_600_000),
    reload_difference=1e-5, seconds=100.0,
)  # fmt: skip
WIDTH = DEPTH.model_copy(
    update={
        "removed": [], "layers": (8, 8), "measure": None, "channels": (1536, 1152), "refitted": 8, "kl_cut": None,
        "kl_influence": None, "kl": 0.12, "curve": [], "parameters": (800_000, 700_000),
        "weight_bytes": (1_600_000, 1_400_000), "seconds": 21.0, "earlier": DEPTH,
    }
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


def pruned(pruning: Pruning) -> RunRecord:
    record = make_record()
    made = next(result for result in record.candidates if result.variant != "base")
    checkpoint = made.checkpoint.model_copy(update={"pruning": pruning})
    changed = [
        result.model_copy(update={"checkpoint": checkpoint}) if result.variant == made.variant else result
        for result in record.candidates
    ]
    return record.model_copy(update={"candidates": changed})


def test_all_that_was_taken_out_is_shown() -> None:
    page = render(pruned(WIDTH))
    section = page.partition("How the variants were made")[2].partition("</section>")[0]
    lines = [
        "layers 3–5, 8 of 12 by kl",
        "parameters: 1.0 M → 0.8 M",
        "held-out KL 0.200, 1 block refitted",
        "without those layers alone 0.300; by influence 0.500",
        "FFN channels: 1,536 → 1,152",
        "parameters: 0.8 M → 0.7 M",
        "held-out KL 0.120, 8 blocks refitted",
    ]
    places = [section.index(f"<div>{line}</div>") for line in lines]
    assert places == sorted(places)
    assert "2 min 1 s" in section  # of both steps


def test_the_plot_has_what_the_fit_left() -> None:
    section = render(pruned(WIDTH)).partition("What the layers cost")[2].partition("</section>")[0]
    assert section.count('class="mark base"') == 3  # two points, and what was written
    assert ", prune 1 of 2" in section and ", prune 2 of 2" not in section
    alone = render(pruned(DEPTH.model_copy(update={"kl": None}))).partition("What the layers cost")[2]
    assert alone.partition("</section>")[0].count('class="mark base"') == 2
    assert "What the layers cost" not in render(pruned(WIDTH.model_copy(update={"earlier": None})))


def test_a_run_without_records_of_its_steps_has_no_such_section() -> None:
    assert "How the variants were made" not in render(make_record())


DISTILLATION = Distillation(
    steps=40, tokens=40_960, ended_by="patience", kept_step=20, kl_before=0.4, kl_after=0.3,
    curve=[(0, 0.4), (20, 0.3), (40, 0.35)], losses=[(20, 0.38), (40, 0.33)], cache_bytes_per_token=194,
    tokens_per_second=60.0, training_seconds=600.0, seconds=700.0,
)  # fmt: skip


def distilled(made: Distillation) -> RunRecord:
    record = make_record()
    variant = next(result.variant for result in record.candidates if result.variant != "base")
    changed = [
        result.model_copy(update={"checkpoint": result.checkpoint.model_copy(update={"distillation": made})})
        if result.variant == variant
        else result
        for result in record.candidates
    ]
    return record.model_copy(update={"candidates": changed})


def test_how_a_student_learnt_is_drawn() -> None:
    page = render(distilled(DISTILLATION))
    words = (
        "distilled: 0.400 → 0.300, best at step 20",
        "40 steps, 40,960 tokens, ended by patience",
        "194 bytes a token",
    )
    assert all(line in page for line in words)
    section = page.partition("How the students learnt")[2].partition("</section>")[0]
    (curve,) = re.findall(r'<path d="(M[^"]+)" class="line base"', section)
    (losses,) = re.findall(r'<path d="(M[^"]+)" class="line dash2"', section)
    points = [tuple(map(float, point.split())) for point in curve[1:].split("L")]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert points[1][1] > points[2][1] > points[0][1]  # the smaller the divergence, the lower on the page
    assert losses.count("L") == 1


def test_a_student_that_did_not_learn_is_called_so() -> None:
    page = render(distilled(DISTILLATION.model_copy(update={"kept_step": 0, "kl_after": 0.4, "curve": [(0, 0.4)]})))
    assert "distilled: 0.400 → 0.400, never below where it began" in page
    assert "How the students learnt" not in page


def test_layers_that_did_not_learn_are_counted() -> None:
    words = ", the first 15 layers as they were"
    assert f"best at step 20{words}" in render(distilled(DISTILLATION.model_copy(update={"shared_blocks": 15})))
    assert words not in render(distilled(DISTILLATION))


def test_all_that_was_learnt_is_shown() -> None:
    later = {"kl_before": 0.3, "kl_after": 0.25, "curve": [(0, 0.3), (20, 0.25)], "seconds": 21.0}
    page = render(distilled(DISTILLATION.model_copy(update={**later, "kept_step": 20, "earlier": DISTILLATION})))
    made = page.partition("How the variants were made")[2].partition("</section>")[0]
    assert 0 < made.index("distilled: 0.400 → 0.300") < made.index("distilled: 0.300 → 0.250")
    assert "12 min 1 s" in made  # of both steps
    plot = page.partition("How the students learnt")[2].partition("</section>")[0]
    assert ", distill 1 of 2" in plot and ", distill 2 of 2" in plot
    assert plot.count('class="line base"') == plot.count('class="mark base"') == 2


def test_a_divergence_of_nothing_has_no_place_on_a_logarithmic_axis() -> None:
    best = {"kept_step": 0, "kl_before": 0.0, "kl_after": 0.0, "curve": [(0, 0.0), (20, 0.3), (40, 0.01)]}
    section = render(distilled(DISTILLATION.model_copy(update=best))).partition("How the students learnt")[2]
    plot = section.partition("</section>")[0]
    assert 'class="line base"' in plot
    assert 'class="mark base"' not in plot
