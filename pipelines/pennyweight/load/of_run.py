"""What a run's candidates cost when they serve: the knee, and a price card of several mixes, measured once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pennyweight import benchmark, compare, datasets, machine, runtimes
from pennyweight.errors import UsageError
from pennyweight.files import write_whole
from pennyweight.load import bench
from pennyweight.load.bench import BenchReport, Load, Settings
from pennyweight.load.card import FEWEST_MIXES, at_its_best, fit
from pennyweight.load.command import Options, prepare, read_report
from pennyweight.load.report import priced
from pennyweight.load.serving import FOLDER, CandidateCost, keep
from pennyweight.load.workload import Lengths, Shape
from pennyweight.recipe import Recipe, Slo
from pennyweight.records import Price, RunRecord
from pennyweight.show import load_run
from pennyweight.store import Store

#: A report older than this is measured again.
MAX_AGE = timedelta(days=benchmark.MAX_AGE_DAYS)
#: Mixes of a card, as factors on the workload's tokens in and out: its own, more to read, more to write, both.
MIXES = ((1.0, 1.0), (2.0, 0.25), (0.25, 2.0), (1.0, 2.0))
SHORTEST = 2


def measure(
    where: str, users: int | None, price: Price | None, again: bool, store: Store, say: Callable[[str], None]
) -> list[CandidateCost]:
    """Measure the candidate of `RUN:CANDIDATE`; of a `RUN` its winner and the cheapest of its base's candidates.

    `users`: the most that the knee is looked for at; the recipe's largest concurrency by default. Reports in the run's
    folder are taken as they are, unless they are old or are to be measured `again`. What was found enters the run's
    report, and MLflow where the run was logged. Raises UsageError.
    """
    record = load_run(Path(where.partition(":")[0]))
    most = users or max(record.recipe.resolved["benchmark"]["concurrency"])
    found = [_measure(record, name, most, price or record.price, again, store, say) for name in _names(record, where)]
    if (missed := keep(record, found)) is not None:
        say(f"warning: MLflow has not got it: {missed}")
    return found


def is_run(source: str) -> bool:
    path = Path(source.partition(":")[0])
    return (path / "run.json").is_file() or path.name == "run.json"


def mix_of(where: str) -> str:
    """The tokens in and out of the run's own workload."""
    workload = load_run(Path(where.partition(":")[0])).recipe.resolved["benchmark"]["workload"]
    return f"{workload['input_tokens']}:{workload['output_tokens']}"


def _names(record: RunRecord, where: str) -> list[str]:
    _, separator, candidate = where.partition(":")
    if separator:
        return [compare.find(record, candidate).id]
    names = [name for name in (record.winner, record.base) if name]
    if not names:
        raise UsageError("the run has neither a winner nor a base that was priced", f"name a candidate: {where}:…")
    return names


def _measure(
    record: RunRecord, name: str, most: int, price: Price | None, again: bool, store: Store, say: Callable[[str], None]
) -> CandidateCost:
    folder = Path(record.run_dir) / FOLDER / re.sub(r"[^\w@.-]", "-", name)
    spec = record.recipe.resolved["benchmark"]
    slo = Slo(**spec["slo"]) if spec["slo"] else None
    own, *others = _shapes(spec["workload"]["input_tokens"], spec["workload"]["output_tokens"])
    with ExitStack() as stack:
        settings: Settings | None = None

        def report_of(shape: Shape, loads: tuple[Load, ...], knee_up_to: int | None) -> BenchReport:
            nonlocal settings
            file = folder / f"{shape.input.mean}-{shape.output.mean}.json"
            if not again and (kept := _kept(file, loads, knee_up_to, slo)):
                return kept if price is None else _priced(kept, price)
            if settings is None:
                target = Options(f"{record.run_dir}:{name}", workload=_text(own), concurrency=(most,))
                try:
                    settings = prepare(target, store, stack, say, _texts(record, store))
                except UsageError as error:
                    raise UsageError(f"{name}: {error.message}", "say how many --users") from None
            say(f"{name}: {shape}, {'the knee' if knee_up_to else ', '.join(map(str, loads))}")
            asked = replace(settings, shape=shape, loads=loads, knee_up_to=knee_up_to, slo=slo, price=price)
            found = bench.run(asked, say).report
            if found.interrupted:
                raise KeyboardInterrupt
            write_whole(file, found.model_dump_json(indent=1) + "\n")
            return found

        loads = tuple(Load(count) for count in sorted({1, most}))
        first = report_of(own, () if slo else loads, most if slo else None)
        reports, users = [first], _users(first)
        if users is not None:
            reports += [report_of(shape, (Load(users),), None) for shape in others if _fits(shape, record, name)]
    enough = users is not None and len(reports) >= FEWEST_MIXES
    fitted = fit([_at(report, users) for report in reports], price) if users and enough else None
    return CandidateCost(candidate=name, users=users, knee=first.knee, card=fitted, reports=reports)


