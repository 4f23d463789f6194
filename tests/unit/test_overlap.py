"""Text that calibration and evaluation share."""

from __future__ import annotations

import numpy as np
import pytest

from pennyweight import overlap
from pennyweight.errors import StageError


def test_overlap_needs_the_whole_run_in_order() -> None:
    passage = np.arange(15)
    for calibration, shared in ((passage[:12], 0), (passage[:13], 1), (passage[:13][::-1], 0)):
        assert overlap.measure([calibration], [passage]).shared == shared


def test_overlap_does_not_run_across_documents() -> None:
    passage = np.arange(15)
    halves = [passage[:7], passage[7:]]
    assert overlap.measure(halves, [passage]).shared == 0
    assert overlap.measure([passage], halves).shared == 0
    nothing = overlap.Overlap(n=13, shared=0, tokens=0, covered=0, documents=0, touched=0)
    assert overlap.measure([], []) == nothing


def test_overlap_agrees_with_comparing_every_pair() -> None:
    draw = np.random.default_rng(0)
    calibration, evaluation = draw.integers(0, 3, (20, 50)), draw.integers(0, 3, (30, 40))
    grams = {tuple(row[i : i + 5]) for row in calibration.tolist() for i in range(46)}
    covered, shared, touched = 0, set(), 0
    for row in evaluation.tolist():
        hits = [i for i in range(36) if tuple(row[i : i + 5]) in grams]
        shared |= {tuple(row[i : i + 5]) for i in hits}
        covered += len({i + offset for i in hits for offset in range(5)})
        touched += bool(hits)
    found = overlap.measure(calibration, evaluation, n=5)
    assert (found.shared, found.covered, found.touched) == (len(shared), covered, touched)
    assert 0 < covered < evaluation.size


def test_shared_windows_are_refused_with_an_example() -> None:
    evaluation = np.arange(1600).reshape(10, 160)
    calibration = np.stack([evaluation[3] + 5000, evaluation[7]])
    found = overlap.measure(calibration, evaluation, decode=lambda ids: f"{ids[0]}…{ids[-1]}")
    assert found.fraction == 0.1
    with pytest.raises(StageError, match=r"int4 learns .* 10\.0% of .*s tokens, in 1 of 10 doc") as caught:
        overlap.refuse(found, "int4", "variants.int4.0.quantize.calibrate")
    assert "data set than the suite's in `variants.int4.0.quantize.calibrate`" in str(caught.value)
    assert "160 in document 8 from number 1: «1120…1139»" in str(caught.value)


def test_a_stock_phrase_is_no_leak() -> None:
    evaluation = np.arange(1600).reshape(10, 160)
    calibration = np.concatenate([np.full(50, 9999), evaluation[0, :16]])[None]
    found = overlap.measure(calibration, evaluation)
    assert (found.shared, found.fraction) == (4, 0.01)
    overlap.refuse(found, "int4", "")
