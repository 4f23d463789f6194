"""Settings of an engine that may make tokens cheaper: each off and on in turn, on one candidate at one load."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing

import numpy as np

from pennyweight import runtimes
from pennyweight.benchmark import cost, in_turn
from pennyweight.recipe import Benchmark, LeverName
from pennyweight.records import Candidate, LeverReport
from pennyweight.runtimes import Session

#: Places that a prompt moves on from round to round, so that no round's prompts are known from the one before.
SHIFT = 7


def measure(
    candidate: Candidate, settings: Benchmark, prompts: np.ndarray, device: str,
    progress: Callable[[str, float], None], draft: Candidate | None = None,
) -> list[LeverReport]:  # fmt: skip
    """Try each of `settings.levers` at `decide_at`, `decide_rounds` times off and on.

    `prompts`: token ids of real text, int64 (requests, input tokens). A lever that the candidate's runtime has not, or
    that fails, is reported as such. `draft` proposes tokens under the lever `draft`.
    """
    reports = []
    levers = settings.levers
    for index, lever in enumerate(levers):

        def tell(done: float, lever: LeverName = lever, index: int = index) -> None:
            progress(lever, (index + done) / len(levers))

        reports.append(_try(lever, candidate, settings, prompts, device, tell, draft))
    return reports


def _try(
    lever: LeverName, candidate: Candidate, settings: Benchmark, prompts: np.ndarray, device: str,
    tell: Callable[[float], None], draft: Candidate | None,
) -> LeverReport:  # fmt: skip
    kind = runtimes.get(candidate.runtime)
    report = LeverReport(lever=lever, candidate=candidate.id, concurrency=settings.decide_at)
    if lever not in kind.levers:
        return report.model_copy(update={"reason": f"{candidate.runtime} does not have it"})
    if lever == "draft" and draft is None:
        return report.model_copy(update={"reason": "the variant that drafts was not made for this runtime"})
    try:
        with ExitStack() as stack:
            off = stack.enter_context(closing(kind.load(candidate, device)))
            on = stack.enter_context(closing(kind.levers[lever](candidate, device, draft)))
            seconds = _seconds({"off": off, "on": on}, settings, prompts, tell)
    except Exception as error:
        return report.model_copy(update={"reason": f"{type(error).__name__}: {error}"})
    saving = cost.saving_of(cost.log_ratios(seconds["on"], seconds["off"]))
    kept = saving.low > 0
    reason = "its saving's lower bound is above 0" if kept else "its saving's lower bound is not above 0"
    return report.model_copy(update={"saving": saving, "kept": kept, "reason": reason})


def _seconds(
    sessions: dict[str, Session], settings: Benchmark, prompts: np.ndarray, tell: Callable[[float], None]
) -> dict[str, list[float]]:
    """Seconds of every round's wave, by session, in the order of the benchmark's turns. Round −1 warms up."""
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    rounds = settings.decide_rounds
    for number in range(-1, rounds):
        tell((number + 1) / (rounds + 1))
        ids = prompts_of_round(prompts[: settings.decide_at], number, settings.workload.shared_prefix)
        for name in in_turn(list(sessions), number):
            wave = sessions[name].generate(ids, settings.workload.output_tokens)
            if number >= 0:
                taken[name].append(wave.ttft + sum(wave.steps))
    return taken


def prompts_of_round(prompts: np.ndarray, number: int, shared_prefix: int) -> np.ndarray:
    """The prompts, each begun `number` · `SHIFT` places later and wrapped around, behind the prefix that all share."""
    own = np.roll(prompts[:, shared_prefix:], -number * SHIFT, axis=1)
    return np.concatenate([prompts[:, :shared_prefix], own], axis=1)
