"""Prices: their arithmetic against numbers worked out by hand, what may be written, and the sheet."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from pennyweight import shipped
from pennyweight.benchmark import Measurements, Wave, _reports, cost, prices
from pennyweight.cli import main
from pennyweight.errors import PriceSheetError, RecipeError, UsageError
from pennyweight.load.command import parse_api_price, parse_price
from pennyweight.recipe import Owned, PriceSpec, Recipe, load_prices, load_recipe
from pennyweight.recipe.prices import is_stale
from pennyweight.records import Candidate, Checkpoint, Price

OURS = {"purchase_usd": 9000, "years": 4, "watts": 350, "usd_per_kwh": 0.2, "pue": 1.3}
SHEET = """\
date: 2026-11-01
source: contract 12
prices:
  aws/c7i.large: {on_demand: 0.07}
  rack/box:
    owned: {purchase_usd: 9000, years: 4, watts: 350, usd_per_kwh: 0.2}
    utilization: 0.5
    source: invoice 7
  lab/gpu: {on_demand: 2.0, spot: 1.0, interruptions_per_hour: 0.5, restart_minutes: 6, egress_usd_per_gb: 0.09}
apis:
  ours/small: {input: 0.05, output: 0.2, date: 2026-10-31}
  openai/gpt-4o-mini: {input: 1, output: 2}
