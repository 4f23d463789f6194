"""The training that distills: AdamW on all of a student's weights, on one device or several, resumed where it was
killed.

Weights learn in float32 and are computed with in bfloat16 where the machine has it. What one process learns in a batch,
several learn of their shares of it together.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pennyweight.distillation.cache import Cached, last_states, select
from pennyweight.distillation.losses import IGNORED, Live, Objective, Target, chunked_loss
from pennyweight.distillation.teachers import CachedTeacher, LiveTeacher, head_of
from pennyweight.distillation.trunk import beginning_with, freeze
from pennyweight.healing.loss import relative_distance
from pennyweight.healing.train import Course, schedule
from pennyweight.quantization import decoder
from pennyweight.recipe import Distill
from pennyweight.records import Checkpoint

#: Seconds of training after which the next look also saves the state that a killed run goes on from.
SAVE_SECONDS = 60.0
COURSE = "course.json"
STATE = "state-{:08d}.pt"
BEST = "best-{:08d}"
Report = Callable[[str, float], None]
Measure = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Work:
    """All that a training needs, as paths and settings, so that other processes can share it."""

    teacher: Checkpoint
    """Whose vocabulary and predictions the student learns."""
    student: str
    """Folder of the checkpoint that it begins as."""
    dtype: str
    """What the student is stored in."""
    windows: str
    """Token ids, int64 (windows, tokens), a .npy file: first those held out, then those to learn on."""
    settings: Distill
    device: str
    workspace: str
    """Where the state and the best weights are kept."""
    cache: str | None = None
    """Folder of what the teacher says to the windows to learn on; None: it is asked."""
    answers: str | None = None
    """Which tokens are an answer's, bool (windows, tokens), a .npy file; given where those alone are learnt."""
    seed: int = 0
    """Of what is drawn as it trains."""
    shared: int = 0
    """The student's first blocks that are the teacher's, and do not learn."""

    def dump(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        records = {"teacher": self.teacher.model_dump(mode="json"), "settings": self.settings.model_dump(mode="json")}
        return values | records

    def paths(self) -> list[str]:
        """What all processes must see."""
        optional = [path for path in (self.cache, self.answers) if path]
        return [self.teacher.path, self.student, self.windows, *optional]

    @classmethod
    def load(cls, values: dict[str, Any]) -> Work:
        teacher = Checkpoint.model_validate(values["teacher"])
        return cls(**values | {"teacher": teacher, "settings": Distill.model_validate(values["settings"])})


@dataclass
class Lessons(Course):
    """A course whose best state lies on disk."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean loss of the steps since the last look)."""
    since: list[float] = field(default_factory=list)
    kept: int = 0
    """The step that the best state is of."""

    def fail(self, loss: float) -> None:
        """End at a step whose loss or gradient is not finite."""
        self.ended_by = f"a loss of {loss} at step {self.steps + 1}"

    def most_spent(self, budget: Distill) -> float:
        """Fraction of the limit that is nearest."""
        return max(self.spent(budget).values())

    @classmethod
    def load(cls, values: dict[str, Any]) -> Lessons:
        curves = {name: [tuple(point) for point in values[name]] for name in ("curve", "losses")}
        return cls(**values | curves)


class Pupil(torch.nn.Module):
    """A student with its loss, so that whoever shares the gradients sees one module."""

    def __init__(self, student: Any, objective: Objective, hidden: float, product: torch.dtype, shared: int = 0):
        """`shared` are its first blocks that are the teacher's, too."""
        super().__init__()
        self.student, self._objective, self._hidden, self._product = student, objective, hidden, product
        self._trunk = list(decoder.blocks(student)[1][:shared])

    def forward(self, ids: torch.Tensor, target: Target | None, chosen: torch.Tensor | None) -> torch.Tensor:
        """The summed loss of token ids (windows, tokens), in nats: of the `chosen` positions, bool (windows × tokens),
        which `target` is of too."""
        states = select(self.states(ids, target), chosen)
        head = self.student.get_output_embeddings().weight
        labels = select(torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED).flatten(), chosen)
        loss = chunked_loss(states, head, target, self._objective, labels, self._product)
        if self._hidden:
            assert isinstance(target, Live)
            loss = loss + self._hidden * relative_distance(states, target.states)
        return loss

    def states(self, ids: torch.Tensor, target: Target | None) -> torch.Tensor:
        """What the head is applied to, (windows × tokens, width)."""
        with beginning_with(target.trunk if isinstance(target, Live) else None, self._trunk):
            return last_states(self.student, ids)


