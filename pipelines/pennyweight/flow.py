"""The main flow, top to bottom: recipe → checkpoints → candidates → quality and cost → verdicts → winner → registry.

A stage is a function of small frozen records to one small frozen record (`stages.py`). What one variant cannot do is
recorded as that variant's error, and the others go on.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight import gate, machine, stages
from pennyweight.benchmark.prices import price_of
from pennyweight.errors import PennyweightError, RecipeError, StoreError, TrackingError
from pennyweight.evaluate import estimates
from pennyweight.evaluate.evidence import REFERENCE_SAMPLES, SAMPLES_FOLDER, write_rows
from pennyweight.files import write_whole
from pennyweight.gate import Look
from pennyweight.plan import Plan, make_plan
from pennyweight.plan.schemes import scheme_notes
from pennyweight.progress import Progress, duration, output_to
from pennyweight.recipe import Recipe
from pennyweight.records import (
    BenchmarkReport,
    Candidate,
    CandidateResult,
    Checkpoint,
    LeverReport,
    Probe,
    QualityReport,
    RecipeRef,
    RunRecord,
    Verdict,
)
from pennyweight.stages import Run
from pennyweight.store import Store, digest_of, file_digest

if TYPE_CHECKING:
    import numpy as np

RUN_FILE = "run.json"
REPORT_FILE = "report.html"
LOG_FILE = "run.log"


def run(recipe: Recipe, recipe_path: Path, runs: Path, store: Store, say: Callable[[str], None]) -> RunRecord:
    """Run a recipe to its record, which is also written to `runs/<name>-<time>/run.json`.

    Raises RecipeError for what `plan` finds, and StoreError where nothing can be written; everything later ends in the
    record.
    """
    store.check_writable()
    plan = make_plan(recipe, store, file=str(recipe_path))
    refuse_impossible(plan)
    folder = _make_folder(runs, recipe.name)
    store.uses.belong_to(folder)
    with output_to(folder / LOG_FILE) as screen:
        progress = Progress(screen)
        current = Run(recipe, store, progress, plan, device=machine.resolve_device(recipe.device))
        progress.begin(f"{recipe.name}: about {duration(plan.seconds)} on this machine → {folder}", plan.seconds)
        try:
            record = _run_stages(current, recipe_path, folder)
        finally:
            progress.close()
    _point_latest(runs, folder)
    say(where_the_time_went(record))
    return record


def _run_stages(current: Run, recipe_path: Path, folder: Path) -> RunRecord:
    begin = time.perf_counter()
    recipe = current.recipe
    record = _blank_record(recipe, recipe_path, folder)

    base = stages.fetch_base(current)
    bases = stages.fetch_bases(current, base)
    data = stages.fetch_data(current)
    texts = stages.make_windows(current, base, data)
    texts = stages.check_overlap(current, base, data, texts)

    checkpoints = {"base": base}
    candidates: dict[str, Candidate] = {}
    seen: dict[str, list[Look]] = {}
    errors: dict[str, str] = {}
    for variant, steps in recipe.variants.items():
        with current.forgiving(variant, errors):
            checkpoints[variant] = stages.make_variant(current, variant, steps, bases, texts)
    for variant, runtime in recipe.candidates():
        candidate_id = f"{variant}@{runtime}"
        if variant in errors:
            errors[candidate_id] = errors[variant]
            continue
        with current.forgiving(candidate_id, errors):
            candidates[candidate_id] = stages.export(current, variant, runtime, checkpoints[variant], texts)

    looker = Looker(current, base, data, texts)
    for candidate_id, candidate in candidates.items():
        with current.forgiving(candidate_id, errors):
            seen[candidate_id] = looker.look(candidate)
    priced = [candidate for candidate in candidates.values() if candidate.id in seen]
    benchmark = stages.benchmark(current, priced, texts)
    errors |= {name: f"benchmark: {reason}" for name, reason in benchmark.failures.items()}

    samples = _write_samples(folder, seen)
    results = _judge(recipe, checkpoints, candidates, seen, looker.totals, samples, benchmark, errors)
    winner = gate.choose_winner(results, recipe.benchmark.decide_at)
    record = record.model_copy(
        update={
            "status": gate.run_status(results, winner),
            "base": gate.cheapest_base(results, recipe.benchmark.decide_at),
            "winner": winner,
            "price": benchmark.price,
            "ceilings": benchmark.ceilings,
            "energy_counters": benchmark.energy_counters,
            "candidates": results,
            "stages": current.times,
            "levers": _levers(current, winner, candidates, texts),
            "probe": _probe(current, looker, candidates[winner], seen[winner], texts) if winner else None,
            "notes": [*_notes(recipe, benchmark), *scheme_notes(recipe), *texts.notes],
            "seconds": time.perf_counter() - begin,
        }
    )
    write_record(record)
    record = track(record, samples, current)
    if record.tracking:
        log_unlogged(folder.parent, recipe.name)
    return _finish(record, current, begin)


def _levers(
    current: Run, winner: str | None, candidates: dict[str, Candidate], texts: stages.Texts
) -> list[LeverReport]:
    spec = current.recipe.benchmark
    if not (winner and spec.levers):
        return []
    draft = candidates.get(f"{spec.draft}@{candidates[winner].runtime}")
    return stages.levers(current, candidates[winner], draft, texts)


def _probe(current: Run, looker: Looker, winner: Candidate, seen: list[Look], texts: stages.Texts) -> Probe | None:
    """What the winner said of a little text. Without it the winner is registered all the same, and promoted by force
    alone."""
    with current.forgiving(winner.id, {}):
        return stages.probe(current, winner, looker.windows(), seen[0].ours, texts)
    return None


class Looker:
    """Looks at candidates: once at what the suite says, and again at more where the recipe lets the gate ask for it."""

    def __init__(self, run: Run, base: Checkpoint, data: dict[str, Path], texts: stages.Texts) -> None:
        self._run, self._checkpoint, self._data, self._texts = run, base, data, texts
        self._base = stages.export(run, "base", stages.REFERENCE_RUNTIME, base, texts)
        self._references: dict[tuple[int, frozenset[str]], tuple[stages.Part, stages.Reference]] = {}
        self.totals: dict[str, int] = {}
        _, reference = self._reference(0, set(run.recipe.evaluate.first_sizes()))
        self.totals = stages.totals(run, base, data, reference.totals)

    def look(self, candidate: Candidate) -> list[Look]:
        """What is seen of a candidate, and of the base on the same items, after each look that its verdict took."""
        recipe = self._run.recipe
        sources = set(recipe.evaluate.first_sizes())
        seen: list[Look] = []
        while sources:
            part, reference = self._reference(len(seen), sources)
            found = Look(stages.evaluate(self._run, candidate, self._base, part, reference), reference.evidence())
            seen.append(Look(seen[-1].ours.plus(found.ours), seen[-1].base.plus(found.base)) if seen else found)
            sources = set()
            if recipe.on_inconclusive == "extend" and candidate.variant != "base":
                sources = gate.to_extend(recipe, seen, self.totals, recipe.imitates_base(candidate.variant))
        return seen

    def windows(self) -> dict[str, np.ndarray]:
        """The text of the first look, int64 (windows, length) by name in the suite."""
        part, _ = self._reference(0, set(self._run.recipe.evaluate.first_sizes()))
        return part.inputs.windows

    def _reference(self, look: int, sources: set[str]) -> tuple[stages.Part, stages.Reference]:
        key = (look, frozenset(sources))
        if key not in self._references:
            part = stages.part_of_suite(
                self._run, self._checkpoint, self._data, self._texts, look, sources, self.totals
            )
            self._references[key] = part, stages.make_reference(self._run, self._base, part)
        return self._references[key]


def _write_samples(folder: Path, seen: dict[str, list[Look]]) -> dict[str, Path]:
    """Each candidate's answers, one file each, and the reference's to all of their questions.

    `show`, `compare`, the report and MLflow's table read them.
    """
    (folder / SAMPLES_FOLDER).mkdir(exist_ok=True)
    reference = {(row["task"], row["doc_id"]): row for found in seen.values() for row in found[-1].base.rows}
    write_rows(list(reference.values()), folder / SAMPLES_FOLDER / REFERENCE_SAMPLES)
    written = {}
    for name, found in seen.items():
        written[name] = folder / SAMPLES_FOLDER / f"{name}.jsonl"
        write_rows(found[-1].ours.rows, written[name])
    return written


def track(record: RunRecord, samples: dict[str, Path], current: Run | None = None) -> RunRecord:
    """Write the report, log the run to MLflow and register the winner. A server that fails loses nothing: the record
    says so, and logging it again does the rest."""
    from pennyweight import tracking
    from pennyweight.report import write_report

    folder = Path(record.run_dir)
    write_report(record, folder / REPORT_FILE)
    try:
        if current is None:
            logged, registered = tracking.log_run(record, folder, sample_paths=samples)
        else:
            with current.stage("track", record.name) as stage, stage.library():
                logged, registered = tracking.log_run(record, folder, sample_paths=samples)
    except PennyweightError as error:
        return record.model_copy(update={"tracking_error": error.message})
    return record.model_copy(update={"tracking": logged, "registered": registered, "tracking_error": None})


def _finish(record: RunRecord, current: Run, begin: float) -> RunRecord:
    from pennyweight.report import write_report

    record = record.model_copy(update={"stages": current.times, "seconds": time.perf_counter() - begin})
    write_record(record)
    write_report(record, Path(record.run_dir) / REPORT_FILE)
    _attach(record)
    return record


def _attach(record: RunRecord) -> None:
    """Put the final report and record into MLflow too: what was logged before could not name the registered version."""
    from pennyweight import tracking

    if record.tracking:
        with contextlib.suppress(TrackingError):
            tracking.attach_files(record.tracking, Path(record.run_dir))


def _judge(
    recipe: Recipe,
    checkpoints: dict[str, Any],
    candidates: dict[str, Candidate],
    seen: dict[str, list[Look]],
    totals: dict[str, int],
    samples: dict[str, Path],
    benchmark: BenchmarkReport,
    errors: dict[str, str],
) -> list[CandidateResult]:
    results = []
    for variant, runtime in recipe.candidates():
        name = f"{variant}@{runtime}"
        cost = benchmark.reports.get(name)
        if name in errors:
            verdict = Verdict(status="error", reasons=[errors[name]])
        elif variant == "base":
            verdict = Verdict(status="base", reasons=["the base's own candidate: what the others are compared with"])
        else:
            verdict = gate.judge(recipe, seen[name], totals, cost, recipe.imitates_base(variant))
        results.append(
            CandidateResult(
                id=name,
                variant=variant,
                runtime=runtime,
                checkpoint=checkpoints.get(variant),
                candidate=candidates.get(name),
                quality=_quality(recipe, name, seen[name][-1], samples[name]) if name in seen else None,
                cost=cost,
                verdict=verdict,
            )
        )
    return results


def _quality(recipe: Recipe, name: str, look: Look, samples: Path) -> QualityReport:
    return QualityReport(
        candidate=name,
        metrics=estimates.metrics(look.ours, look.base, recipe.evaluate),
        samples_path=str(samples),
        samples_digest=file_digest(samples),
        tokens_scored=sum(text.documents.size for text in look.ours.texts.values()),
        seconds=look.ours.seconds,
    )


def refuse_impossible(plan: Plan) -> None:
    """Raise what `plan` found: RecipeError for faults of the recipe, StoreError where the machine is too small."""
    recipe_faults = [problem for problem in plan.problems if problem not in plan.resource_problems]
    if recipe_faults:
        raise RecipeError(recipe_faults)
    if plan.resource_problems:
        first = plan.resource_problems[0]
        raise StoreError(first.message, first.hint)


def write_record(record: RunRecord) -> None:
    """Write run.json. Raises StoreError."""
    text = json.dumps(record.model_dump(mode="json", by_alias=True), indent=1) + "\n"
    write_whole(Path(record.run_dir) / RUN_FILE, text)


def where_the_time_went(record: RunRecord) -> str:
    """One line for each kind of stage, the longest first, and our own share of the whole."""
    totals: dict[str, float] = {}
    for item in record.stages:
        totals[item.stage] = totals.get(item.stage, 0.0) + item.seconds
    parts = [f"{stage} {duration(seconds)}" for stage, seconds in sorted(totals.items(), key=lambda pair: -pair[1])]
    library = sum(item.library_seconds for item in record.stages)
    own = max(record.seconds - library, 0.0)
    share = own / record.seconds if record.seconds else 0.0
    return f"{duration(record.seconds)}: {', '.join(parts)}; Pennyweight's own share {duration(own)} ({share:.1%})"


def _blank_record(recipe: Recipe, recipe_path: Path, folder: Path) -> RunRecord:
    resolved = recipe.dump()
    return RunRecord(
        name=recipe.name,
        run_dir=str(folder.resolve()),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=RecipeRef(path=str(recipe_path), digest=digest_of(resolved), resolved=resolved),
        environment=machine.environment(),
        status="running",
        price=price_of(recipe.benchmark.price),
    )


def _notes(recipe: Recipe, benchmark: BenchmarkReport) -> list[str]:
    price = benchmark.price
    elsewhere = ", which need not be that instance" if price.is_of_the_market else ""
    notes = [
        f"Priced as {price.words()}. Speed was measured on the machine that ran this recipe{elsewhere}.",
        "Dollars per million tokens count input and output tokens together, at the workload's mix of "
        f"{recipe.benchmark.workload.input_tokens} in and {recipe.benchmark.workload.output_tokens} out.",
        "Each concurrency was measured as waves: all requests start together, and the next wave when all have ended.",
    ]
    notes += [
        f"{'The base' if name == 'base' else f'Base {name}'}'s linear layers were 4-bit once (Q4_1: asymmetric, blocks "
        "of 32). Asymmetric 4-bit in blocks of 32 would find that grid again and look free; symmetric groups, or "
        "larger ones, do not."
        for name, base in recipe.all_bases.items()
        if re.search(r"Q4_1\.gguf", base.uri)
    ]
    return notes


def _make_folder(runs: Path, name: str) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        folder = runs / f"{name}-{stamp}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise StoreError(
                f"{runs} cannot be written: {error.strerror}", "name another folder with --runs"
            ) from error
        return folder
    raise StoreError(f"{runs} already has 99 runs of this second")


def _point_latest(runs: Path, folder: Path) -> None:
    link = runs / "latest"
    temporary = runs / f".latest-{folder.name}"
    temporary.symlink_to(folder.name)
    temporary.replace(link)


def log_again(record: RunRecord) -> RunRecord:
    """Log a finished run to MLflow, and register its winner, where that has not been done. Updates its files."""
    from pennyweight.report import write_report

    samples = {
        result.id: Path(result.quality.samples_path)
        for result in record.candidates
        if result.quality and Path(result.quality.samples_path).is_file()
    }
    record = track(record, samples)
    write_record(record)
    write_report(record, Path(record.run_dir) / REPORT_FILE)
    _attach(record)
    return record


def log_unlogged(runs: Path, name: str) -> None:
    """Log what earlier runs of this name could not. Never raises: it is not this run's work."""
    for path in sorted(runs.glob(f"{name}-*/{RUN_FILE}")):
        try:
            record = RunRecord.model_validate_json(path.read_text())
        except (OSError, ValueError):
            continue
        if record.tracking is None and record.tracking_error:
            log_again(record)
