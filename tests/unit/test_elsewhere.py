"""Projection to machines that were not measured, with a data sheet's ceilings."""

from __future__ import annotations

import pytest
from test_roofline import CEILINGS, TOY, point

from pennyweight.benchmark import elsewhere
from pennyweight.benchmark.roofline import wave
from pennyweight.errors import UsageError
from pennyweight.recipe import Prices, load_prices
from pennyweight.records import CandidateResult, CostReport, RecipeRef, RunRecord, Verdict

NAME = "aws/g6.xlarge"


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> RunRecord:
    monkeypatch.setattr(elsewhere, "work_of", lambda candidate: TOY)
    measured = point(2, n=10, m=5, prefill_seconds=2e-5, step_seconds=4e-6)
    result = CandidateResult.model_construct(
        id="a@x", variant="a", runtime="x", checkpoint=None, candidate=object(), quality=None,
        cost=CostReport(candidate="a@x", usd_per_hour=1.0, points=[measured]),
        verdict=Verdict(status="base", reasons=[]),
    )  # fmt: skip
    return RunRecord.model_construct(
        name="r", run_dir="", recipe=RecipeRef(path="", digest="", resolved={}), candidates=[result], ceilings=CEILINGS
    )


def sheet(times: float) -> Prices:
    """The shipped sheet, whose machine is so many times as fast as the one measured."""
    real = load_prices()
    there = real.ceilings[NAME].model_copy(
        update={
            "read_gb_per_s": times * 1.0,
            "tflops_fp32": times * 0.01,
            "tflops_bf16": times * 0.02,
            "tops_int8": None,
        }
    )
    return Prices(real.machines, real.apis, {NAME: there})


@pytest.mark.parametrize("times", [1.0, 10.0])
def test_the_share_realized_here_is_taken_to_be_realized_there(record: RunRecord, times: float) -> None:
    (found,) = elsewhere.project(record, [NAME], sheet(times))
    seconds = (2e-5 + 4 * 4e-6) / times
    usd_per_second, tokens = load_prices().machines[NAME].usd_per_hour / 3600, 2 * 15
    assert found.usd_per_1m_tokens == pytest.approx(1e6 * usd_per_second * seconds / tokens)
    assert found.output_tokens_per_second == pytest.approx(2 * 5 / seconds)
    least = sum(phase.seconds for phase in wave(TOY, CEILINGS, 2, 10, 5)) / times
    assert found.usd_per_1m_tokens_at_best == pytest.approx(1e6 * usd_per_second * least / tokens)
    assert (found.kind, found.usd_per_1m_tokens_here) == ("projected", 1)


def test_a_machine_without_a_data_sheet_and_a_run_without_ceilings_are_refused(record: RunRecord) -> None:
    with pytest.raises(UsageError, match="no ceilings of"):
        elsewhere.project(record, ["aws/c7i.large"], load_prices())
    with pytest.raises(UsageError, match="measured no ceilings"):
        elsewhere.project(record.model_copy(update={"ceilings": None}), [NAME], load_prices())


def test_spot_has_the_ceilings_of_its_machine() -> None:
    assert load_prices().ceilings[f"{NAME}:spot"] == load_prices().ceilings[NAME]
