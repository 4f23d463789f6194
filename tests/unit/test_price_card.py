"""Price cards from reports of machines whose costs are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pennyweight.cli import main
from pennyweight.errors import UsageError
from pennyweight.load.bench import BenchReport
from pennyweight.load.card import break_even, fit
from pennyweight.load.driver import Course
from pennyweight.load.knee import Knee
from pennyweight.load.report import summarize
from pennyweight.load.requests import Served
from pennyweight.records import Price

# Seconds of the machine for a token in and for one out.
INPUT, OUTPUT = 1e-4, 5e-4
MIXES = [(1024, 64), (256, 256), (64, 512), (512, 128)]
PRICE = Price(name="m", purchase="custom", usd_per_hour=3.6, source="test", date="")


def report(into: int, out: int, noise: float = 0.0, seed: int = 0, **settings: object) -> BenchReport:
    """Of a machine that serves one request after the other, in the time that its tokens take."""
    generator = np.random.default_rng([seed, into])
    course, now = Course(begun=0.0), 0.0
    for _ in range(400):
        due, took = now, (INPUT * into + OUTPUT * out) * np.exp(generator.normal(0, noise))
        now += took
        course.served.append(Served(due, due, now, into, out, list(np.linspace(due + took / 9, now, 8))))
    course.stopped_sending = now
    load = summarize(course, "1 user", concurrency=1)
    facts = {
        "target": "http://x", "model": "m", "workload": f"{into}:{out}", "prompts": "tokens", "slo": None,
        "price": PRICE, "loads": [load], "knee": None, "started_at": "2026-01-01T00:00:00", "seconds": now,
        "client": {"cpu": "c"}, "client_cpu_share": 0.0, "interrupted": False,
    }  # fmt: skip
    return BenchReport(**facts | settings)


def test_known_costs_are_found_and_add_up_to_the_bill() -> None:
    card = fit([report(*mix) for mix in MIXES])
    # A second costs a thousandth of a dollar.
    assert card.usd_per_1m_input.value == pytest.approx(1e6 * INPUT * 1e-3, rel=0.02)
    assert card.usd_per_1m_output.value == pytest.approx(1e6 * OUTPUT * 1e-3, rel=0.01)
    assert card.usd_per_idle_hour == 3.6
    for mix in card.mixes:
        hour = 3600 / mix.seconds
        bill = (card.usd_per_1m_input.value * mix.input_tokens + card.usd_per_1m_output.value * mix.output_tokens) / 1e6
        assert hour * bill == pytest.approx(3.6, rel=0.02)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_mix_held_out_is_predicted_and_the_interval_holds_the_truth(seed: int) -> None:
    card = fit([report(*mix, noise=0.1, seed=seed) for mix in MIXES])
    assert all(abs(mix.held_out_error) < 0.1 for mix in card.mixes)
    assert card.usd_per_1m_output.low < 1e6 * OUTPUT * 1e-3 * np.exp(0.1**2 / 2) < card.usd_per_1m_output.high * 1.01


def test_where_hosting_pays_and_where_it_does_not() -> None:
    card = fit([report(*mix) for mix in MIXES])
    # The machine costs $86.40 a day; such a request takes 0.5 s of it, so it can do 172,800.
    pays = break_even(card, 0, 1000, api_input=1.0, api_output=1.0)
    assert pays.capacity == pytest.approx(172_800, rel=0.01)
    assert pays.requests_per_day == pytest.approx(86_400, rel=1e-6)
    assert pays.tokens_per_day == pytest.approx(86_400_000, rel=1e-6)
    assert pays.utilization == pytest.approx(0.5, rel=0.01)
    never = break_even(card, 0, 1000, api_input=0.1, api_output=0.1)
    assert (never.requests_per_day, never.utilization) == (None, None)
    free = break_even(card, 10, 10, 0.0, 0.0)
    assert free.requests_per_day is None


def test_reports_that_make_no_card() -> None:
    reports = [report(*mix) for mix in MIXES]
    for wrong, says in [
        (reports[:2], "2 mixes make no card"),
        ([report(100, 100), report(200, 200), report(400, 401)], "too much alike"),
        ([*reports, report(7, 70, model="other")], "different models"),
        ([r.model_copy(update={"price": None}) for r in reports], "no price"),
        ([r.model_copy(update={"knee": Knee(concurrency=None, reports=[])}) for r in reports], "no load meets the SLO"),
    ]:
        with pytest.raises(UsageError, match=says):
            fit(wrong)


def test_the_command(tmp_path: Path) -> None:
    paths = []
    for into, out in MIXES:
        paths.append(tmp_path / f"{into}.json")
        paths[-1].write_text(report(into, out).model_dump_json())
    command = ["cost", *map(str, paths), "--mix", "256:128"]
    done = CliRunner().invoke(main, [*command, "--api", "0.15:0.60"])
    assert done.exit_code == 0, done.output
    assert "a million output tokens  $0." in done.stdout
    assert "pays from" in done.stdout
    done = CliRunner().invoke(main, [*command, "--api", "0.001:0.001"])
    assert "do not self-host" in done.stdout
    done = CliRunner().invoke(main, [*command, "--price", "7.2", "--json"])
    assert json.loads(done.stdout)["card"]["usd_per_1m_output"]["value"] == pytest.approx(1.0, rel=0.01)
    for wrong, says in [(["--api", "cheap"], "is no price"), (["--api", "-1:2"], "is no price")]:
        done = CliRunner().invoke(main, [*command, *wrong])
        assert (done.exit_code, says in done.stderr) == (2, True)
    paths[0].write_text("{}")
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, "is no report of a benchmark" in done.stderr) == (2, True)
