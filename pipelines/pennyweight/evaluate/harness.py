"""lm-eval's tasks on our runtimes: lm-eval makes the prompts and the scores, a `Session` gives the log-likelihoods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight import shipped
from pennyweight.errors import StageError
from pennyweight.evaluate.evidence import Row
from pennyweight.runtimes import Session
from pennyweight.suite import Suite, TaskRef

#: Called with the part of the requests that is done.
Progress = Callable[[float], None]


def run_tasks(
    session: Session,
    tokenizer: Any,
    suite: Suite,
    data: dict[str, Path],
    items: dict[str, slice],
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[list[Row], dict[str, int]]:
    """Score items of the suite's tasks. `data`: task name → JSONL of its questions, for tasks of ours. `items`: task
    name → which of its items, in the order that the suite's seed draws them.

    Returns one row an item (task, doc_id, doc_hash, target, what was asked and answered, and each metric's score) and
    how many items each task has. Raises StageError where a task's data cannot be had or score nothing an item.
    """
    from lm_eval.evaluator import simple_evaluate

    chosen = [ref for ref in suite.tasks if ref.task in items]
    if not chosen:
        return [], {}
    manager, configs = _tasks(chosen, data)
    totals = {ref.task: _count(manager, config, ref) for ref, config in zip(chosen, configs)}
    results = simple_evaluate(
        model=_adapter(session, tokenizer, suite.batch_size, progress),
        tasks=configs,
        samples={task: draw(suite.seed, totals[task], items[task]) for task in totals},
        bootstrap_iters=0,
        log_samples=True,
        task_manager=manager,
        random_seed=suite.seed,
        numpy_random_seed=suite.seed,
        torch_random_seed=suite.seed,
        fewshot_random_seed=suite.seed,
        device=device,
    )
    rows = []
    for ref in chosen:
        samples = results["samples"][ref.task]
        first = samples[0]["filter"]  # a task may score each answer in several ways; the first is its own
        chosen_filter = (sample for sample in samples if sample["filter"] == first)
        rows += [_row(ref.task, sample) for sample in sorted(chosen_filter, key=lambda sample: sample["doc_id"])]
    return rows, totals


def draw(seed: int, total: int, which: slice) -> list[int]:
    """The items of one look, in rising order. Looks of one seed never overlap, and begin with the same items."""
    order = np.random.default_rng([seed, total]).permutation(total)
    return sorted(int(index) for index in order[which])


def _tasks(refs: list[TaskRef], data: dict[str, Path]) -> tuple[Any, list[Any]]:
    from lm_eval.tasks import TaskManager

    foreign = any(ref.origin == "lm-eval" for ref in refs)
    manager = TaskManager(include_defaults=foreign)
    configs = [ref.task if ref.origin == "lm-eval" else _config(ref.task, data[ref.task]) for ref in refs]
    unknown = [ref.task for ref in refs if ref.origin == "lm-eval" and ref.task not in manager.all_subtasks]
    if unknown:
        raise StageError(f"lm-eval has no task {', '.join(unknown)}", "`lm-eval ls tasks` lists those that it has")
    return manager, configs


def _config(task: str, path: Path) -> dict[str, Any]:
    config = dict(shipped.tasks()[task])
    config["dataset_kwargs"] = {"data_files": {"test": str(path)}}
    return config


def _count(manager: Any, config: Any, ref: TaskRef) -> int:
    """Items of a task. Loads its data, which for lm-eval's own tasks lie on a hub."""
    from lm_eval.tasks import get_task_dict

    try:
        task = get_task_dict([config], manager)[ref.task]
        return len(list(task.eval_docs))
    except Exception as error:
        if ref.origin == "pennyweight":
            raise
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise StageError(
            f"the data of lm-eval's task {ref.task!r} cannot be had: {reason}",
            "they come from a model hub; without one, use the tasks of evals/tasks",
        ) from error


def _row(task: str, sample: dict[str, Any]) -> Row:
    names = sample["metrics"]
    scores = {name: sample[name] for name in names}
    if odd := [name for name, value in scores.items() if not isinstance(value, bool | int | float | np.generic)]:
        raise StageError(f"{task}: {', '.join(odd)} of lm-eval is no score of a single question")
    arguments = [list(item.values()) if isinstance(item, dict) else list(item) for item in _arguments(sample)]
    row = {
        "task": task,
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "target": sample["target"] if isinstance(sample["target"], int | str) else str(sample["target"]),
        "prompt": str(arguments[0][0]),
        **{name: float(value) for name, value in scores.items()},
    }
    responses = sample["filtered_resps"]
    if isinstance(responses[0], str):
        return row | {"answer": responses[0]}
    return row | {
        "choices": [str(argument[1]).strip() for argument in arguments],
        "loglikelihoods": [float(response[0]) for response in responses],
    }


def _arguments(sample: dict[str, Any]) -> list[Any]:
    found = sample["arguments"]
    return list(found.values()) if isinstance(found, dict) else list(found)


def _adapter(session: Session, tokenizer: Any, batch_size: int, progress: Progress | None) -> Any:
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

        @property
        def prefix_token_id(self) -> int:
            begin = tokenizer.bos_token_id
            return self.eot_token_id if begin is None else begin

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            _check_lengths(requests, session.context)
            # The last token is only ever predicted, never read, so choices that differ in it alone are read once.
            readers: dict[tuple[int, ...], list[int]] = {}
            for index, (_, context, continuation) in enumerate(requests):
                readers.setdefault((*context, *continuation[:-1]), []).append(index)
            order = sorted(readers, key=lambda tokens: (-len(tokens), tokens))
            answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            done, whole = 0, sum(map(len, order))
            with torch.inference_mode():
                for start in range(0, len(order), batch_size):
                    batch = order[start : start + batch_size]
                    for tokens, logits in zip(batch, session.logits(_padded(batch))):
                        for index in readers[tokens]:
                            answers[index] = self._score(logits[: len(tokens)], requests[index][2])
                    done += sum(map(len, batch))
                    if progress:
                        progress(done / whole)
            return answers

        def _score(self, logits: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
            """(log-likelihood of the continuation, whether it is the greedy one) from the logits of what was read."""
            scores = torch.log_softmax(logits[-len(continuation) :].float().cpu(), -1)
            target = torch.tensor(continuation)
            likelihood = scores.gather(-1, target[:, None]).sum().item()
            return likelihood, bool((scores.argmax(-1) == target).all())

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            windows = [(("", ""), [self.prefix_token_id], self.tok_encode(item.args[0])) for item in requests]
            return [likelihood for likelihood, _ in self._loglikelihood_tokens(windows)]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """Greedy; prompts of one length are served together, since a wave takes no padding."""
            prompts = [self.tok_encode(item.args[0]) for item in requests]
            lengths = [int(item.args[1].get("max_gen_toks", 256)) for item in requests]
            answers = [""] * len(requests)
            groups: dict[tuple[int, int], list[int]] = {}
            for index, prompt in enumerate(prompts):
                groups.setdefault((len(prompt), lengths[index]), []).append(index)
            done = 0
            for (_, new_tokens), members in groups.items():
                for start in range(0, len(members), batch_size):
                    chosen = members[start : start + batch_size]
                    ids = np.array([prompts[index] for index in chosen], np.int64)
                    for index, tokens in zip(chosen, session.generate(ids, new_tokens, stop=True).tokens.tolist()):
                        answers[index] = self._until(tokens, requests[index].args[1].get("until") or [])
                    done += len(chosen)
                    if progress:
                        progress(done / len(requests))
            return answers

        def _until(self, tokens: list[int], stops: list[str] | str) -> str:
            if tokenizer.eos_token_id in tokens:
                tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
            text = tokenizer.decode(tokens)
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.partition(stop)[0] if stop else text
            return text

    return SessionLM()


def _padded(sequences: list[tuple[int, ...]]) -> np.ndarray:
    """Token ids, int64 (sequences, longest), padded on the right."""
    ids = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens)] = tokens
    return ids


def _check_lengths(requests: Any, context: int | None) -> None:
    """lm-eval cuts what is too long from the left, silently; a question that loses its beginning is another
    question."""
    longest = max((len(request[1]) + len(request[2]) - 1 for request in requests), default=0)
    if context is not None and longest > context:
        raise StageError(
            f"a question is {longest} tokens long, and the model knows {context} positions",
            "leave the task out, or take a model with a longer context",
        )
