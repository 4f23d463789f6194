"""Data sets and the token windows cut from them: to calibrate on, to judge on, to prompt with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight import datasets, overlap, runtimes, shipped
from pennyweight.errors import StageError
from pennyweight.recipe import Distill, Recipe, Recover, names_of
from pennyweight.records import Checkpoint
from pennyweight.stages.run import Run
from pennyweight.store import Entry, file_digest
from pennyweight.suite import GENERATION, TaskRef

if TYPE_CHECKING:
    import numpy as np

#: Windows, and the tokens of each, that an exported file is compared with its checkpoint on: enough that one odd token
#: does not decide.
PARITY_WINDOWS = 4
PARITY_LENGTH = 256
ANSWERS = "answers.npy"


@dataclass(frozen=True)
class Texts:
    """Token windows on disk, int64 (windows, length), by what they are for."""

    folders: dict[str, Path]
    digests: dict[str, str]
    failures: dict[str, str] = field(default_factory=dict)
    """Why a variant's calibration text cannot be used; that variant's error and nobody else's."""
    notes: list[str] = field(default_factory=list)

    def load(self, name: str) -> np.ndarray | None:
        import numpy as np

        return np.load(self.folders[name] / "windows.npy") if name in self.folders else None

    def answers(self, name: str) -> np.ndarray | None:
        """Which tokens are an answer's, bool (windows, length); None for plain text."""
        import numpy as np

        path = self.folders[name] / ANSWERS if name in self.folders else None
        return np.load(path) if path and path.exists() else None

    def documents(self, name: str) -> np.ndarray:
        """The document that each token comes from, int32 (windows, length)."""
        import numpy as np

        return np.load(self.folders[name] / "documents.npy")


def fetch_data(run: Run) -> dict[str, Path]:
    """All data sets of the recipe as JSONL on disk, by name."""
    with run.stage("data", ", ".join(run.recipe.data) or "none") as stage:
        found = {}
        for name, source in run.recipe.data.items():
            found[name], reused = datasets.fetch(name, source, run.store)
            stage.reused |= reused
    return found


def make_windows(run: Run, base: Checkpoint, data: dict[str, Path]) -> Texts:
    """Cut the texts that are calibrated on, evaluated on and used as prompts into windows of the base's tokens."""
    recipe = run.recipe
    wanted: dict[str, tuple[str | list[str], int, int, int]] = {}  # purpose → (data sets, windows, length, seed)
    for variant, steps in recipe.variants.items():
        for index, step in enumerate(steps):
            if step.calibrate:
                c = step.calibrate
                wanted[calibration_name(variant, index)] = (c.source, c.samples, c.length, recipe.seed)
    suite = recipe.evaluate
    for name, item in suite.texts().items():
        wanted[text_name(name)] = (item.text, item.windows, item.length, suite.seed)
    if suite.generation:
        item = suite.generation
        wanted[text_name(GENERATION)] = (item.text, item.prompts, item.input_tokens, suite.seed + 3)
    known = [item.text for item in suite.texts().values()] + ([suite.generation.text] if suite.generation else [])
    known += sorted(name for name, source in recipe.data.items() if source.text)
    if known:
        shape = recipe.benchmark.workload
        parity_length = min(PARITY_LENGTH, suite.divergence.length) if suite.divergence else PARITY_LENGTH
        wanted["parity"] = (known[0], PARITY_WINDOWS, parity_length, suite.seed + 1)
        wanted["prompts"] = (known[0], max(recipe.benchmark.concurrency), shape.input_tokens, recipe.seed + 2)
    folders, digests, failures = {}, {}, {}
    with run.stage("data", "token windows") as stage:
        stage.reused = True
        for purpose, (sources, count, length, seed) in wanted.items():
            try:
                entry = _windows_of(run, base, {name: data[name] for name in names_of(sources)}, count, length, seed)
            except StageError as error:
                if not purpose.startswith("calibration/"):
                    raise
                failures[purpose] = f"{_key(recipe, purpose)}: {_for_learners(error, recipe, purpose)}"
                continue
            stage.reused &= entry.reused
            folders[purpose] = entry.files
            digests[purpose] = entry.record["digest"]
    return Texts(folders, digests, failures)


