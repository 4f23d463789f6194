"""A condition's outcome in one sentence. Only words are rounded, never what is compared."""

from __future__ import annotations

from pennyweight.records import ConditionResult
from pennyweight.statistics import Estimate, PairedTable
from pennyweight.suite import Condition, SavingCondition


def describe(condition: Condition, found: ConditionResult, estimate: Estimate) -> str:
    """What was seen, how sure that is, and what it would take to be surer."""
    assert found.value is not None and found.threshold is not None
    level = f"{condition.confidence:.0%}"
    if condition.max is not None or condition.min is not None:
        sign = ("≤" if found.value <= found.threshold else ">") if condition.max is not None else (
            "≥" if found.value >= found.threshold else "<"
        )  # fmt: skip
        seen = f"{found.name} {number(found.value)} {sign} {found.threshold:g}"
        margin = ""
    elif isinstance(estimate, PairedTable):
        seen = (
            f"{found.name} {number(found.value, True)} against the base on {found.n:,} questions "
            f"({estimate.gained} gained, {estimate.lost} lost)"
        )
        margin = f", margin {number(found.threshold, True)}"
    else:
        seen = f"{found.name} {number(found.value, True)} against the base on {found.n:,} items"
        margin = f", bound {number(found.threshold, True)}"
        if condition.metric == "perplexity":
            seen = f"{found.name} {number(found.value, digits=4)} times the base's"
            margin = f", bound {found.threshold:g}"
    seen += _bounds(found, level) + margin
    if found.detectable is not None and found.worst != found.best:
        seen += f"; minimum detectable {number(found.detectable, digits=2)}"
    if found.looks > 1:
        seen += f"; look {found.look} of {found.looks}"
    if found.status == "inconclusive":
        seen += f"; {_what_it_takes(found)}"
    return seen


def describe_saving(condition: SavingCondition, found: ConditionResult, against: str | None) -> str:
    """The same of a saving against the cheapest base candidate."""
    assert found.value is not None and found.threshold is not None and found.detectable is not None
    sign = "≥" if found.value >= found.threshold else "<"
    seen = f"{found.name} {number(found.value)} {sign} {number(found.threshold)} against {against} on {found.n} rounds"
    seen += _bounds(found, f"{condition.confidence:.0%}")
    if found.worst != found.best:
        seen += f"; minimum detectable {number(found.detectable, digits=2)}"
    if found.status == "inconclusive":
        seen += f"; {_what_it_takes(found, 'rounds')}"
    return seen


def _bounds(found: ConditionResult, level: str) -> str:
    low, high = (found.worst, found.best) if found.higher_is_better else (found.best, found.worst)
    good, bad = ("above", "below") if found.higher_is_better else ("below", "above")
    if found.worst == found.best:
        return ""
    digits = 4 if found.value is not None and 0.5 < found.value < 2 else 3  # ratios near 1
    if found.status == "pass":
        return f"; at {level} confidence {good} {number(found.worst, digits=digits)}"
    if found.status == "fail":
        return f"; at {level} confidence {bad} {number(found.best, digits=digits)}"
    return f"; at {level} confidence between {number(low, digits=digits)} and {number(high, digits=digits)}"


def _what_it_takes(found: ConditionResult, items: str = "items") -> str:
    """How many items would settle an undecided condition."""
    needed = found.needed_as_seen
    if needed is None or needed > 1000 * found.n:
        return f"it lies on its bound, and no number of {items} would settle that"
    if found.worst == found.best or needed <= found.n:
        return f"a few more {items} should settle it"
    return f"about {number(needed)} {items} would settle it, if it is what it seems"


def number(value: float | None, signed: bool = False, digits: int = 3) -> str:
    """A few digits, with a true minus sign; ∞ for a bound that the data do not give."""
    if value is None:
        return "∞"
    shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    return (f"+{shown}" if signed and value >= 0 else shown).replace("-", "−")
