"""How numbers, times and names read in the report. Minus signs are real ones; what is missing is an en dash."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

from pennyweight.records import Interval, MetricValue

MISSING = "–"
NO_BREAK = "\N{NO-BREAK SPACE}"

#: Short headings of the metrics that a suite with divergence measures.
METRIC_LABELS = {
    "kl_mean": "KL mean",
    "kl_p99": "KL p99",
    "kl_p999": "KL p99.9",
    "nll_delta": "Δ NLL per token",
    "top1_agreement": "top-1 agreement",
    "perplexity": "perplexity",
    "perplexity_ratio": "perplexity ratio",
}

METRIC_NAMES = {
    "kl_mean": "mean KL divergence from the base",
    "kl_p99": "99th percentile of the KL divergence from the base",
    "kl_p999": "99.9th percentile of the KL divergence from the base",
    "nll_delta": "negative log-likelihood per token above the base's",
    "top1_agreement": "top-1 agreement with the base",
    "perplexity_ratio": "perplexity relative to the base",
}


def number(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits: 0.00420, 45.1, 1,230. Never rounds away digits left of the point."""
    if value is None:
        return MISSING
    special = _not_finite(value)
    if special:
        return special
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    if abs(rounded) < 1e-5:
        return minus(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return minus(f"{value:,.{decimals}f}")


def score(value: float | None) -> str:
    """A quality metric: three decimals from 0.1 on, three significant digits below."""
    if value is None or not math.isfinite(value) or abs(value) < 0.1 or abs(value) >= 100:
        return number(value)
    return minus(f"{value:.3f}")


def change(value: float) -> str:
    """A difference, always signed: +0.012, −0.005."""
    return minus(f"{value:+.3f}") if math.isfinite(value) else number(value)


def standard_error(value: float) -> str:
    """`± 0.011`; one significant digit where three decimals would hide it."""
    shown = number(value, 1) if not math.isfinite(value) or abs(value) < 0.001 else f"{value:.3f}"
    return f"±{NO_BREAK}{shown}"


def difference(metric: MetricValue) -> str | None:
    """`−0.005 ± 0.011`: the metric against the base, with the standard error of the paired difference."""
    if metric.delta is None:
        return None
    error = f"{NO_BREAK}{standard_error(metric.delta_stderr)}" if metric.delta_stderr else ""
    return change(metric.delta) + error


def metric_label(name: str) -> str:
    return METRIC_LABELS.get(name, name.replace("/", " "))


def percent(value: float) -> str:
    """A fraction in percent: whole percents, two significant digits below 10%."""
    if not math.isfinite(value):
        return _not_finite(value)
    scaled = 100 * value
    if scaled == 0:
        return "0%"
    decimals = 0 if abs(scaled) >= 9.95 else max(1, 1 - math.floor(math.log10(abs(scaled))))
    return minus(f"{scaled:.{min(decimals, 4)}f}%")


def interval(value: Interval) -> str:
    return f"[{percent(value.low)} to {percent(value.high)}]"


def usd(value: float | None) -> str:
    """US dollars with three significant digits, and never fewer than two decimals."""
    if value is None or not math.isfinite(value):
        return MISSING if value is None else _not_finite(value)
    shown = f"{value:,.2f}" if abs(value) >= 10 or value == 0 else number(value).lstrip("−")
    return f"−${shown.lstrip('-')}" if value < 0 else f"${shown}"


def size(count: int | None) -> str:
    """Bytes in MB or GB (powers of ten)."""
    if count is None:
        return MISSING
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{number(count / 1e6)} MB"


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return _not_finite(seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def moment(text: str) -> str:
    """An ISO timestamp to the minute; anything else as it is."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    zone = "" if when.tzinfo is None else " UTC" if not when.utcoffset() else f" {when:%z}"
    return f"{when:%Y-%m-%d %H:%M}{zone}"


def saving(value: float) -> str:
    """`saves 47%`, or `3.1% more` where it costs more."""
    return f"{percent(-value)} more" if value < 0 else f"saves {percent(value)}"


def condition(bound: dict[str, Any]) -> str:
    """A condition of the gate in short: `≤ 0.1`, `≥ 0.9`, or `> −0.05` for a margin from the base."""
    if bound.get("max") is not None:
        return minus(f"≤ {bound['max']:g}")
    if bound.get("min") is not None:
        return minus(f"≥ {bound['min']:g}")
    if bound.get("relative_within") is not None:
        return f"within {bound['relative_within']:.3g} of the base's"
    margin = bound.get("non_inferior_within")
    return "" if margin is None else f"margin {margin:g}"


def minus(text: str) -> str:
    return text.replace("-", "−")


def _not_finite(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "" if math.isfinite(value) else "∞" if value > 0 else "−∞"