"""


def price(value: Any) -> Price:
    return prices.price_of(PriceSpec.model_validate(value))


def recipe_with(tmp_path: Path, value: Any) -> Recipe:
    path = tmp_path / "recipe.yaml"
    settings = {"workload": "chat", "concurrency": [1], "decide_at": 1, "price": value}
    body = yaml.safe_load(shipped.recipe_path("smollm2-135m-cpu").read_text())
    path.write_text(yaml.safe_dump(body | {"benchmark": settings}, sort_keys=False))
    return load_recipe(path)


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    path = tmp_path / "finance.yaml"
    path.write_text(SHEET)
    return path


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_an_hour_of_a_machine_of_ones_own() -> None:
    # $9,000 over 35,040 hours are $0.256849; 350 W at a PUE of 1.3 are 0.455 kWh, $0.091; $73 a month are $0.10.
    machine = Owned(**OURS, other_usd_per_month=73)
    assert prices.owned_usd_per_hour(machine) == pytest.approx(0.2568493150684932 + 0.091 + 0.1)
    assert prices.owned_usd_per_hour(Owned(**OURS | {"pue": 1.0})) == pytest.approx(0.2568493150684932 + 0.07)


def test_restarts_idle_time_and_egress() -> None:
    # An interruption every two hours that costs six minutes takes 3 minutes of each hour.
    assert prices.restart_overhead(0.5, 6) == pytest.approx(0.05)
    # $0.95 an hour, of which 95% are up, is $1 an hour that is up; busy half of them, $2 a busy hour.
    assert prices.usd_per_busy_hour(0.95, 0.05, 1.0) == pytest.approx(1.0)
    assert prices.usd_per_busy_hour(0.95, 0.05, 0.5) == pytest.approx(2.0)
    # A million tokens of 4 bytes are 4 MB, 0.004 GB.
    assert prices.egress_usd_per_million(0.09, 4) == pytest.approx(0.00036)


def test_a_record_of_a_price_can_be_computed_again() -> None:
    found = price(
        {"name": "x", "owned": OURS, "overhead": 0.1, "utilization": 0.6, "egress_usd_per_gb": 0.09}
    )  # fmt: skip
    parts = found.owned
    assert parts is not None
    hour = parts["purchase_usd"] / parts["years"] / 8760 + parts["watts"] / 1000 * parts["pue"] * parts["usd_per_kwh"]
    assert (found.purchase, found.usd_per_hour) == ("owned", pytest.approx(hour))
    assert found.usd_per_busy_hour == pytest.approx(hour / 0.9 / 0.6)
    assert found.egress_usd_per_1m_output == pytest.approx(0.09 * found.bytes_per_token * 1e6 / 1e9)
    assert Price.model_validate(found.model_dump(mode="json")) == found
    assert found.parts() == [
        "10.00% of the time lost to restarts",
        "busy 60.0% of the time",
        f"so ${hour / 0.54:.6g} a busy hour",
        "egress $0.09 a GB at 4 bytes a token",
    ]


def test_a_record_without_parts_is_of_a_machine_that_is_always_busy() -> None:
    old = {"name": "m", "purchase": "on demand", "usd_per_hour": 0.5, "source": "s", "date": "d"}
    assert Price.model_validate(old).usd_per_busy_hour == 0.5
    assert Price.model_validate(old).parts() == []
    with pytest.raises(ValueError, match="usd_per_busy_hour"):
        Price.model_validate(old | {"utilization": 0.5})


def test_spot_without_interruptions_says_so() -> None:
    assert price("aws/c7i.large:spot").parts() == ["no interruption counted"]
    assert "lost to restarts" in price({"name": "aws/c7i.large:spot", "overhead": 0.1}).parts()[0]


def test_a_benchmark_is_priced_by_the_busy_hour_and_egress_shrinks_the_saving(tmp_path: Path) -> None:
    terms = {"name": "m", "usd_per_hour": 1.8, "utilization": 0.5, "egress_usd_per_gb": 250, "bytes_per_token": 4}
    settings = recipe_with(tmp_path, terms).benchmark
    weights = Checkpoint(
        path="", digest="", bytes=1, weight_bytes=1, format="safetensors", dtype="float32", parameters=1, origin=""
    )
    made = [
        Candidate(
            id=f"{variant}@e", variant=variant, runtime="e", checkpoint=weights, path="", digest="", bytes=1,
            weight_bytes=1, dtype="float32",
        )
        for variant in ("base", "small")
    ]  # fmt: skip
    waves = {
        ("base@e", 1): [Wave(n, 0.5, [1.5]) for n in range(3)],
        ("small@e", 1): [Wave(n, 0.25, [0.75]) for n in range(3)],
    }
    found = _reports(made, settings, prices.price_of(settings.price), Measurements(waves))
    # A busy second costs a thousandth of a dollar, the egress of 128 tokens $0.000128.
    point = found["small@e"].points[0]
    assert found["small@e"].usd_per_hour == pytest.approx(3.6)
    assert point.usd_per_1m_tokens == pytest.approx((0.001 + 0.000128) / 384 * 1e6)
    assert point.usd_per_1m_output_tokens == pytest.approx((0.001 + 0.000128) / 128 * 1e6)
    assert point.saving is not None
    assert point.saving.value == pytest.approx(1 - 0.001128 / 0.002128)
    assert cost.usd(prices.price_of(settings.price), 128, 1.0) == pytest.approx(0.001128)


# --- what a recipe may say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "hour", "busy", "purchase"),
    [
        ("aws/c7i.large", 0.08925, 0.08925, "on demand"),
        ("aws/c7i.large:spot", 0.026, 0.026, "spot"),
        ({"name": "aws/c7i.large", "utilization": 0.6}, 0.08925, 0.14875, "on demand"),
        ({"name": "aws/c7i.large:spot", "overhead": 0.2}, 0.026, 0.0325, "spot"),
        (
            {"name": "aws/c7i.large:spot", "interruptions_per_hour": 2, "restart_minutes": 6, "utilization": 0.5},
            0.026, 0.065, "spot",
        ),
        ({"name": "ours", "owned": OURS}, 0.3478493150684932, 0.3478493150684932, "owned"),
        ({"name": "x", "usd_per_hour": 1.2}, 1.2, 1.2, "custom"),
        # A price of one's own under a name of the sheet is one's own.
        ({"name": "aws/c7i.large", "usd_per_hour": 0.06}, 0.06, 0.06, "custom"),
    ],
)  # fmt: skip
def test_forms_of_a_price_and_a_resolved_recipe_that_needs_no_sheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, hour: float, busy: float, purchase: str
) -> None:
    recipe = recipe_with(tmp_path, value)
    found = prices.price_of(recipe.benchmark.price)
    assert found.usd_per_hour == pytest.approx(hour)
    assert found.usd_per_busy_hour == pytest.approx(busy)
    assert (found.purchase, bool(found.source)) == (purchase, True)

    def no_sheet(*_: object) -> None:
        raise AssertionError("the record is to be complete")

    monkeypatch.setattr("pennyweight.recipe.prices.load_prices", no_sheet)
    assert Recipe.model_validate(recipe.dump()) == recipe


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        ({"utilization": 0}, "price.utilization", "greater than 0"),
        ({"utilization": 1.01}, "price.utilization", "less than or equal to 1"),
        ({"utilization": float("nan")}, "price.utilization", "finite number"),
        ({"utilization": "60%"}, "price.utilization", "valid number"),
        ({"overhead": 1}, "price.overhead", "less than 1"),
        ({"overhead": -0.1}, "price.overhead", "greater than or equal to 0"),
        ({"interruptions_per_hour": 10, "restart_minutes": 6}, "price", "leave no time to work"),
        ({"interruptions_per_hour": 1}, "price", "need each other"),
        ({"overhead": 0.1, "interruptions_per_hour": 1, "restart_minutes": 1}, "price", "not both"),
        ({"interruptions_per_hour": -1, "restart_minutes": 1}, "price.interruptions_per_hour", "or equal to 0"),
        ({"egress_usd_per_gb": float("inf")}, "price.egress_usd_per_gb", "finite number"),
        ({"egress_usd_per_gb": -1}, "price.egress_usd_per_gb", "or equal to 0"),
        ({"bytes_per_token": 0}, "price.bytes_per_token", "greater than 0"),
        ({"usd_per_hour": 0}, "price.usd_per_hour", "greater than 0"),
        ({"usd_per_hour": float("inf")}, "price.usd_per_hour", "finite number"),
        ({"usd_per_hour": float("nan")}, "price.usd_per_hour", "finite number"),
        ({"usd_per_hour": True}, "price.usd_per_hour", "valid number"),
        ({"utilisation": 0.5}, "price.utilisation", "did you mean 'utilization'?"),
        ({"owned": OURS}, "price", "exactly one of"),
        ({"owned": OURS | {"years": 0}}, "price.owned.years", "greater than 0"),
        ({"owned": OURS | {"purchase_usd": 0}}, "price.owned.purchase_usd", "greater than 0"),
        ({"owned": OURS | {"pue": 0.9}}, "price.owned.pue", "greater than or equal to 1"),
        ({"owned": OURS | {"watts": -1}}, "price.owned.watts", "or equal to 0"),
        ({"owned": OURS | {"usd_per_kwh": float("nan")}}, "price.owned.usd_per_kwh", "finite number"),
        ({"owned": {"purchase_usd": 1, "years": 1}}, "price.owned.watts", "is missing"),
        ({"owned": OURS | {"watt": 1}}, "price.owned.watt", "did you mean 'watts'?"),
        ({"date": "last week"}, "price.date", "is no date"),
        ({"name": 5}, "price.name", "valid string"),
        ({"usd_per_hour": None}, "price", "unknown price 'mine'"),
        ({"usd_per_hour": None, "name": "aws/c7i.lage"}, "price", "did you mean 'aws/c7i.large'?"),
    ],
)
def test_impossible_prices_are_named_with_their_key(
    tmp_path: Path, changes: dict[str, Any], path: str, words: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_with(tmp_path, {"name": "mine", "usd_per_hour": 1.0} | changes)
    assert any(p.path == f"benchmark.{path}" and words in str(p) for p in caught.value.problems), str(caught.value)


def test_a_date_may_stand_as_yaml_reads_it(tmp_path: Path) -> None:
    given = {"name": "x", "usd_per_hour": 1.0, "date": datetime.date(2026, 11, 1), "source": "contract 12"}
    assert recipe_with(tmp_path, given).benchmark.price.date == "2026-11-01"


# --- the sheet --------------------------------------------------------------------------------------------------------


def test_every_shipped_price_has_a_source_and_all_but_spot_a_date() -> None:
    known = load_prices()
    assert all(spec.source and (spec.date or spec.purchase == "spot") for spec in known.machines.values())
    assert all(api.source and api.date and 0 < api.input < api.output for api in known.apis.values())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", known.machines["aws/c7i.large"].date)


def test_a_file_adds_to_the_sheet_and_replaces_its_entries(sheet: Path) -> None:
    known, ours = load_prices(), load_prices(sheet)
    assert ours.machines.keys() - known.machines.keys() == {"rack/box", "lab/gpu", "lab/gpu:spot"}
    replaced = prices.price_of(ours.machines["aws/c7i.large"])
    assert (replaced.usd_per_hour, replaced.source, replaced.date) == (0.07, "contract 12", "2026-11-01")
    assert ours.machines["aws/c7i.large:spot"] == known.machines["aws/c7i.large:spot"]
    box = prices.price_of(ours.machines["rack/box"])
    # The entry's own source comes without the sheet's date.
    assert (box.purchase, box.source, box.date, box.utilization) == ("owned", "invoice 7", "", 0.5)
    calm, spot = (prices.price_of(ours.machines[name]) for name in ("lab/gpu", "lab/gpu:spot"))
    assert (calm.overhead, calm.usd_per_busy_hour) == (0, 2.0)
    assert (spot.overhead, spot.usd_per_busy_hour) == (pytest.approx(0.05), pytest.approx(1 / 0.95))
    assert calm.egress_usd_per_gb == spot.egress_usd_per_gb == 0.09
    assert (ours.apis["ours/small"].source, ours.apis["ours/small"].date) == ("contract 12", "2026-10-31")
    assert ours.apis["openai/gpt-4o-mini"].input == 1


def test_recipes_obey_the_variable(sheet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENNYWEIGHT_PRICES", str(sheet))
    recipe = recipe_with(tmp_path, {"name": "lab/gpu:spot", "overhead": 0.5})
    # What the recipe says of restarts takes the place of all that the sheet says.
    assert recipe.dump()["benchmark"]["price"] | {"owned": None} == {
        "name": "lab/gpu:spot", "usd_per_hour": 1.0, "owned": None, "purchase": "spot", "source": "contract 12",
        "date": "2026-11-01", "overhead": 0.5, "interruptions_per_hour": None, "restart_minutes": None,
        "utilization": 1.0, "egress_usd_per_gb": 0.09, "bytes_per_token": 4.0,
    }  # fmt: skip
    monkeypatch.setenv("PENNYWEIGHT_PRICES", "")
    assert Recipe.model_validate(recipe.dump()) == recipe
    with pytest.raises(RecipeError, match="unknown price 'rack/box'"):
        recipe_with(tmp_path, "rack/box")


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
def test_a_malformed_file_stops_what_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("source: s\nprices:\n  a/b: {on_demand: cheap}\n")
    monkeypatch.setenv("PENNYWEIGHT_PRICES", str(path))
    done = CliRunner().invoke(main, [command, "smollm2-135m-cpu"])
    assert done.exit_code == 2
    assert f"1 problem in the price sheet:\n  {path}:3: prices.a/b.on_demand: " in done.stderr
    assert "valid number (it is 'cheap')" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "must be a mapping"),
        ("a: [", "is not YAML"),
        ("source: s\nprices: {a/b: {on_demand: 0}}", "prices.a/b.on_demand: input should be greater than 0"),
        ("source: s\nprices: {a/b: {on_demnd: 1}}", "did you mean 'on_demand'?"),
        ("source: s\nprices: {a/b: {vcpus: 2}}", "prices.a/b: needs `on_demand` or `spot`"),
        ("source: s\nprices: {a/b: {spot: 1, usd_per_hour: 2}}", "prices.a/b: needs `on_demand` or `spot`"),
        ("source: s\nprices: {a/b: {spot: 1, overhead: 1}}", "prices.a/b.overhead: input should be less than 1"),
        ("source: s\nprices: {a/b: {owned: {years: 0}}}", "prices.a/b.owned.years: input should be greater than 0"),
        ("prices: {a/b: {on_demand: 1}}", "prices.a/b has no `source`"),
        ("source: s\ndate: soon\nprices: {a/b: {on_demand: 1}}", "date: 'soon' is no date"),
        ("source: s\napis: {a/b: {input: 1}}", "apis.a/b.output: is missing"),
        ("source: s\napis: {a/b: {input: -1, output: .inf}}", "apis.a/b.output: input should be a finite number"),
        ("source: s\napi: {}", "did you mean 'apis'?"),
        ("source: s\nprices:\n  a/b: {spot: 1}\n  a/b: {spot: 2}", "two entries have the name 'a/b'"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(PriceSheetError) as caught:
        load_prices(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PriceSheetError, match=r"missing\.yaml: cannot be read: No such file"):
        load_prices(tmp_path / "missing.yaml")


def test_staleness_begins_after_180_days() -> None:
    today = datetime.date(2026, 11, 25)
    assert not is_stale("2026-05-29", today)  # 180 days
    assert is_stale("2026-05-28", today)
    assert is_stale("", today)
    assert not is_stale("2026-11-26", today)


def test_the_listing_marks_what_is_old(sheet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    today = datetime.date.today()
    text = SHEET.replace("2026-11-01", today.isoformat()).replace(
        "2026-10-31", (today - datetime.timedelta(days=181)).isoformat()
    )
    sheet.write_text(text)
    done = CliRunner().invoke(main, ["prices", "--prices", str(sheet)])
    assert done.exit_code == 0, done.output
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert "stale" not in lines["aws/c7i.large"]
    assert "undated" in lines["rack/box"]
    assert "stale" in lines["ours/small"]
    assert "stale" in lines["aws/c7i.xlarge"]  # of February 2026, and time does not run backwards
    # $9,000 over 4 years and 350 W at $0.20 a kWh, busy half the time.
    assert re.search(r"rack/box +owned +0\.326849 +0\.653699 ", done.stdout)
    number = re.search(r"\[(\d+)\]$", lines["rack/box"])
    assert number is not None
    assert f"[{number[1]}] invoice 7" in done.stdout
    monkeypatch.setenv("PENNYWEIGHT_PRICES", str(sheet))
    rows = json.loads(CliRunner().invoke(main, ["prices", "--json"]).stdout)
    machines = {row["name"]: row for row in rows["machines"]}
    assert (machines["aws/c7i.large"]["stale"], machines["aws/c7i.large"]["usd_per_hour"]) == (False, 0.07)
    assert machines["rack/box"]["stale"]
    assert {row["name"]: row["stale"] for row in rows["apis"]}["ours/small"]


# --- options ----------------------------------------------------------------------------------------------------------


def test_prices_of_the_command_line(sheet: Path) -> None:
    known = load_prices(sheet)
    assert parse_price("1.5", known).usd_per_hour == parse_price("$1.5", known).usd_per_hour == 1.5
    assert (parse_price("$1.5", known).source, parse_price("$1.5", known).purchase) == ("--price", "custom")
    assert parse_price("lab/gpu:spot", known).usd_per_busy_hour == pytest.approx(1 / 0.95)
    amended = parse_price("{name: lab/gpu, utilization: 0.25}", known)
    assert (amended.usd_per_busy_hour, amended.source) == (8.0, "contract 12")
    assert parse_price("{name: x, usd_per_hour: 2}", known).source == "--price"
    assert (parse_api_price("0.15:0.60", known).input, parse_api_price("$1:$2", known).output) == (0.15, 2)
    assert parse_api_price("ours/small", known).output == 0.2
    assert parse_api_price("google/gemini-3.5-flash", known).source


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nan", "finite number"),
        ("inf", "finite number"),
        ("0", "greater than 0"),
        ("aws/c7i.lage", "did you mean 'aws/c7i.large'?"),
        ("{name: aws/c7i.lage, utilization: 1}", "did you mean 'aws/c7i.large'?"),
        ("{name: aws/c7i.large, utilization: 2}", "--price: utilization: input should be less than or equal to 1"),
        ("{usd_per_hour: 2}", "--price: name: is missing"),
        ("{name: x", "is not YAML"),
    ],
)
def test_wrong_prices_of_the_command_line(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_price(text, load_prices())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("openai/gpt-4o-mni", "did you mean 'openai/gpt-4o-mini'?"),
        ("1:nan", "is no price"),
        ("-1:2", "is no price"),
        ("0.15", "0.15:0.60"),
    ],
)
def test_wrong_prices_of_an_api(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_api_price(text, load_prices())
    assert words in str(caught.value)
