"""On-policy distillation: the student writes, and learns what the teacher would have said at each of its tokens.

After Agarwal et al., On-Policy Distillation of Language Models, 2024. TRL writes, compares and trains; the budget, the
looks at held-out text and what is kept are those of any distillation here.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import DistillationConfig, DistillationTrainer

from pennyweight.distillation.state import TRL, course_of
from pennyweight.distillation.train import BEST, Lessons, Measure, Report, Training, batch_of
from pennyweight.errors import StageError

#: Steps of a training that minutes alone end.
ENDLESS = 10**9


class OnPolicy(Training, TrainerCallback, ExportableState):
    """It learns from what the student writes, in one process. TRL's trainer tells it of every step."""

    def run(self, report: Report, measure: Measure) -> Lessons:
        self._report, self._measure = report, measure
        self._course, begun = self._resume()
        self._begin(self._course, measure)
        if self._course.ended_by:
            return self._course
        trainer = _Trainer(
            model=self._student,
            teacher_model=self._teacher.model,
            args=self._arguments(),
            train_dataset=IterableDataset.from_generator(partial(endless, self._prompts(), self._settings.batch)),
            processing_class=self._tokenizer(),
            callbacks=[self],
            optimizers=(self._optimizer, None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=begun)
        return self._course

    def _arguments(self) -> DistillationConfig:
        s = self._settings
        assert s.on_policy
        arguments = DistillationConfig(
            output_dir=str(self._workspace / "trl"),
            max_steps=s.most_steps or ENDLESS,
            per_device_train_batch_size=s.batch,
            gradient_accumulation_steps=s.accumulate,
            shuffle_dataset=False,
            max_completion_length=s.length - s.on_policy.prompt,
            generation_kwargs={"temperature": s.on_policy.temperature},
            beta={"forward_kl": 0.0, "jsd": s.beta, "reverse_kl": 1.0}[s.loss],
            temperature=s.temperature,
            lr_scheduler_type="constant",  # the rate is set before each step
            max_grad_norm=1.0,
            disable_dropout=True,
            gradient_checkpointing=False,
            bf16=self._product == torch.bfloat16,
            use_cpu=self._work.device == "cpu",
            dataloader_pin_memory=self._work.device == "cuda",
            seed=self._work.seed,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",  # `on_log` asks for it
            save_total_limit=1,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several that one process sees, TRL refuses
        return arguments

    def _tokenizer(self) -> Any:
        """Of which TRL takes the tokens that end and fill a text."""
        tokenizer = AutoTokenizer.from_pretrained(self._work.student, padding_side="left")
        if tokenizer.eos_token_id is None:
            message = "distill: the tokenizer names no token that ends a text, so the student would never be done"
            raise StageError(message, "remove `on_policy`")
        return tokenizer

    def _prompts(self) -> list[list[int]]:
        s = self._settings
        assert s.on_policy
        answers = None if self._work.answers is None else np.load(self._work.answers)[s.held_out :]
        found = prompts_of(self._text.cpu().numpy(), answers, s.on_policy.prompt)
        if not found:
            raise StageError("distill: no answer begins in any window", "raise `length`, or remove `answers`")
        return found

    # --- what TRL's trainer tells -------------------------------------------------------------------------------------

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._set_rate(self._course)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **more: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        course, loss, due = self._course, logs["loss"], False
        if math.isfinite(loss) and math.isfinite(logs["grad_norm"]):
            written = round(logs["completions/mean_length"] * self._settings.batch * self._settings.accumulate)
            due = self._count_step(course, loss, written, self._report, self._measure)
        else:
            course.fail(math.nan if math.isfinite(loss) else loss)
        control.should_save = due and not course.ended_by
        control.should_training_stop = bool(course.ended_by)

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._forget_worse(self._course)

    def state(self) -> dict[str, Any]:
        """What TRL's trainer keeps of this in its checkpoints."""
        return {"args": {}, "attributes": {"course": asdict(self._course)}}

    def _resume(self) -> tuple[Lessons, str | None]:
        """The course so far, and the checkpoint that TRL's trainer goes on from."""
        folders = self._workspace.glob(TRL)
        for folder in sorted(folders, key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True):
            with contextlib.suppress(OSError, ValueError):  # cut off as it was written: the one before it is there
                course = course_of(folder)
                self._needed = BEST.format(course.kept)
                return course, str(folder)
        return Lessons(), None


class _Trainer(DistillationTrainer):
    """TRL's, given token ids instead of text."""

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}

    def compute_loss(self, *inputs: Any, **named: Any) -> torch.Tensor:
        """In the training's precision, times the squared temperature as the other losses are."""
        with self.accelerator.autocast():
            return super().compute_loss(*inputs, **named) * self.temperature**2

    def _send_telemetry(self) -> None:
        """To nobody."""


def prompts_of(windows: np.ndarray, answers: np.ndarray | None, tokens: int) -> list[list[int]]:
    """What a student goes on from: the first `tokens` of each window, token ids (windows, length); where `answers`,
    bool of that shape, says which are an answer's, up to `tokens` before each place where one begins."""
    if answers is None:
        return windows[:, :tokens].tolist()
    before = np.argwhere(answers[:, 1:] & ~answers[:, :-1])
    return [windows[row, max(0, last + 1 - tokens) : last + 1].tolist() for row, last in before]


def endless(prompts: list[list[int]], batch: int) -> Iterator[dict[str, list[int]]]:
    """Rows for TRL, in the order in which windows of text are learnt."""
    for number in itertools.count():
        for place in batch_of(number, len(prompts), batch):
            yield {"prompt": prompts[place]}
