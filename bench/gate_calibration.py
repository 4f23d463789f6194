"""Does the gate keep its word? Simulated candidates whose true loss is known, and real ones whose weights are noised.

python bench/gate_calibration.py              simulations: no model, a few minutes
python bench/gate_calibration.py --real       the embedded model against itself, and with more and more noise
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pennyweight import gate
from pennyweight.evaluate import looks
from pennyweight.evaluate.evidence import Evidence, ScoredText
from pennyweight.gate import Look
from pennyweight.recipe import Recipe, load_recipe
from pennyweight.suite import Condition, Divergence, Suite, TaskRef

MARGIN = 0.03
#: Share of questions that only one of two equally good candidates answers rightly.
DISCORDANT = 0.06
KL_BOUND = 0.10
WINDOW = 64

Draw = Callable[[np.random.Generator, int, float], Look]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=2000, help="of each row (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="rows whose condition contains this")
    parser.add_argument("--real", action="store_true", help="noise the embedded model's weights instead")
    options = parser.parse_args()
    if options.real:
        real()
    else:
        simulated(options.simulations, options.seed, options.only)


# --- simulated --------------------------------------------------------------------------------------------------------


def simulated(simulations: int, seed: int, only: str) -> None:
    print("| condition | looks | true loss | pass | fail | inconclusive | items on average |")
    print("|---|---|---|---:|---:|---:|---:|")
    for extend, (name, draw, conditions, unit) in itertools.product((False, True), scenarios()):
        if only not in name:
            continue
        first, total = sizes(draw, conditions, extend)
        recipe = make_recipe(conditions, first, extend)
        for label, loss in (("none", 0.0), ("the margin", 1.0), ("twice the margin", 2.0)):
            generator = np.random.default_rng([seed, int(loss), extend, len(conditions)])
            ended = [simulate(recipe, draw, generator, loss, first, total) for _ in range(simulations)]
            counts, used = Counter(status for status, _ in ended), np.mean([items for _, items in ended])
            shares = " | ".join(f"{counts[status] / simulations:.1%}" for status in ("pass", "fail", "inconclusive"))
            number = len(looks.sizes(first, total)) if extend else 1
            print(f"| {name} | {number} | {label} | {shares} | {used:,.0f} of {total:,} {unit} |", flush=True)


def scenarios() -> list[tuple[str, Draw, list[Condition], str]]:
    task = Condition(task="piqa", metric="acc", non_inferior_within=MARGIN)
    four = [task, *(Condition(task=name, metric="acc", non_inferior_within=MARGIN) for name in TASKS[1:])]
    return [
        ("accuracy within 0.03 of the base", draw_answers, [task], "questions"),
        ("the same of three tasks, all of them", draw_answers, four, "questions each"),
        ("mean KL at most 0.10", draw_text, [Condition(metric="kl_mean", max=KL_BOUND)], "documents"),
    ]


TASKS = ("piqa", "openbookqa", "commonsense_qa_cloze")


def sizes(draw: Draw, conditions: list[Condition], extend: bool) -> tuple[int, int]:
    """(first look, all there is): as many items as the gate asks for after a large sample without loss;
    for text, which has no such size, 120 documents."""
    if conditions[0].task is None:
        return (15, 120) if extend else (120, 120)
    pilot = 20_000
    seen = draw(np.random.default_rng(1), pilot, 0.0)
    first = total = pilot
    for _ in range(4 if extend else 1):  # what looking early costs depends on the looks, and those on the total
        recipe = make_recipe(conditions, first, extend)
        totals = dict.fromkeys([*TASKS, "divergence"], total)
        found = gate.assess(recipe, [seen], totals)[0]
        assert found.needed is not None
        total = found.needed
        first = total // 8 if extend else total
    return first, total


def make_recipe(conditions: list[Condition], first: int, extend: bool) -> Recipe:
    suite = Suite(
        name="simulated",
        divergence=Divergence(text="xsum-documents", windows=first, length=WINDOW),
        tasks=[TaskRef(task=name, limit=first) for name in TASKS],
    )
    changes = {"gate": conditions, "evaluate": suite, "on_inconclusive": "extend" if extend else "report"}
    return load_recipe("smollm2-135m-cpu").model_copy(update=changes)


def simulate(
    recipe: Recipe, draw: Draw, generator: np.random.Generator, loss: float, first: int, total: int
) -> tuple[str, int]:
    """One candidate through the gate: (how it ended, items looked at)."""
    totals = dict.fromkeys([*TASKS, "divergence"], total)
    everything = draw(generator, total, loss)
    seen: list[Look] = []
    for size in looks.sizes(first, total):
        seen.append(Look(cut(everything.ours, size), cut(everything.base, size)))
        if not gate.to_extend(recipe, seen, totals):
            break
    statuses = [found.status for found in gate.assess(recipe, seen, totals)]
    return gate.overall(statuses), size


def draw_answers(generator: np.random.Generator, total: int, loss: float) -> Look:
    """Answers to each task; `loss` in margins, the same on every task."""
    lost, gained = DISCORDANT / 2 + loss * MARGIN, DISCORDANT / 2
    ours, base = [], []
    for task in TASKS:
        kind = generator.choice(3, size=total, p=[lost, gained, 1 - lost - gained])
        ours += [row(task, index, float(which != 0)) for index, which in enumerate(kind)]
        base += [row(task, index, float(which != 1)) for index, which in enumerate(kind)]
    return Look(Evidence(rows=ours), Evidence(rows=base))


def draw_text(generator: np.random.Generator, total: int, loss: float) -> Look:
    """KL that differs from document to document; no loss is a fifth of the bound."""
    mean = {0.0: 0.2, 1.0: 1.0, 2.0: 2.0}[loss] * KL_BOUND
    documents = generator.gamma(4.0, mean / 4.0, total)
    kl = generator.exponential(documents[:, None], (total, WINDOW)).astype(np.float32)
    owner = np.repeat(np.arange(total, dtype=np.int32)[:, None], WINDOW, axis=1)
    nll = np.zeros((total, WINDOW - 1), np.float32)
    return Look(Evidence({"divergence": ScoredText(nll, nll, owner, kl, kl < 1)}), Evidence())


def row(task: str, index: int, right: float) -> dict[str, object]:
    return {"task": task, "doc_id": index, "doc_hash": str(index), "acc": right}


def cut(evidence: Evidence, size: int) -> Evidence:
    texts = {
        name: ScoredText(**{key: value[:size] for key, value in vars(text).items() if value is not None})
        for name, text in evidence.texts.items()
    }
    return Evidence(texts, [item for item in evidence.rows if item["doc_id"] < size])


# --- real -------------------------------------------------------------------------------------------------------------

#: Standard deviation of the noise, as a share of each weight matrix's own.
NOISE = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
BATCH_SIZES = (1, 4, 16)
GATE = [
    Condition(metric="kl_mean", max=0.10),
    Condition(metric="perplexity", relative_within=0.05),
    Condition(task="piqa", metric="acc_norm", non_inferior_within=0.05),
    Condition(task="openbookqa", metric="acc_norm", non_inferior_within=0.05),
]


def real() -> None:
    """The embedded model through the smoke suite's text and tasks, in transformers."""
    with tempfile.TemporaryDirectory() as folder:
        ladder = Ladder(Path(folder))
        print("| candidate | verdict | KL mean | perplexity ratio | PIQA lost, gained | OpenBookQA lost, gained |")
        print("|---|---|---:|---:|---:|---:|")
        for batch in BATCH_SIZES:
            ladder.report(f"the base itself, batch size {batch}", 0.0, batch)
        for noise in NOISE:
            ladder.report(f"weights noised by {noise:.1%}", noise, ladder.recipe.evaluate.batch_size)