def train(
    work: Work, report: Report = lambda detail, done: None, measure: Measure = lambda step, values: None
) -> Lessons:
    """Train until the budget is spent or nothing gets better, and leave the best state as a checkpoint in
    `<workspace>/best-<step>`.

    A loss that is not finite ends it too: `ended_by` says at which step, and the best state so far is kept. `measure`
    is told of each look. Called again on the same workspace it goes on from the last saved state.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    native = decoder.compute_dtype("bfloat16", work.device) == torch.bfloat16
    AcceleratorState._reset_state()  # of an earlier training in this process, with another precision
    accelerator = Accelerator(cpu=work.device == "cpu", mixed_precision="bf16" if native else "no")
    training = _way(work.settings)(work, accelerator, torch.bfloat16 if native else torch.float32)
    course = training.run(report, measure)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return course


def _way(settings: Distill) -> type[Training]:
    if settings.on_policy is None:
        return Loop
    from pennyweight.distillation.on_policy import OnPolicy  # needs TRL

    return OnPolicy


class Training(ABC):
    """One process's part of a training: what is the same whatever the student learns from."""

    _needed = ""
    """The best state that the saved one counts on."""

    def __init__(self, work: Work, accelerator: Any, product: torch.dtype):
        from transformers import AutoModelForCausalLM

        self._work, self._settings, self._accelerator = work, work.settings, accelerator
        self._workspace, self._product = Path(work.workspace), product
        windows = torch.from_numpy(np.load(work.windows)).to(accelerator.device)
        self._held_out, self._text = windows[: self._settings.held_out], windows[self._settings.held_out :]
        self._chosen = self._positions()
        student = AutoModelForCausalLM.from_pretrained(work.student, dtype=torch.float32).eval()
        s = self._settings
        if s.train != "all":
            freeze(student, work.shared)
        pupil = Pupil(student, Objective(s.loss, s.beta, s.temperature, s.ce), s.hidden, product, work.shared)
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=s.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self._pupil, self._optimizer = pupil.to(accelerator.device), optimizer
        self._student, self._trained = student, trained
        self._teacher = self._teaching()
        self._began = self._saved = 0.0

    @abstractmethod
    def run(self, report: Report, measure: Measure) -> Lessons:
        """Train from the last saved state to the end of the budget."""

    def _positions(self) -> torch.Tensor | None:
        """The positions whose next token is an answer's, bool (windows, tokens); None where all are learnt."""
        if self._work.answers is None:
            return None
        answers = torch.from_numpy(np.load(self._work.answers)).to(self._accelerator.device)
        return torch.nn.functional.pad(answers[:, 1:], (0, 1))

    def _chosen_of(self, numbers: list[int]) -> torch.Tensor | None:
        """Of windows as the file counts them."""
        return None if self._chosen is None else self._chosen[numbers].flatten()

    def _count(self, numbers: list[int]) -> int:
        """Positions that are learnt on, 1 at least."""
        chosen = self._chosen_of(numbers)
        return len(numbers) * self._settings.length if chosen is None else max(int(chosen.sum()), 1)

    def _teaching(self) -> LiveTeacher | CachedTeacher:
        if self._work.cache is None or self._settings.teacher == "live":
            model = decoder.load(self._work.teacher, str(self._accelerator.device))
            return LiveTeacher(model, self._held_out, self._work.shared)
        cached = Cached(Path(self._work.cache), self._settings.teacher, self._accelerator.device)
        dtype = decoder.compute_dtype(self._work.teacher.dtype, self._work.device)
        return CachedTeacher(cached, head_of(self._work.teacher).to(self._accelerator.device, dtype))

    def _begin(self, course: Lessons, measure: Measure) -> None:
        if not course.curve:
            self._look(course, measure)
        self._began, self._saved = time.monotonic() - course.seconds, course.seconds

    def _set_rate(self, course: Lessons) -> None:
        factor = schedule(course.most_spent(self._settings), self._settings.warm_up)
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * factor

    def _count_step(self, course: Lessons, loss: float, tokens: int, report: Report, measure: Measure) -> bool:
        """Note a step that was made, look where it is time to, and end where the budget or the patience has; whether
        the state should be saved."""
        settings = self._settings
        course.steps += 1
        course.tokens += tokens
        course.since.append(loss)
        course.seconds = self._agreed(time.monotonic() - self._began)
        limits = course.spent(settings)
        spent = max(limits.values())
        looks = course.steps % settings.check_every == 0 or spent >= 1
        if looks:
            self._look(course, measure)
        report(f"loss {loss:.4f}, held-out KL {course.curve[-1][1]:.4f}", min(spent, 1.0))
        if course.ended_by:
            return False
        if spent >= 1:
            course.ended_by = max(limits, key=limits.__getitem__)
        elif course.looks_in_vain >= settings.patience:
            course.ended_by = "patience"
        due = looks and not course.ended_by and course.seconds - self._saved >= SAVE_SECONDS
        if due:
            every, learning = (sum(map(torch.Tensor.numel, of)) for of in (self._student.parameters(), self._trained))
            _refuse_full_disk(self._workspace, 4 * every + 8 * learning)
            self._saved = course.seconds
        return due

    def _look(self, course: Lessons, measure: Measure) -> None:
        """Measure the held-out KL, and keep the weights where it is the smallest yet."""
        values = {}
        if course.since:
            values["training_loss"] = sum(course.since) / len(course.since)
            course.losses.append((course.steps, values["training_loss"]))
            course.since = []
        found = self._held_out_kl()
        if not math.isfinite(found):
            course.ended_by = f"a held-out KL of {found} at step {course.steps}"
            return
        if course.look(found):
            course.kept = course.steps
            if self._accelerator.is_main_process:
                self._keep(self._workspace / BEST.format(course.steps))
        if self._accelerator.is_main_process:
            measure(course.steps, {**values, "held_out_kl": course.curve[-1][1]})

    @torch.no_grad()
    def _held_out_kl(self) -> float:
        """Mean KL(teacher ‖ student) in nats per token of the held-out windows."""
        accelerator, length = self._accelerator, self._settings.length
        pupil, head = accelerator.unwrap_model(self._pupil), self._student.get_output_embeddings().weight
        total = torch.zeros((), device=accelerator.device)
        numbers = range(accelerator.process_index, len(self._held_out), accelerator.num_processes)
        for at in range(0, len(numbers), self._settings.batch):
            mine = list(numbers[at : at + self._settings.batch])
            chosen = self._chosen_of(mine)
            expected = self._teacher.held_out(mine, length, chosen)
            with accelerator.autocast():
                states = select(pupil.states(self._held_out[mine], expected), chosen)
            total += chunked_loss(states, head, expected, Objective(), dtype=self._product).float()
        return accelerator.reduce(total, "sum").item() / self._count(list(range(len(self._held_out))))

    def _agreed(self, seconds: float) -> float:
        """The same time for all processes, so that they end together."""
        if self._accelerator.num_processes == 1:
            return seconds
        mine = torch.tensor(seconds, device=self._accelerator.device, dtype=torch.float32)
        return self._accelerator.reduce(mine, "mean").item()

    # --- what is kept -------------------------------------------------------------------------------------------------

    def _keep(self, folder: Path) -> None:
        """The student as a checkpoint, in the dtype that it is stored in."""
        dtype = getattr(torch, self._work.dtype)
        weights = {name: value.detach().to("cpu", dtype) for name, value in self._student.state_dict().items()}
        if decoder.is_tied(self._student):
            weights[f"{decoder.head_name(self._student)}.weight"] = weights[
                f"{decoder.embedding_name(self._student)}.weight"
            ]
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        self._student.save_pretrained(partial, state_dict=weights)
        shutil.copy(Path(self._work.student) / "config.json", partial)  # save_pretrained writes the dtype it learns in
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for old in folder.parent.glob("best-*"):
            if old.name not in (folder.name, self._needed):
                shutil.rmtree(old)

    def _forget_worse(self, course: Lessons) -> None:
        """Once a state is saved nobody goes back to a best one before it."""
        self._needed = BEST.format(course.kept)
        for old in self._workspace.glob("best-*"):
            if old.name != self._needed:
                shutil.rmtree(old)


