"""What our harness adds to lm-eval: the same items of the embedded base, scored by both in turn in one process.

    python bench/evaluate_speed.py [--items 100] [--rounds 3] [--task piqa]

The two share batch size, dtype and threads. A round is ours, plain, plain, ours, so that a machine that gets slower or
faster by the minute favours neither. The bar is a ratio of at most 1.1.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pennyweight import datasets, runtimes, shipped
from pennyweight.evaluate import harness
from pennyweight.recipe import DataSource, load_recipe
from pennyweight.records import Candidate
from pennyweight.sources import fetch_base
from pennyweight.store import Store
from pennyweight.suite import Suite

BATCH = 8
BAR = 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--task", choices=sorted(shipped.tasks()), default="piqa")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    ours, plain = contestants(args.task, args.items)
    ours()
    plain()
    ratios = []
    print(f"{args.items} items of {args.task}, batch size {BATCH}, {threads()} threads; seconds")
    for number in range(1, args.rounds + 1):
        first, second, third, fourth = ours(), plain(), plain(), ours()
        ratios.append((first + fourth) / (second + third))
        print(
            f"round {number}: ours {first:.2f} {fourth:.2f}, plain {second:.2f} {third:.2f}, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    print(f"median ratio ours/plain: {statistics.median(ratios):.3f} (bar: {BAR})")


def contestants(task: str, items: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """(ours, plain lm-eval), models loaded. Each scores the items once and returns the seconds it took."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    store = Store()
    checkpoint, _ = fetch_base(load_recipe("smollm2-135m-cpu").base, store)
    name = shipped.tasks()[task]["metadata"]["data"]
    questions, _ = datasets.fetch(name, DataSource.model_validate(shipped.sources()[name]), store)
    candidate = Candidate(
        id="base@transformers", variant="base", runtime="transformers", checkpoint=checkpoint, path=checkpoint.path,
        digest=checkpoint.digest, bytes=checkpoint.bytes, weight_bytes=checkpoint.weight_bytes, dtype="float32",
    )  # fmt: skip
    suite = Suite.model_validate({"name": "speed", "tasks": [task], "batch_size": BATCH})
    session = runtimes.get("transformers").load(candidate, "cpu")  # sets the threads, for both
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    config = shipped.tasks()[task] | {"dataset_kwargs": {"data_files": {"test": str(questions)}}}
    chosen = harness.draw(suite.seed, count(questions), slice(items))

    def ours() -> Any:
        return harness.run_tasks(session, tokenizer, suite, {task: questions}, {task: slice(items)})

    def plain() -> Any:
        # Without its hundreds of own tasks, which it would look through first, and without bootstrapping, like ours.
        manager = TaskManager(include_defaults=False)
        return simple_evaluate(
            model=lm, tasks=[dict(config)], samples={task: chosen}, task_manager=manager, bootstrap_iters=0
        )

    return lambda: seconds(ours), lambda: seconds(plain)


def count(questions: Path) -> int:
    with questions.open() as lines:
        return sum(1 for _ in lines)


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def threads() -> int:
    import torch

    return torch.get_num_threads()


if __name__ == "__main__":
    main()