class Ladder:
    """The base's evidence, and that of copies of it."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        from pennyweight import datasets, sources
        from pennyweight.evaluate import Inputs, write_reference
        from pennyweight.runtimes.transformers import compute_dtype
        from pennyweight.store import Store

        recipe = load_recipe("smollm2-135m-cpu")
        suite = recipe.evaluate.model_copy(update={"generation": None})
        self.recipe, self._folder, store = recipe.model_copy(update={"gate": GATE, "evaluate": suite}), folder, Store()
        self._base, _ = sources.fetch_base(recipe.base, store)
        self._dtype = compute_dtype(self._base, "cpu")
        self._tokenizer = AutoTokenizer.from_pretrained(self._base.path)
        data = {name: datasets.fetch(name, source, store)[0] for name, source in recipe.data.items()}
        text = suite.divergence
        windows, documents = datasets.windows(
            self._tokenizer, datasets.texts(data[text.text]), text.windows, text.length, suite.seed
        )
        items = {ref.task: slice(0, ref.limit) for ref in suite.tasks}
        tasks = {"piqa": data["piqa"], "openbookqa": data["openbookqa"]}
        self._inputs = Inputs({"divergence": windows}, {"divergence": documents}, tasks, items)
        self._reference = folder / "reference"
        self._reference.mkdir()
        session = self._load(self._base.path)
        write_reference(session, self._tokenizer, suite, self._inputs, self._reference)

    def _load(self, path: str) -> object:
        from pennyweight.records import Candidate
        from pennyweight.runtimes.transformers import TransformersSession

        base = self._base
        candidate = Candidate(
            id="copy", variant="copy", runtime="transformers", checkpoint=base, path=path, digest=base.digest,
            bytes=base.bytes, weight_bytes=base.weight_bytes, dtype=self._dtype,
        )  # fmt: skip
        return TransformersSession(candidate, "cpu")

    def report(self, name: str, noise: float, batch: int) -> None:
        from pennyweight.evaluate import estimates, evaluate

        session = self._load(self._base.path)
        if noise:
            add_noise(session.model, noise)
        suite = self.recipe.evaluate.model_copy(update={"batch_size": batch})
        files = self._folder / f"{noise}-{batch}"
        files.mkdir()
        evaluate(session, self._tokenizer, suite, self._inputs, self._reference, files, lambda: None)
        seen = Look(Evidence.read(files), Evidence.read(self._reference))
        found = gate.assess(self.recipe, [seen], {})
        metrics = estimates.metrics(seen.ours, seen.base, suite)
        flips = [metrics[f"{task}/acc_norm"] for task in ("piqa", "openbookqa")]
        cells = " | ".join(f"{metric.lost}, {metric.gained}" for metric in flips)
        verdict = gate.overall([condition.status for condition in found])
        ratio = metrics["perplexity_ratio"].value
        print(f"| {name} | {verdict} | {metrics['kl_mean'].value:.4f} | {ratio:.4f} | {cells} |", flush=True)


def add_noise(model: object, noise: float) -> None:
    """Gaussian noise on every linear layer of the decoder, the same for the same amount."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in parameter_name:
                random = torch.randn(weight.shape, generator=generator)
                weight += (random * weight.float().std() * noise).to(weight.dtype)


if __name__ == "__main__":
    main()
