"""Prices: what a recipe, a price sheet or an option can say of one, and the sheet itself.

The sheet comes along, since a record must not change because a web page did. A file of yours adds to it and replaces
entries of it: the one in `PENNYWEIGHT_PRICES`, or in `--prices`.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pennyweight import shipped
from pennyweight.errors import PriceSheetError, Problem, RecipeError, did_you_mean
from pennyweight.recipe.wording import validate
from pennyweight.schema import Section
from pennyweight.yamlfile import YamlFile

#: Names the file that adds to the shipped sheet.
VARIABLE = "PENNYWEIGHT_PRICES"
#: A price that was written down longer ago is marked as stale.
STALE_AFTER_DAYS = 180


def _day(value: Any) -> Any:
    """YAML reads 2026-02-09 as a date, a recipe's record keeps it as text; nothing else is one."""
    if type(value) is datetime.date:
        return value.isoformat()
    if isinstance(value, str) and value:
        try:
            return datetime.date.fromisoformat(value).isoformat()
        except ValueError:
            raise ValueError(f"{value!r} is no date; write it as 2026-02-09, or leave it out") from None
    return value


Dollars = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Day = Annotated[str, BeforeValidator(_day)]


class Owned(Section):
    """A machine of your own: what it costs to buy, in a straight line over its life, its power, and all else."""

    purchase_usd: Dollars
    years: Dollars
    """Until it is worth nothing."""
    watts: Amount
    """Drawn at the wall, averaged over all hours."""
    usd_per_kwh: Amount
    pue: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Power usage effectiveness: the building's power over the machines'."""
    other_usd_per_month: Amount = 0.0
    """Rack, network, hands, insurance; a month has 730 hours."""


class Terms(Section):
    """How much of a paid hour does work, and what leaving the building costs."""

    overhead: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] | None = None
    """Share of paid time that is lost to restarts; or say the next two."""
    interruptions_per_hour: Amount | None = None
    restart_minutes: Amount | None = None
    """From the interruption until the model serves again."""
    utilization: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    """Share of the hours that it is up in which the machine works."""
    egress_usd_per_gb: Amount = 0.0
    """Of the answers' text; a GB has 10⁹ bytes."""
    bytes_per_token: Dollars = 4.0
    """Bytes of text in an output token, for egress. The framing of a stream is not counted."""

    @model_validator(mode="after")
    def _one_overhead(self) -> Terms:
        rate, minutes = self.interruptions_per_hour, self.restart_minutes
        if (rate is None) != (minutes is None):
            raise ValueError("`interruptions_per_hour` and `restart_minutes` need each other")
        if rate is not None and minutes is not None:
            if self.overhead is not None:
                raise ValueError("needs `overhead`, or `interruptions_per_hour` and `restart_minutes`, not both")
            if rate * minutes >= 60:
                raise ValueError(f"{rate:g} interruptions an hour of {minutes:g} minutes each leave no time to work")
        return self


class PriceSpec(Terms):
    """What a machine's hour costs: by a name of the price sheet, `usd_per_hour`, or `owned`."""

    name: str
    """`PROVIDER/INSTANCE` of the price sheet (`:spot` for spot); any name for a price of your own."""
    usd_per_hour: Dollars | None = None
    """Of an hour that is paid for, busy or not."""
    owned: Owned | None = None
    purchase: str = "custom"
    source: str = "the recipe"
    date: Day = ""

    @model_validator(mode="before")
    @classmethod
    def _from_the_sheet(cls, value: Any) -> Any:
        return named(value) if isinstance(value, str | dict) else value

    @model_validator(mode="after")
    def _one_price(self) -> PriceSpec:
        if (self.usd_per_hour is None) == (self.owned is None):
            raise ValueError("needs exactly one of `usd_per_hour` and `owned`")
        return self


class Ceilings(Section):
    """What one machine can do at most, by its data sheet, without sparsity. One GPU, or the whole CPU."""

    read_gb_per_s: Dollars
    tflops_fp32: Dollars
    tflops_bf16: Dollars
    tops_int8: Dollars | None = None
    source: str


class SheetEntry(Terms):
    """A machine of the sheet. `on_demand` and `spot` are dollars an hour; restarts are counted for spot alone."""

    on_demand: Dollars | None = None
    spot: Dollars | None = None
    usd_per_hour: Dollars | None = None
    """A price of your own, bought in some other way."""
    owned: Owned | None = None
    source: str | None = None
    date: Day | None = None
    vcpus: int | None = Field(None, ge=1)
    memory_gib: Dollars | None = None
    gpu: str | None = None
    ceilings: Ceilings | None = None
    """Of an instance that serves one model with one GPU, or with its CPU."""

    @model_validator(mode="after")
    def _bought_in_one_way(self) -> SheetEntry:
        market = self.on_demand is not None or self.spot is not None
        if market + (self.usd_per_hour is not None) + (self.owned is not None) != 1:
            raise ValueError("needs `on_demand` or `spot` or both, or else one of `usd_per_hour` and `owned`")
        return self


class ApiPrice(Section):
    """An API that is paid by the token, in US dollars for a million."""

    input: Amount
    output: Amount
    source: str | None = None
    date: Day | None = None
    note: str = ""
    """What the price holds for, where that is not everything."""