def _windows_of(run: Run, base: Checkpoint, texts: dict[str, Path], count: int, length: int, seed: int) -> Entry:
    """Windows of the texts, one of each in turn; of several the seed draws the same ones as of each alone."""
    each = -(-count // len(texts))
    parts = []
    for name, text in texts.items():
        try:
            parts.append(cut_windows(run, base, text, each, length, seed))
        except datasets.TooFewWindowsError as error:
            raise (error.in_turn(name, len(texts)) if len(texts) > 1 else error) from None
    if len(parts) == 1:
        return parts[0]

    def build(files: Path) -> dict[str, Any]:
        import numpy as np

        answers = all((part.files / ANSWERS).exists() for part in parts)
        for name in ("windows.npy", "documents.npy", *([ANSWERS] if answers else [])):
            in_turn = np.stack([np.load(part.files / name) for part in parts], axis=1)
            if name == "documents.npy":  # numbers of their own
                in_turn = in_turn * len(parts) + np.arange(len(parts), dtype=in_turn.dtype)[:, None]
            np.save(files / name, in_turn.reshape(-1, length)[:count])
        return {"digest": file_digest(files / "windows.npy")}

    digests = [part.record["digest"] for part in parts]
    return run.store.get_or_build("windows", {"in turn": digests, "count": count}, build)


def cut_windows(run: Run, base: Checkpoint, text: Path, count: int, length: int, seed: int) -> Entry:
    """`count` windows of `length` tokens of a text, in the order that `seed` draws them; stored."""

    def build(files: Path) -> dict[str, Any]:
        import numpy as np

        documents = datasets.documents(text)
        cut, owners, answers = datasets.packed(load_tokenizer(base), documents, count, length, seed)
        np.save(files / "windows.npy", cut)
        np.save(files / "documents.npy", owners)
        if not isinstance(documents[0], str):
            np.save(files / ANSWERS, answers)
        return {"digest": file_digest(files / "windows.npy")}

    return run.store.get_or_build(
        "windows", _text_key(base, text) | {"count": count, "length": length, "seed": seed}, build
    )


def _text_key(base: Checkpoint, text: Path) -> dict[str, Any]:
    return {
        "version": datasets.WINDOWS_VERSION,
        "text": file_digest(text),
        "tokenizer": tokenizer_digest(Path(base.path)),
        "libraries": runtimes.versions(("tokenizers", "numpy")),
    }


def totals(run: Run, base: Checkpoint, data: dict[str, Path], items: dict[str, int]) -> dict[str, int]:
    """Source of evidence → how many windows, items or prompts the data have; `items` are the tasks'. Counted only where
    more may be drawn."""
    suite = run.recipe.evaluate
    if run.recipe.on_inconclusive != "extend":
        return {}
    lengths = {name: (item.text, item.length) for name, item in suite.texts().items()}
    if suite.generation:
        lengths[GENERATION] = (suite.generation.text, suite.generation.input_tokens)
    found = dict(items)
    with run.stage("data", "items to draw from") as stage:
        stage.reused = True
        for name, (text, length) in lengths.items():

            def build(_: Path, text: str = text, length: int = length) -> dict[str, Any]:
                return {"available": datasets.available(load_tokenizer(base), datasets.texts(data[text]), length)}

            entry = run.store.get_or_build("available", _text_key(base, data[text]) | {"length": length}, build)
            stage.reused &= entry.reused
            found[name] = entry.record["available"]
    return found


def check_overlap(run: Run, base: Checkpoint, data: dict[str, Path], texts: Texts) -> Texts:
    """Refuse variants that calibrate on what they are judged on; where their recipe allows it, note it instead."""
    calibration = [name for name in texts.folders if name.startswith("calibration/")]
    if not calibration:
        return texts
    suite = run.recipe.evaluate
    judged: dict[str, str] = {name: texts.digests[name] for name in texts.digests if name.startswith("text/")}
    judged |= {ref.task: file_digest(data[task_data(ref)]) for ref in suite.tasks if ref.origin == "pennyweight"}
    failures, notes = dict(texts.failures), list(texts.notes)
    with run.stage("data", "overlap check") as stage:
        stage.reused = True
        for name in calibration:
            for against, digest in judged.items():

                def build(_: Path, name: str = name, against: str = against) -> dict[str, Any]:
                    evaluation = texts.load(against)
                    if evaluation is None:
                        ref = next(ref for ref in suite.tasks if ref.task == against)
                        evaluation = datasets.question_tokens(load_tokenizer(base), data[task_data(ref)])
                    spell = load_tokenizer(base).decode
                    found = overlap.measure(texts.load(name), evaluation, decode=spell)
                    return found.model_dump(mode="json")

                inputs = {"version": 3, "calibration": texts.digests[name], "evaluation": digest}
                entry = run.store.get_or_build("overlap", inputs, build)
                stage.reused &= entry.reused
                variant, _, index = name.removeprefix("calibration/").rpartition("/")
                calibrate = run.recipe.variants[variant][int(index)].calibrate
                try:
                    found = overlap.Overlap.model_validate(entry.record)
                    overlap.refuse(found, variant, _key(run.recipe, name))
                except StageError as error:
                    if calibrate and calibrate.allow_overlap:
                        notes.append(f"Allowed by the recipe: {error.message}")
                    else:
                        failures[name] = str(error)
    return replace(texts, failures=failures, notes=notes)


def calibration_name(variant: str, index: int) -> str:
    return f"calibration/{variant}/{index}"


def _key(recipe: Recipe, calibration: str) -> str:
    """The recipe's key that names the text of a step, from its `calibration_name`."""
    variant, _, index = calibration.removeprefix("calibration/").rpartition("/")
    step = recipe.variants[variant][int(index)]
    return f"variants.{variant}.{index}.{step.kind}.{step.text_key}"


def _for_learners(error: StageError, recipe: Recipe, calibration: str) -> StageError:
    """The same error; of a step that can read its text more than once with what it should ask for."""
    variant, _, index = calibration.removeprefix("calibration/").rpartition("/")
    step = recipe.variants[variant][int(index)]
    if not (isinstance(error, datasets.TooFewWindowsError) and isinstance(step, Distill | Recover)):
        return error
    learnt = error.possible - step.held_out
    hint = "lower `length` or `held_out`, or name a larger text"
    if learnt >= step.batch:
        hint = f"`windows: {learnt}` reads what there is again and again; or name a larger text"
    return StageError(f"{error.message}, {step.held_out} of them held out", hint)


def text_name(name: str) -> str:
    return f"text/{name}"


def task_data(ref: TaskRef) -> str:
    return shipped.tasks()[ref.task]["metadata"]["data"]


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Raises SourceError where the checkpoint has no tokenizer that can be read."""
    from transformers import AutoTokenizer

    from pennyweight.sources import vocabulary

    try:
        return AutoTokenizer.from_pretrained(checkpoint.path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise vocabulary.no_tokenizer(Path(checkpoint.path), error) from None


def tokenizer_digest(folder: Path) -> list[list[str]]:
    return [[path.name, file_digest(path)] for path in sorted(folder.glob("token*")) if path.is_file()]
