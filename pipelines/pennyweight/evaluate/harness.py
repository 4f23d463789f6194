"""lm-eval's tasks on our runtimes: lm-eval makes the prompts and the scores, a `Session` gives the log-likelihoods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pennyweight import shipped
from pennyweight.recipe import Suite
from pennyweight.runtimes import Session


def run_tasks(session: Session, tokenizer: Any, suite: Suite, data: dict[str, Path]) -> list[dict[str, Any]]:
    """Score the suite's tasks. `data`: task name → JSONL of its questions.

    Returns one row a sample: task, doc_id, doc_hash, target, log-likelihoods of the choices, and each metric's score.
    The same suite draws the same samples for every candidate.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model=_adapter(session, tokenizer, suite.batch_size),
        tasks=[_config(ref.task, data[ref.task]) for ref in suite.tasks],
        samples=draw_samples(suite, data),
        num_fewshot=0,
        bootstrap_iters=0,
        log_samples=True,
        task_manager=TaskManager(include_defaults=False),
        random_seed=suite.seed,
        numpy_random_seed=suite.seed,
        torch_random_seed=suite.seed,
    )
    rows = []
    for ref in suite.tasks:
        names = [metric["metric"] for metric in shipped.tasks()[ref.task]["metric_list"]]
        for sample in sorted(results["samples"][ref.task], key=lambda sample: sample["doc_id"]):
            rows.append(
                {
                    "task": ref.task,
                    "doc_id": sample["doc_id"],
                    "doc_hash": sample["doc_hash"],
                    "target": sample["target"],
                    "loglikelihoods": [float(response[0]) for response in sample["filtered_resps"]],
                    **{name: float(sample[name]) for name in names},
                }
            )
    return rows


def draw_samples(suite: Suite, data: dict[str, Path]) -> dict[str, list[int]]:
    """Seeded choice of items for each task, in rising order."""
    drawn = {}
    for ref in suite.tasks:
        with data[ref.task].open() as lines:
            total = sum(1 for _ in lines)
        count = min(ref.limit or total, total)
        order = np.random.default_rng([suite.seed, total]).permutation(total)
        drawn[ref.task] = sorted(int(index) for index in order[:count])
    return drawn


def _config(task: str, path: Path) -> dict[str, Any]:
    config = dict(shipped.tasks()[task])
    config["dataset_kwargs"] = {"data_files": {"test": str(path)}}
    return config


def _adapter(session: Session, tokenizer: Any, batch_size: int) -> Any:
    """An lm-eval model around a session. Made here because lm-eval takes seconds to import."""
    import torch
    from lm_eval.api.model import TemplateLM

    class SessionLM(TemplateLM):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return tokenizer.encode(string, **given)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            order = sorted(range(len(requests)), key=lambda i: (-len(requests[i][1] + requests[i][2]), requests[i][1:]))
            answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            with torch.inference_mode():
                for start in range(0, len(order), batch_size):
                    chosen = order[start : start + batch_size]
                    for index, answer in zip(chosen, self._score([requests[i] for i in chosen])):
                        answers[index] = answer
            return answers

        def _score(self, batch: list[Any]) -> list[tuple[float, bool]]:
            # The last token of a sequence is only ever predicted, never read.
            inputs = [context + continuation[:-1] for _, context, continuation in batch]
            ids = np.zeros((len(batch), max(map(len, inputs))), np.int64)
            for row, tokens in enumerate(inputs):
                ids[row, : len(tokens)] = tokens
            logits = session.logits(ids)
            answers = []
            for row, (_, _, continuation) in enumerate(batch):
                end = len(inputs[row])
                scores = torch.log_softmax(logits[row, end - len(continuation) : end].float().cpu(), -1)
                target = torch.tensor(continuation)
                likelihood = scores.gather(-1, target[:, None]).sum().item()
                answers.append((likelihood, bool((scores.argmax(-1) == target).all())))
            return answers

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            windows = [(("", ""), [self.prefix_token_id], self.tok_encode(item.args[0])) for item in requests]
            return [likelihood for likelihood, _ in self._loglikelihood_tokens(windows)]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise AssertionError("the schema lets no generation task through")

    return SessionLM()
