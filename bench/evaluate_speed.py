"""What our harness costs beside plain lm-eval: the same items of the embedded base, scored by both in one process.

    python bench/evaluate_speed.py [--items 100] [--rounds 3] [--task piqa]

Batch size, dtype and threads are the same. A round is ours, plain, plain, ours, so that a machine that gets slower or
faster by the minute favours neither. The bar is a ratio of at most 1.1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import time
from collections.abc import Callable
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
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--task", choices=sorted(shipped.tasks()), default="piqa")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    ours, plain = contestants(args.task, args.items)
    print(f"{args.items} items of {args.task}, batch size {BATCH}, {torch.get_num_threads()} threads; in seconds:")
    ratios = []
    for number in range(1, args.rounds + 1):
        a, b, c, d = seconds(ours), seconds(plain), seconds(plain), seconds(ours)
        ratios.append((a + d) / (b + c))
        print(f"round {number}: ours {a:.2f} {d:.2f}, plain {b:.2f} {c:.2f}, ratio {ratios[-1]:.3f}", flush=True)
    print(f"median ratio ours/plain: {statistics.median(ratios):.3f} (bar: {BAR})")


def contestants(task: str, items: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(ours, plain lm-eval), both with the model loaded, and warm. Each scores the same items once."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    store, config = Store(), shipped.tasks()[task]
    checkpoint, _ = fetch_base(load_recipe("smollm2-135m-cpu").base, store)
    name = config["metadata"]["data"]
    questions, _ = datasets.fetch(name, DataSource.model_validate(shipped.sources()[name]), store)
    config = config | {"dataset_kwargs": {"data_files": {"test": str(questions)}}}
    candidate = Candidate(
        id="base@transformers", variant="base", runtime="transformers", checkpoint=checkpoint, path=checkpoint.path,
        digest=checkpoint.digest, bytes=checkpoint.bytes, weight_bytes=checkpoint.weight_bytes, dtype="float32",
    )  # fmt: skip
    suite = Suite.model_validate({"name": "speed", "tasks": [task], "batch_size": BATCH})
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    session = runtimes.get("transformers").load(candidate, "cpu")  # sets the threads, for both
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)

    def ours() -> Any:
        return harness.run_tasks(session, tokenizer, suite, {task: questions}, {task: slice(items)})

    def plain() -> Any:
        # Like ours without lm-eval's own tasks, which it would index first, and without the bootstrap.
        manager = TaskManager(include_defaults=False)
        return simple_evaluate(
            model=lm, tasks=[dict(config)], samples={task: chosen}, task_manager=manager, bootstrap_iters=0
        )

    with contextlib.redirect_stderr(io.StringIO()):
        chosen = [row["doc_id"] for row in ours()[0]]
        plain()
    return ours, plain


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # lm-eval's progress bars
        work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
