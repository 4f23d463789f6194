"""What the server counts, in Prometheus' format, by vLLM's names: its dashboards and autoscalers read them as they are.

Names: https://docs.vllm.ai/en/latest/usage/metrics/ (November 2026).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

#: Pairs of team and project that are counted apart; the rest are OTHER.
MOST_PAIRS = 100
LONGEST_LABEL = 64
OTHER = "other"

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip


@dataclass
class Times:
    """When what happened to one request, in seconds of `time.perf_counter`."""

    begun: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None
    tokens: int = 0


class Metrics:
    """Of one server. `model`: the name that it serves under."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._pairs: set[tuple[str, str]] = set()
        labels = {"labelnames": ["model_name"], "registry": self.registry}

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(name, what, **labels).labels(model)

        def counter(name: str, what: str) -> Counter:
            return Counter(name, what, **labels).labels(model)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, what, buckets=buckets, **labels).labels(model)

        self._running = gauge("vllm:num_requests_running", "Requests at work.")
        self._waiting = gauge("vllm:num_requests_waiting", "Requests that wait.")
        self._cache = Gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use; 1 is all of it.", **labels)
        self._prompt_tokens = counter("vllm:prompt_tokens", "Tokens read.")
        self._generation_tokens = counter("vllm:generation_tokens", "Tokens made.")
        self._success = Counter(
            "vllm:request_success", "Requests that ended, by how.", ["model_name", "finished_reason"],
            registry=self.registry,
        )  # fmt: skip
        self._ttft = histogram("vllm:time_to_first_token_seconds", "From a request to its first token.", TTFT_BUCKETS)
        self._gap = histogram("vllm:inter_token_latency_seconds", "From a token to the next.", TOKEN_BUCKETS)
        self._tpot = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time of a request's later tokens.", TOKEN_BUCKETS
        )
        self._latency = histogram("vllm:e2e_request_latency_seconds", "From a request to its end.", LATENCY_BUCKETS)
        self._usd = Counter(
            "pennyweight_usd", "Dollars for tokens read and made, by who asked for them.",
            ["model", "team", "project"], registry=self.registry,
        )  # fmt: skip
        self._swaps = Counter(
            "pennyweight_swaps", "Changes of the model that is served.", ["result"], registry=self.registry
        )
        self._failing = Gauge(
            "pennyweight_failed_swap", "1 while the alias names a version that could not be served.",
            registry=self.registry,
        )  # fmt: skip
        for result in ("done", "failed"):
            self._swaps.labels(result)
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(model, reason)

    def watch(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Read what is at work when the page is."""
        self._running.set_function(running)
        self._waiting.set_function(waiting)

    def read_prompt(self, tokens: int) -> None:
        self._prompt_tokens.inc(tokens)

    def tokens(self, count: int, at: float, times: Times) -> None:
        """`count` tokens of a request came at once."""
        self._generation_tokens.inc(count)
        times.tokens += count
        if times.first is None or times.last is None:
            times.first = at
            self._ttft.observe(at - times.begun)
        else:
            self._gap.observe(at - times.last)
        times.last = at

    def ended(self, reason: str, times: Times) -> None:
        """A request has ended: `stop`, `length`, `abort` or `error`."""
        self._success.labels(self._model, reason).inc()
        if reason in ("stop", "length"):
            self._latency.observe(time.perf_counter() - times.begun)
            if times.tokens > 1 and times.first is not None and times.last is not None:
                self._tpot.observe((times.last - times.first) / (times.tokens - 1))

    def spent(self, usd: float, team: str, project: str) -> None:
        self._usd.labels(self._model, *self._pair(team, project)).inc(usd)

    def swapped(self, done: bool) -> None:
        self._swaps.labels("done" if done else "failed").inc()
        self._failing.set(not done)

    def page(self, cache: float | None) -> bytes:
        """`cache`: share of the KV cache in use; None where the runtime keeps no account of it."""
        if cache is not None:
            self._cache.labels(self._model).set(cache)
        return generate_latest(self.registry)

    def _pair(self, team: str, project: str) -> tuple[str, str]:
        """Labels of bounded number: each new pair is a series that lives as long as the server."""
        pair = (team, project)
        if pair in self._pairs:
            return pair
        if len(self._pairs) >= MOST_PAIRS or max(map(len, pair)) > LONGEST_LABEL:
            return OTHER, OTHER
        self._pairs.add(pair)
        return pair
