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


def test_restarts_and_idle_time_are_paid_for_and_egress_eats_into_what_is_saved() -> None:
    # $3.60 an hour, a fifth of it lost, half of the rest idle: $9 a busy hour, $0.0025 a second.
    price = Price(
        name="m", purchase="spot", usd_per_hour=3.6, source="test", date="", overhead=0.2, utilization=0.5,
        usd_per_busy_hour=9.0, egress_usd_per_gb=25, bytes_per_token=4, egress_usd_per_1m_output=0.1,
    )  # fmt: skip
    card = fit([report(*mix) for mix in MIXES], price)
    assert card.usd_per_1m_input.value == pytest.approx(1e6 * INPUT * 2.5e-3, rel=0.02)
    assert card.usd_per_1m_output.value == pytest.approx(1e6 * OUTPUT * 2.5e-3 + 0.1, rel=0.01)
    assert (card.usd_per_hour, card.usd_per_idle_hour) == (3.6, 3.6)
    # A request of 1,000 tokens takes half a second of the 69,120 that the machine is up in a day, so it can do 138,240.
    # It saves $0.0011 less $0.0001; $86.40 a day need 86,400 of them, 62.5% of what it can.
    assert card.seconds(0, 1000) == pytest.approx(0.5, rel=0.01)
    pays = break_even(card, 0, 1000, api_input=1.1, api_output=1.1)
    assert pays.capacity == pytest.approx(138_240, rel=0.01)
    assert pays.requests_per_day == pytest.approx(86_400, rel=1e-6)
    assert pays.utilization == pytest.approx(0.625, rel=0.01)
    assert not pays.pays
    busier = price.model_copy(update={"utilization": 0.7, "usd_per_busy_hour": 3.6 / 0.8 / 0.7})
    pays = break_even(fit([report(*mix) for mix in MIXES], busier), 0, 1000, api_input=1.1, api_output=1.1)
    # How busy the machine must be does not depend on how busy it is said to be.
    assert (pays.utilization, pays.pays) == (pytest.approx(0.625, rel=0.01), True)
    # What an API takes must be more than the egress alone.
    assert break_even(card, 0, 1000, 0.1, 0.1).requests_per_day is None


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
    # At $1 for a million tokens a request of 384 earns $0.000384; it takes 0.0896 s, so 964,286 fit into a day, and
    # 225,000 pay for $86.40: busy 23.3% of the time.
    for utilization, warned in [(0.23, True), (0.24, False)]:
        price = f"{{name: m, usd_per_hour: 3.6, utilization: {utilization}}}"
        done = CliRunner().invoke(main, [*command, "--price", price, "--api", "1:1"])
        assert done.exit_code == 0, done.output
        assert "pays from 225,000 a day on" in done.stdout
        assert f"busy {utilization:.1%} of the time" in done.stdout
        assert ("warning: at the declared utilization" in done.stdout) == warned
    done = CliRunner().invoke(main, [*command, "--api", "openai/gpt-4o-mini"])
    assert "$0.15 for a million tokens in and $0.6 out (OpenAI, " in done.stdout
    done = CliRunner().invoke(main, [*command[:-2], "--price", "7.2", "--json"])
    assert json.loads(done.stdout)["card"]["usd_per_1m_output"]["value"] == pytest.approx(1.0, rel=0.01)
    for wrong, says in (
        (["--mix", "8:8"], "add --api"),
        (["--users", "4"], "are for one run"),
        (["--elsewhere", "aws/g6.xlarge"], "are for one run"),
    ):
        done = CliRunner().invoke(main, [*command[:-2], *wrong])
        assert (done.exit_code, says in done.output) == (2, True), done.output
    prices = tmp_path / "prices.yaml"
    prices.write_text("source: ours\nprices: {a/b: {on_demand: 7.2}}\napis: {a/c: {input: 1, output: 3}}\n")
    ours = ["--prices", str(prices), "--price", "a/b", "--api", "a/c", "--json"]
    found = json.loads(CliRunner().invoke(main, [*command, *ours]).stdout)
    assert (found["card"]["usd_per_hour"], found["card"]["price"]["source"]) == (7.2, "ours")
    assert (found["api"]["output"], found["break_even"]["api_usd_per_request"]) == (3, pytest.approx(640e-6))
    for wrong, says in [(["--api", "cheap"], "is no price"), (["--api", "-1:2"], "is no price")]:
        done = CliRunner().invoke(main, [*command, *wrong])
        assert (done.exit_code, says in done.stderr) == (2, True)
    paths[0].write_text("{}")
    done = CliRunner().invoke(main, command[:-2])
    assert (done.exit_code, "is no report of a benchmark" in done.stderr) == (2, True)
