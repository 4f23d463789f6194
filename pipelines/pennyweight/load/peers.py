"""Our measurements in the shape that other tools' users read."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np

from pennyweight.load.report import LoadReport
from pennyweight.load.requests import Served


def vllm_bench(
    report: LoadReport, served: list[Served], model: str, tokenizer: str | None, when: datetime
) -> dict[str, Any]:
    """The JSON that `vllm bench serve --save-result --save-detailed` writes for one load. Times in lists: seconds."""
    good = [item for item in served if item.good]
    lists = {
        "ttft": [item.ttft * 1000 for item in good],
        "tpot": [item.tpot * 1000 for item in good if item.tpot is not None],
        "itl": [float(gap) * 1000 for item in good for gap in np.diff(item.arrivals)],
        "e2el": [item.latency * 1000 for item in good],
    }
    result: dict[str, Any] = {
        "date": when.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai",
        "backend": "openai",
        "label": None,
        "model_id": model,
        "tokenizer_id": tokenizer or model,
        "num_prompts": len(served),
        "request_rate": "inf" if report.rate is None else report.rate,
        "burstiness": 1.0,
        "max_concurrency": report.concurrency,
        "duration": report.seconds,
        "completed": len(good),
        "failed": len(served) - len(good),
        "total_input_tokens": sum(item.input_tokens for item in good),
        "total_output_tokens": sum(item.output_tokens for item in good),
        "request_throughput": report.requests_per_second,
        "request_goodput": report.goodput,
        "output_throughput": report.output_tokens_per_second.value,
        "total_token_throughput": report.total_tokens_per_second.value,
        "input_lens": [item.input_tokens for item in served],
        "output_lens": [item.output_tokens for item in served],
        "ttfts": [item.ttft if item.good else 0.0 for item in served],
        "itls": [np.diff(item.arrivals).tolist() for item in served],
        "errors": [item.message for item in served],
    }
    for name, values in lists.items():
        for statistic, value in _statistics(values).items():
            result[f"{statistic}_{name}_ms"] = value
    return result


def _statistics(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    p50, p90, p95, p99 = (float(value) for value in np.percentile(values, [50, 90, 95, 99]))
    spread = {"mean": float(np.mean(values)), "median": p50, "std": float(np.std(values))}
    return spread | {"p90": p90, "p95": p95, "p99": p99}


#: Columns of a table with a row for each request; times in seconds from the first request's.
COLUMNS = ("due", "sent", "first_token", "ended", "input_tokens", "output_tokens", "fault", "message")


def rows(served: list[Served]) -> list[tuple[Any, ...]]:
    """A row of `COLUMNS` for each request, in the order that they were due."""
    ordered = sorted(served, key=lambda item: item.due)
    begin = ordered[0].due if ordered else 0.0
    return [
        (
            round(item.due - begin, 6), round(item.sent - begin, 6),
            round(item.arrivals[0] - begin, 6) if item.arrivals else None, round(item.ended - begin, 6),
            item.input_tokens, item.output_tokens, item.fault, item.message,
        )
        for item in ordered
    ]  # fmt: skip
