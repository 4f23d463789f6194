"""What input tokens, output tokens and idle time cost, and when a machine of one's own pays.

A machine at full load spends a·i + b·o seconds on a request of i tokens in and o out. a and b are fitted to requests a
second measured at several mixes, so that what all requests cost adds up to the machine's bill; hours in which it has
nothing to do are a price of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from pennyweight.errors import UsageError
from pennyweight.load.bench import BenchReport
from pennyweight.load.report import LoadReport
from pennyweight.records import Interval, Price, Record

#: Mixes of input and output that a card is fitted from, at least.
FEWEST_MIXES = 3
#: Condition number of the scaled mixes above which they cannot tell input from output.
MOST_ALIKE = 50.0
RESAMPLES = 1000


class Mix(Record):
    """One measured mix, as requests of its mean size."""

    input_tokens: float
    output_tokens: float
    load: str
    seconds: float = Field(description="of the machine, for each request: 1 / requests a second")
    predicted: float = Field(description="by the card")
    held_out: float | None = Field(description="by a card fitted to the other mixes; None where they are too few")

    @property
    def error(self) -> float:
        """Of the card, as a fraction."""
        return self.predicted / self.seconds - 1

    @property
    def held_out_error(self) -> float | None:
        return None if self.held_out is None else self.held_out / self.seconds - 1


class PriceCard(Record):
    price: Price
    usd_per_hour: float = Field(description="of an hour that is paid for, busy or not")
    usd_per_1m_input: Interval
    usd_per_1m_output: Interval = Field(description="with egress")
    usd_per_idle_hour: float = Field(description="which the tokens pay for already where utilization is below 1")
    mixes: list[Mix]

    def seconds(self, input_tokens: float, output_tokens: float) -> float:
        """Machine time of a request at full load."""
        output = self.usd_per_1m_output.value - self.price.egress_usd_per_1m_output
        usd = self.usd_per_1m_input.value * input_tokens + output * output_tokens
        return usd / 1e6 / (self.price.usd_per_busy_hour / 3600)


class BreakEven(Record):
    """A machine of one's own against an API that is paid by the token, at one mix."""

    input_tokens: float
    output_tokens: float
    usd_per_day: float = Field(description="of the machine, busy or not")
    capacity: float = Field(description="requests a day at full load, in the time that restarts leave")
    api_usd_per_request: float
    egress_usd_per_request: float = Field(description="of the machine's answers")
    requests_per_day: float | None = Field(description="from which on the machine pays; None where it never does")
    tokens_per_day: float | None
    utilization: float | None = Field(description="of the machine at that point, of the hours that it is up")
    declared_utilization: float = Field(description="the price's own")

    @property
    def pays(self) -> bool:
        """Whether the machine costs no more than the API at the utilization that its price declares."""
        return self.utilization is not None and self.utilization <= self.declared_utilization