def _texts(record: RunRecord, store: Store) -> list[str]:
    """What the run's own prompts were cut from."""
    recipe = Recipe.model_validate(record.recipe.resolved)
    names = [item.text for item in recipe.evaluate.texts().values()]
    names += [name for name, source in recipe.data.items() if source.text]
    if not names:
        raise UsageError("the run has no text to make prompts of")
    path, _ = datasets.fetch(names[0], recipe.data[names[0]], store)
    return list(datasets.texts(path))


def _shapes(into: int, out: int) -> list[Shape]:
    return [
        Shape("custom", Lengths(max(SHORTEST, round(into * more_in))), Lengths(max(SHORTEST, round(out * more_out))))
        for more_in, more_out in MIXES
    ]


def _fits(shape: Shape, record: RunRecord, name: str) -> bool:
    """Whether the model's context holds such a request."""
    candidate = compare.find(record, name).candidate
    context = runtimes.get(candidate.runtime).limits(candidate).context if candidate else None
    return context is None or shape.input.mean + shape.output.mean <= context


def _text(shape: Shape) -> str:
    return f"{shape.input.mean}:{shape.output.mean}"


def _users(report: BenchReport) -> int | None:
    """Where its tokens are cheapest, of the loads that meet the SLO."""
    if report.knee:
        return report.knee.concurrency
    return at_its_best(report).concurrency


def _at(report: BenchReport, users: int) -> BenchReport:
    """The report with that load alone, so that all mixes are compared at one."""
    every: Sequence = [*report.loads, *(report.knee.reports if report.knee else [])]
    return report.model_copy(update={"loads": [load for load in every if load.concurrency == users], "knee": None})


def _kept(file: Path, loads: tuple[Load, ...], knee_up_to: int | None, slo: Slo | None) -> BenchReport | None:
    """A report of just these loads on this machine that is not too old."""
    if not file.is_file():
        return None
    found = read_report(file)
    young = datetime.now(UTC) - datetime.fromisoformat(found.started_at) < MAX_AGE
    measured = {load.concurrency for load in found.loads}, found.knee_up_to, found.slo, found.client
    asked = {load.concurrency for load in loads}, knee_up_to, slo, machine.fingerprint()
    return found if young and measured == asked else None


def _priced(report: BenchReport, price: Price) -> BenchReport:
    """The same measurement at another price; which load is cheapest does not hang on it."""
    knee = report.knee
    if knee:
        reports = [priced(load, price) for load in knee.reports]
        best = next((load for load in reports if load.concurrency == knee.concurrency), None)
        usd = best.usd_per_1m_tokens.value if best and best.usd_per_1m_tokens else None
        knee = knee.model_copy(update={"reports": reports, "usd_per_1m_tokens": usd})
    loads = [priced(load, price) for load in report.loads]
    return report.model_copy(update={"price": price, "loads": loads, "knee": knee})
