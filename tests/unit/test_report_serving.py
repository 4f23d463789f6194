"""What `cost` measured of a run: kept beside it, in its report, whatever else lies there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_price_card import MIXES, PRICE, report
from test_report import BASE, Page, make_record

from pennyweight.errors import StoreError
from pennyweight.load import serving
from pennyweight.load.card import fit
from pennyweight.load.knee import Knee
from pennyweight.load.report import LoadReport, priced
from pennyweight.load.serving import CandidateCost
from pennyweight.records import Interval, RunRecord
from pennyweight.report.page import render

WINNER = "int8@onnxruntime"


def load(users: int, share: float, usd: float) -> LoadReport:
    """So many users, of whose requests a share meets the SLO."""
    one = priced(report(64, 32).loads[0], PRICE)
    return one.model_copy(
        update={
            "concurrency": users,
            "slo_share": Interval(value=share, low=share - 0.01, high=min(1.0, share + 0.01)),
            "usd_per_1m_tokens": Interval(value=usd, low=0.9 * usd, high=1.1 * usd),
        }
    )


def served(name: str) -> CandidateCost:
    """Cheapest at 8 users of those that may be, cheaper still at 16, where the SLO is missed."""
    loads = [load(1, 1.0, 0.40), load(8, 0.99, 0.20), load(16, 0.50, 0.10)]
    knee = Knee(concurrency=8, usd_per_1m_tokens=0.20, reports=loads)
    first = report(64, 32, loads=[], knee=knee)
    return CandidateCost(
        candidate=name, users=8, knee=knee, card=fit([report(*mix) for mix in MIXES], PRICE), reports=[first]
    )


def page(record: RunRecord, found: list[CandidateCost]) -> Page:
    parsed = Page()
    parsed.feed(render(record, None, found))
    return parsed


def test_a_run_that_was_not_priced_has_no_such_section() -> None:
    assert "As it serves" not in render(make_record())


def test_the_card_and_the_knee_are_shown() -> None:
    html = render(make_record(), None, [served(WINNER)])
    row = html.partition('class="served"')[2].partition("</tbody>")[0]
    # 1e-4 s a token in and 5e-4 out, at a thousandth of a dollar a second.
    assert "<td>8</td>" in row
    prices = [float(found) for found in re.findall(r"\$([\d.]+)<small>", row)]
    assert prices == pytest.approx([0.1, 0.5], rel=0.02)
    assert "$3.60" in row
    assert "too few requests met the SLO" in html
    plot = html.partition("Price of a token by users")[2].partition("</svg>")[0]
    assert plot.count('class="ring"') == plot.count('class="cross fail"') == 1


def test_where_nothing_meets_the_slo_the_row_says_so() -> None:
    nothing = served(WINNER)
    knee = Knee(concurrency=None, reports=[load(1, 0.2, 0.40)])
    nothing = nothing.model_copy(update={"users": None, "card": None, "knee": knee})
    assert "no load meets the SLO" in render(make_record(), None, [nothing])


def test_candidates_that_were_measured_before_stay(tmp_path: Path) -> None:
    record = make_record(run_dir=str(tmp_path), tracking=None)
    assert serving.read(record) == []
    assert serving.keep(record, [served(WINNER)]) is None
    assert serving.keep(record, [served(BASE)]) is None
    assert [item.candidate for item in serving.read(record)] == [BASE, WINNER]
    assert serving.keep(record, [served(BASE).model_copy(update={"users": 1})]) is None
    assert [item.users for item in serving.read(record)] == [1, 8]
    assert "As it serves" in (tmp_path / "report.html").read_text()


def test_a_file_that_is_not_ours_is_no_obstacle(tmp_path: Path) -> None:
    record = make_record(run_dir=str(tmp_path), tracking=None)
    (tmp_path / serving.FOLDER).mkdir()
    (tmp_path / serving.FOLDER / serving.FILE).write_text('{"candidates": [{}]}')
    assert serving.read(record) == []


def test_a_folder_that_cannot_be_written_is_an_error_that_leaves_no_half(tmp_path: Path) -> None:
    (tmp_path / serving.FOLDER).write_text("a file in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        serving.keep(make_record(run_dir=str(tmp_path), tracking=None), [served(WINNER)])
    assert [path.name for path in tmp_path.iterdir()] == [serving.FOLDER]