def fit(reports: Sequence[BenchReport], price: Price | None = None, seed: int = 0) -> PriceCard:
    """The price card of reports on one target, one for each mix. Each gives its knee, or its fastest load. Tokens are
    priced with `price`, else with the first that a report has.

    Weighted least squares on relative errors, with a, b ≥ 0. The intervals carry the throughputs' own through the fit.
    Raises UsageError where the reports cannot make a card.
    """
    targets = {(report.model, report.runtime, report.client["cpu"]) for report in reports}
    if len(targets) > 1:
        raise UsageError("the reports are of different models, runtimes or machines", "a price card is of one")
    price = price or next((report.price for report in reports if report.price), None)
    if price is None:
        raise UsageError("the reports have no price", "say --price, a name of the sheet or dollars an hour")
    loads = [at_its_best(report) for report in reports]
    sizes = np.array([[load.input_tokens / load.requests, load.output_tokens / load.requests] for load in loads])
    seconds = np.array([1 / load.requests_per_second for load in loads])
    if len(loads) < FEWEST_MIXES:
        raise UsageError(
            f"{len(loads)} mixes make no card", f"measure at least {FEWEST_MIXES} ratios of input to output"
        )
    if np.linalg.cond(sizes / sizes.max(0)) > MOST_ALIKE:
        raise UsageError("the mixes are too much alike to tell input from output", "measure 1:4, 1:1 and 4:1")
    rates = _solve(sizes, seconds)
    spread = _resampled(sizes, seconds, loads, seed)
    usd = price.usd_per_busy_hour / 3600 * 1e6
    prices = [
        Interval(value=usd * rate + egress, low=usd * low + egress, high=usd * high + egress)
        for rate, (low, high), egress in zip(rates, spread, (0.0, price.egress_usd_per_1m_output), strict=True)
    ]
    mixes = []
    for index, load in enumerate(loads):
        others = np.arange(len(loads)) != index
        apart = np.linalg.cond(sizes[others] / sizes[others].max(0)) <= MOST_ALIKE
        held_out = float(sizes[index] @ _solve(sizes[others], seconds[others])) if apart else None
        mixes.append(
            Mix(
                input_tokens=sizes[index, 0], output_tokens=sizes[index, 1], load=load.load, seconds=seconds[index],
                predicted=float(sizes[index] @ rates), held_out=held_out,
            )
        )  # fmt: skip
    return PriceCard(
        price=price, usd_per_hour=price.usd_per_hour, usd_per_1m_input=prices[0], usd_per_1m_output=prices[1],
        usd_per_idle_hour=price.usd_per_hour, mixes=mixes,
    )  # fmt: skip


def at_its_best(report: BenchReport) -> LoadReport:
    """The load that a report's target would be run at. Raises UsageError where none meets its SLO."""
    if report.knee:
        chosen = [load for load in report.knee.reports if load.concurrency == report.knee.concurrency]
    else:
        chosen = [load for load in report.loads if not load.saturated]
    if not chosen:
        raise UsageError(f"{report.workload}: no load meets the SLO", "loosen it, or take a larger machine")
    return max(chosen, key=lambda load: load.total_tokens_per_second.value)


def break_even(
    card: PriceCard, input_tokens: float, output_tokens: float, api_input: float, api_output: float
) -> BreakEven:
    """From where on a machine that is paid for all day costs less than an API.

    `api_input` and `api_output`: dollars for a million tokens. A request saves what the API takes for it, less the
    egress of its answer. The day's price over that is the number of requests from which on the machine pays, and their
    share of what it can serve in the hours that it is up is its utilization then.
    """
    per_request = (api_input * input_tokens + api_output * output_tokens) / 1e6
    egress = card.price.egress_usd_per_1m_output * output_tokens / 1e6
    per_day = 24 * card.usd_per_hour
    capacity = 86400 * (1 - card.price.overhead) / card.seconds(input_tokens, output_tokens)
    needed = per_day / (per_request - egress) if per_request > egress else math.inf
    pays = needed <= capacity
    return BreakEven(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        usd_per_day=per_day,
        capacity=capacity,
        api_usd_per_request=per_request,
        egress_usd_per_request=egress,
        requests_per_day=needed if pays else None,
        tokens_per_day=needed * (input_tokens + output_tokens) if pays else None,
        utilization=needed / capacity if pays else None,
        declared_utilization=card.price.utilization,
    )


def _solve(sizes: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Seconds for a token in and for one out, neither below 0, with the smallest squared relative errors."""
    from scipy.optimize import nnls

    return nnls(sizes / seconds[:, None], np.ones(len(seconds)))[0]


def _resampled(sizes: np.ndarray, seconds: np.ndarray, loads: list[LoadReport], seed: int) -> np.ndarray:
    """95% of the rates that throughputs drawn from their own intervals would give, (2, low and high)."""
    generator = np.random.default_rng(seed)
    speeds = [load.total_tokens_per_second for load in loads]
    errors = np.array([(speed.high - speed.low) / 2 / 1.96 / speed.value for speed in speeds])
    drawn = seconds * np.exp(generator.normal(0, 1, (RESAMPLES, len(seconds))) * errors)
    rates = np.array([_solve(sizes, row) for row in drawn])
    return np.quantile(rates, [0.025, 0.975], axis=0).T