class PriceSheet(Section):
    """A file of prices. `source` and `date` at the top hold for the entries that state none of their own."""

    source: str | None = None
    date: Day = ""
    spot_source: str | None = None
    """Of spot prices, with `spot_date`, where that is not `source`."""
    spot_date: Day = ""
    prices: dict[str, SheetEntry] = Field({})
    apis: dict[str, ApiPrice] = Field({})

    @model_validator(mode="after")
    def _every_price_has_a_source(self) -> PriceSheet:
        for section, entries in (("prices", self.prices), ("apis", self.apis)):
            for name, entry in entries.items():
                if not (entry.source or self.source):
                    raise ValueError(f"{section}.{name} has no `source`; say it there, or at the top for all entries")
        return self

    def machines(self) -> dict[str, PriceSpec]:
        """Prices by name; `NAME:spot` for an entry's spot price."""
        found = {}
        for name, entry in self.prices.items():
            for suffix, purchase, part in self._ways_to_buy(entry):
                found[name + suffix] = PriceSpec(name=name + suffix, purchase=purchase, **part)
        return found

    def _ways_to_buy(self, entry: SheetEntry) -> list[tuple[str, str, dict[str, Any]]]:
        terms = entry.model_dump(include=set(Terms.model_fields), exclude_unset=True)
        calm = {key: value for key, value in terms.items() if key not in RESTARTS}
        ours = {"source": self.source, "date": self.date}
        spot = {"source": self.spot_source, "date": self.spot_date} if self.spot_source else ours
        ways = []
        if entry.on_demand is not None:
            ways.append(("", "on demand", {"usd_per_hour": entry.on_demand, **calm, **_origin(entry, ours)}))
        if entry.spot is not None:
            ways.append((":spot", "spot", {"usd_per_hour": entry.spot, **terms, **_origin(entry, spot)}))
        if entry.usd_per_hour is not None:
            ways.append(("", "custom", {"usd_per_hour": entry.usd_per_hour, **terms, **_origin(entry, ours)}))
        if entry.owned is not None:
            ways.append(("", "owned", {"owned": entry.owned, **terms, **_origin(entry, ours)}))
        return ways

    def priced_apis(self) -> dict[str, ApiPrice]:
        ours = {"source": self.source, "date": self.date}
        return {name: entry.model_copy(update=_origin(entry, ours)) for name, entry in self.apis.items()}


RESTARTS = ("overhead", "interruptions_per_hour", "restart_minutes")


def _origin(entry: SheetEntry | ApiPrice, otherwise: dict[str, Any]) -> dict[str, Any]:
    """Where and when a price was written: an entry's own source goes with its own date."""
    if entry.source:
        return {"source": entry.source, "date": entry.date or ""}
    return otherwise | ({"date": entry.date} if entry.date else {})


@dataclass(frozen=True)
class Prices:
    """What names of the sheet mean: machines by the hour, APIs by the token."""

    machines: dict[str, PriceSpec]
    apis: dict[str, ApiPrice]
    ceilings: dict[str, Ceilings]
    """Of the machines whose data sheets are known; `NAME:spot` has those of `NAME`."""


def load_prices(path: Path | None = None) -> Prices:
    """The shipped sheet, with what a file adds and replaces: `path`, else the one that `PENNYWEIGHT_PRICES` names.

    Raises PriceSheetError with all problems of the file.
    """
    if path is None and os.environ.get(VARIABLE):
        path = Path(os.environ[VARIABLE])
    machines: dict[str, PriceSpec] = {}
    apis: dict[str, ApiPrice] = {}
    ceilings: dict[str, Ceilings] = {}
    for file in [shipped.price_sheet(), *([path] if path else [])]:
        sheet = _read(file)
        machines |= sheet.machines()
        apis |= sheet.priced_apis()
        ceilings |= {name: entry.ceilings for name, entry in sheet.prices.items() if entry.ceilings}
    known = {name: name.removesuffix(":spot") for name in machines}
    return Prices(machines, apis, {name: ceilings[bare] for name, bare in known.items() if bare in ceilings})


def _read(path: Path) -> PriceSheet:
    try:
        file = YamlFile.load(path)
    except RecipeError as error:
        raise PriceSheetError(error.problems) from None
    problems: list[Problem] = list(file.problems)
    sheet = validate(PriceSheet, file.data, file, problems)
    if problems:
        raise PriceSheetError(problems)
    return sheet


def named(value: str | dict[str, Any], prices: Prices | None = None) -> Any:
    """A price with what the sheet says of its name, where it states no price of its own; its other keys stay.

    Without `prices` they are loaded when a name is looked up. Raises ValueError for a name that the sheet lacks.
    """
    given = {"name": value} if isinstance(value, str) else dict(value)
    if "owned" in given and given["owned"] is not None:
        return {"purchase": "owned", **given}
    name = given.get("name")
    if given.get("usd_per_hour") is not None or not isinstance(name, str):
        return given
    machines = (prices or load_prices()).machines
    if name not in machines:
        own = " (a price of your own needs `usd_per_hour` or `owned`)" if isinstance(value, dict) else ""
        raise ValueError(f"unknown price {name!r}; {did_you_mean(name, list(machines))}{own}")
    sheet = machines[name].model_dump(exclude_unset=True)
    if any(given.get(key) is not None for key in RESTARTS):
        sheet = {key: item for key, item in sheet.items() if key not in RESTARTS}
    return sheet | given


def is_stale(day: str, today: datetime.date) -> bool:
    """Whether a price is so old that it should be looked up again. One without a date is."""
    return not day or (today - datetime.date.fromisoformat(day)).days > STALE_AFTER_DAYS
