"""The arithmetic of prices: from what is paid to what a busy hour costs. Pure functions."""

from __future__ import annotations

from pennyweight.recipe import Owned, PriceSpec
from pennyweight.records import Price

HOURS_A_YEAR = 8760
HOURS_A_MONTH = 730


def owned_usd_per_hour(machine: Owned) -> float:
    """US dollars an hour of a machine of one's own, depreciated in a straight line to nothing.

    purchase / (years · 8760) + watts / 1000 · pue · usd_per_kwh + other / 730
    """
    depreciation = machine.purchase_usd / (machine.years * HOURS_A_YEAR)
    power = machine.watts / 1000 * machine.pue * machine.usd_per_kwh
    return depreciation + power + machine.other_usd_per_month / HOURS_A_MONTH


def restart_overhead(interruptions_per_hour: float, restart_minutes: float) -> float:
    """Share of the time that restarts take: interruptions_per_hour · restart_minutes / 60."""
    return interruptions_per_hour * restart_minutes / 60


def usd_per_busy_hour(usd_per_hour: float, overhead: float, utilization: float) -> float:
    """US dollars for an hour of work: usd_per_hour / (1 − overhead) / utilization.

    `overhead`: share of paid time that is lost to restarts, below 1. `utilization`: share of the rest in which the
    machine works, above 0.
    """
    return usd_per_hour / (1 - overhead) / utilization


def egress_usd_per_million(usd_per_gb: float, bytes_per_token: float) -> float:
    """US dollars for sending a million output tokens: usd_per_gb · bytes_per_token · 10⁶ / 10⁹."""
    return usd_per_gb * bytes_per_token / 1000


def price_of(spec: PriceSpec) -> Price:
    """A price with its parts, so that what tokens are priced with can be computed again by hand."""
    if spec.owned is not None:
        usd_per_hour = owned_usd_per_hour(spec.owned)
    else:
        assert spec.usd_per_hour is not None, "the schema asks for one of the two"
        usd_per_hour = spec.usd_per_hour
    overhead = spec.overhead or 0.0
    if spec.interruptions_per_hour is not None and spec.restart_minutes is not None:
        overhead = restart_overhead(spec.interruptions_per_hour, spec.restart_minutes)
    return Price(
        name=spec.name,
        purchase=spec.purchase,
        usd_per_hour=usd_per_hour,
        source=spec.source,
        date=spec.date,
        owned=spec.owned and spec.owned.model_dump(),
        overhead=overhead,
        utilization=spec.utilization,
        usd_per_busy_hour=usd_per_busy_hour(usd_per_hour, overhead, spec.utilization),
        egress_usd_per_gb=spec.egress_usd_per_gb,
        bytes_per_token=spec.bytes_per_token if spec.egress_usd_per_gb else None,
        egress_usd_per_1m_output=egress_usd_per_million(spec.egress_usd_per_gb, spec.bytes_per_token),
    )
