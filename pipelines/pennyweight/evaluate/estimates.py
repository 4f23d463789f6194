"""Evidence → estimates: what a metric is, and how far it is from the base's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pennyweight.errors import StageError
from pennyweight.evaluate.evidence import Evidence, Row, ScoredText
from pennyweight.records import MetricValue
from pennyweight.statistics import (
    Estimate,
    LogRatio,
    Mean,
    PairedTable,
    Proportion,
    Quantile,
    clustered_mean,
    paired_mean,
)
from pennyweight.statistics.clustered import NORMAL_95
from pennyweight.suite import Suite, source_of

#: What the base's own value of a metric is, where that is so by definition.
BY_DEFINITION = {
    "kl_mean": 0.0, "kl_p99": 0.0, "kl_p999": 0.0, "top1_agreement": 1.0, "perplexity_ratio": 1.0, "nll_delta": 0.0,
}  # fmt: skip


def value_of(name: str, evidence: Evidence) -> Estimate | None:
    """A metric itself; None where it was not measured."""
    source, metric = source_of(name), name.rpartition("/")[2]
    if source in evidence.texts:
        return _of_text(metric, evidence.texts[source])
    scores = _scores(evidence.of_task(source), metric)
    if scores is None:
        return None
    binary = bool(np.isin(scores, (0.0, 1.0)).all())
    return Proportion(int(scores.sum()), len(scores)) if binary else paired_mean(scores)


def _of_text(metric: str, text: ScoredText) -> Estimate | None:
    scored = text.documents[:, 1:].ravel()  # the document of the token that is predicted
    match metric:
        case "perplexity":
            return LogRatio(clustered_mean(text.nll.ravel().astype(float), scored))
        case "perplexity_ratio":
            return LogRatio(_gap(text, scored))
        case "nll_delta":
            return _gap(text, scored)
    if text.kl is None or text.agree is None:
        return None
    documents = text.documents.ravel()
    match metric:
        case "kl_mean":
            return clustered_mean(text.kl.ravel().astype(float), documents)
        case "kl_p99":
            return Quantile(text.kl.ravel(), documents, 0.99)
        case "kl_p999":
            return Quantile(text.kl.ravel(), documents, 0.999)
        case "top1_agreement":
            return clustered_mean(text.agree.ravel().astype(float), documents)
    return None


def _gap(text: ScoredText, documents: np.ndarray) -> Mean:
    """Nats per token by which the candidate finds the text more surprising than the base does, token by token."""
    return clustered_mean((text.nll.astype(float) - text.nll_base).ravel(), documents)


def difference(name: str, ours: Sequence[Row], base: Sequence[Row], share: float = 1.0) -> PairedTable | Mean | None:
    """Candidate − `share` · base, paired item by item. None where it was not measured.

    Raises StageError where the two did not answer the same items.
    """
    metric = name.rpartition("/")[2]
    ours, base = sorted(ours, key=_item), sorted(base, key=_item)
    if [row["doc_hash"] for row in ours] != [row["doc_hash"] for row in base]:
        raise StageError(f"{name}: the candidate and the base did not answer the same items")
    scores, against = _scores(ours, metric), _scores(base, metric)
    if scores is None or against is None:
        return None
    if share == 1.0 and np.isin(np.concatenate([scores, against]), (0.0, 1.0)).all():
        return PairedTable.from_scores(scores.tolist(), against.tolist())
    return paired_mean(scores - share * against)


def base_value(name: str, evidence: Evidence, base: Evidence) -> float | None:
    """The base's own value of a metric, on the same data."""
    source, metric = source_of(name), name.rpartition("/")[2]
    if source in evidence.texts:
        mean = float(evidence.texts[source].nll_base.mean(dtype=float))
        return BY_DEFINITION.get(metric, math.exp(mean))
    estimate = value_of(name, base)
    return None if estimate is None else estimate.value


def relative_perplexity(name: str, evidence: Evidence) -> LogRatio | None:
    """Perplexity over the base's."""
    source = source_of(name)
    if source not in evidence.texts:
        return None
    text = evidence.texts[source]
    return LogRatio(_gap(text, text.documents[:, 1:].ravel()))


def metrics(evidence: Evidence, base: Evidence, suite: Suite) -> dict[str, MetricValue]:
    """All of the suite's metrics that were measured, with 95% intervals."""
    found = {}
    for name, higher in suite.metrics().items():
        if (estimate := value_of(name, evidence)) is not None:
            found[name] = _metric(name, estimate, higher, evidence, base)
    return found


def _metric(name: str, estimate: Estimate, higher: bool, evidence: Evidence, base: Evidence) -> MetricValue:
    facts: dict[str, object] = {}
    metric, source = name.rpartition("/")[2], source_of(name)
    if source in evidence.texts:
        reference = base_value(name, evidence, base)
        assert reference is not None
        facts = {"base": reference, "delta": estimate.value - reference}
    elif (paired := difference(name, evidence.of_task(source), base.of_task(source))) is not None:
        scores = _scores(base.of_task(source), metric)
        assert scores is not None
        facts = {"base": float(scores.mean()), "delta": paired.value, "delta_stderr": finite(paired.stderr)}
        facts |= {"delta_low": finite(paired.bound(NORMAL_95)), "delta_high": finite(paired.bound(-NORMAL_95))}
        if isinstance(paired, PairedTable):
            facts |= {"gained": paired.gained, "lost": paired.lost, "mcnemar_p": paired.mcnemar()}
    stderr = getattr(estimate, "stderr", None)
    return MetricValue(
        value=estimate.value,
        stderr=None if stderr is None else finite(stderr),
        low=finite(estimate.bound(NORMAL_95)),
        high=finite(estimate.bound(-NORMAL_95)),
        n=estimate.n,
        higher_is_better=higher,
        **facts,
    )


def _scores(rows: Sequence[Row], metric: str) -> np.ndarray | None:
    if not rows or any(metric not in row for row in rows):
        return None
    return np.array([row[metric] for row in rows], float)


def _item(row: Row) -> int:
    return row["doc_id"]


def finite(value: float) -> float | None:
    """None for a bound that the data do not give."""
    return value if math.isfinite(value) else None