class Loop(Training):
    """It learns from windows of text, in a loop of its own that several processes can share."""

    def __init__(self, work: Work, accelerator: Any, product: torch.dtype):
        super().__init__(work, accelerator, product)
        self._pupil, self._optimizer = accelerator.prepare(self._pupil, self._optimizer)

    def run(self, report: Report, measure: Measure) -> Lessons:
        course, settings = self._resume(), self._settings
        self._begin(course, measure)
        while course.most_spent(settings) < 1 and not course.ended_by:
            loss = self._step(course)
            if not math.isfinite(loss):
                course.fail(loss)
            elif self._count_step(course, loss, settings.step_tokens, report, measure):
                self._save(course)
        return course

    def _step(self, course: Lessons) -> float:
        """The mean loss of one step of the optimizer, in nats per token; where it is not finite no weight moves."""
        settings, accelerator = self._settings, self._accelerator
        self._set_rate(course)
        share, first = settings.batch // accelerator.num_processes, course.steps * settings.accumulate
        batches = [batch_of(first + part, len(self._text), settings.batch) for part in range(settings.accumulate)]
        count = self._count([settings.held_out + window for batch in batches for window in batch])
        total = torch.zeros((), device=accelerator.device)
        for part, batch in enumerate(batches, 1):
            mine = batch[accelerator.process_index * share :][:share]
            chosen = self._chosen_of([settings.held_out + window for window in mine])
            with contextlib.nullcontext() if part == len(batches) else accelerator.no_sync(self._pupil):
                ids = self._text[mine]
                target = self._teacher.target(ids, mine, chosen) if settings.ce < 1 else None
                loss = self._pupil(ids, target, chosen) / count
                # Gradients of several processes are averaged, and a loss is a sum over all of them.
                accelerator.backward(loss * accelerator.num_processes)
                total += loss.detach().float()
        mean = accelerator.reduce(total, "sum").item()
        norm = accelerator.clip_grad_norm_(self._trained, 1.0)
        if math.isfinite(mean) and math.isfinite(norm):
            self._optimizer.step()
        elif math.isfinite(mean):
            mean = math.nan
        self._optimizer.zero_grad(set_to_none=True)
        return mean

    def _save(self, course: Lessons) -> None:
        """What a killed run goes on from; the one before it goes away once this one is there."""
        if self._accelerator.is_main_process:
            state = {
                "student": self._student.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "course": json.dumps(asdict(course)),
            }
            path = self._workspace / STATE.format(course.steps)
            partial = path.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(path)
            for old in self._workspace.glob("state-*.pt"):
                if old != path:
                    old.unlink()
            self._forget_worse(course)
        self._accelerator.wait_for_everyone()

    def _resume(self) -> Lessons:
        from accelerate.utils import broadcast_object_list

        found = [max((path.name for path in self._workspace.glob("state-*.pt")), default=None)]
        if self._accelerator.num_processes > 1:  # other machines may not see the same files yet
            broadcast_object_list(found)
        if found[0] is None:
            return Lessons()
        path = self._workspace / found[0]
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        self._student.load_state_dict(state["student"])
        self._optimizer.load_state_dict(state["optimizer"])
        course = Lessons.load(json.loads(state["course"]))
        self._needed = BEST.format(course.kept)
        return course


def batch_of(number: int, windows: int, batch: int) -> list[int]:
    """The windows of a training's batch, counted from 0: in the text's order, then in other orders again and again.
    Windows that fill no batch are left out of a round."""
    size = min(batch, windows)
    in_a_round = windows // size
    round_, place = divmod(number, in_a_round)
    return _order(round_, windows)[place * size : (place + 1) * size]


@lru_cache(maxsize=2)
def _order(round_: int, windows: int) -> list[int]:
    if round_ == 0:
        return list(range(windows))
    return torch.randperm(windows, generator=torch.Generator().manual_seed(round_)).tolist()


def _refuse_full_disk(folder: Path, size: int) -> None:
    """torch.save reports a full disk as something else."""
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
