"""From predicted losses to an assignment that was measured: solve, correct the predictions by what is seen, repeat."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pennyweight.quantization.allocation import knapsack
from pennyweight.quantization.allocation.trials import Trials
from pennyweight.quantization.allocation.units import Choice, Unit

#: Factor by which the losses of one family, such as all of one kind of layer, are tried to be larger or smaller.
STEP = 1.6
#: A step that no family can take with gain is made finer, down to this.
FINEST = 1.1

#: Which losses a correction multiplies: those of a kind of layer, of a third of the blocks, or of a width.
Family = tuple[str, object]
Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Move:
    """Another choice for one unit, and what it changes."""

    unit: int
    to: int
    bytes: int
    loss: float


@dataclass
class Search:
    """The best assignment seen so far. Nothing is better than it because it was predicted; all are measured."""

    trials: Trials
    units: Sequence[Unit]
    losses: list[list[float]]
    """Predicted KL of each unit's choices."""
    capacity: int
    """Bytes that all units together may take."""
    limit: int
    """Measurements that may be made after the starting points."""
    report: Report = lambda detail, done: None
    best: list[int] = field(default_factory=list)
    kl: float = math.inf
    corrections: dict[Family, float] = field(default_factory=dict)
    measured: dict[tuple[int, ...], float] = field(default_factory=dict)
    """Assignment → KL."""
    spent: int = 0

    def run(self) -> None:
        """Start from every uniform assignment that fits and from the predicted best one, then refine."""
        for start in [*self.uniform().values(), self.solve({})]:
            self._measure(start)
        self._correct()
        self._swap()

    def uniform(self) -> dict[Choice, list[int]]:
        """Assignments that give all units the same choice and fit, those aside that have only one."""
        wanted = dict.fromkeys(choice for unit in self.units if len(unit.choices) > 1 for choice in unit.choices)
        found = {}
        for choice in wanted:
            numbers = [_number(unit, choice) for unit in self.units]
            if None not in numbers and self.bytes(numbers) <= self.capacity:
                found[choice] = numbers
        return found

    def solve(self, corrections: dict[Family, float]) -> list[int]:
        """The assignment of least corrected loss that fits."""
        return knapsack.solve(self._corrected(corrections), [unit.bytes for unit in self.units], self.capacity)

    def _corrected(self, corrections: dict[Family, float]) -> list[list[float]]:
        return [
            [
                loss * math.prod(corrections.get(family, 1.0) for family in self._families(unit, choice))
                for loss, choice in zip(row, unit.choices)
            ]
            for row, unit in zip(self.losses, self.units)
        ]

    def bytes(self, assignment: Sequence[int]) -> int:
        return sum(unit.bytes[number] for unit, number in zip(self.units, assignment))

    def choices(self, assignment: Sequence[int]) -> list[Choice]:
        return [unit.choices[number] for unit, number in zip(self.units, assignment)]

    def predicted(self, assignment: Sequence[int]) -> float:
        return sum(row[number] for row, number in zip(self.losses, assignment))

    def _families(self, unit: Unit, choice: Choice) -> list[Family]:
        if choice is None:
            return []
        last = max((other.block or 0 for other in self.units), default=0) + 1
        depth = [] if unit.block is None else [("third", 3 * unit.block // last)]
        return [("kind", unit.kind), *depth, ("bits", choice.bits)]

    def _measure(self, assignment: list[int]) -> bool:
        """Measure an assignment; whether it is the best one now."""
        found = self.measured[tuple(assignment)] = self.trials.assign(self.choices(assignment))
        better = found < self.kl
        if better:
            self.best, self.kl = assignment, found
        return better

    def _correct(self) -> None:
        """Coordinate descent over the corrections. Each step is one exact solution, measured."""
        families = list(
            dict.fromkeys(
                family for unit in self.units for choice in unit.choices for family in self._families(unit, choice)
            )
        )
        step = STEP
        while step > FINEST:
            moved = False
            for family in families:
                for factor in (step, 1 / step):
                    trial = self.corrections | {family: self.corrections.get(family, 1.0) * factor}
                    assignment = self.solve(trial)
                    if tuple(assignment) in self.measured:
                        continue
                    if self.spent >= self.limit:
                        return
                    if self._try(assignment):
                        self.corrections, moved = trial, True
                        break
            step = step if moved else math.sqrt(step)

    def _try(self, assignment: list[int]) -> bool:
        self.spent += 1
        self.report(f"trial {self.spent} of {self.limit}: held-out KL {self.kl:.4f}", self.spent / self.limit)
        return self._measure(assignment)

    def _swap(self) -> None:
        """Give one unit more and others less, those first that are predicted to lose least by it."""
        moved = True
        while moved and self.spent < self.limit:
            moved = False
            for assignment in self._swaps():
                if self.spent >= self.limit:
                    return
                if self._try(assignment):
                    moved = True
                    break

    def _swaps(self) -> Iterator[list[int]]:
        """The best assignment with one unit's choice a step costlier and another's a step cheaper, where that fits."""
        losses, room = self._corrected(self.corrections), self.capacity - self.bytes(self.best)
        steps: dict[int, list[Move]] = {1: [], -1: []}
        for at, unit in enumerate(self.units):
            order = sorted(range(len(unit.bytes)), key=lambda number, unit=unit: unit.bytes[number])
            place, now = order.index(self.best[at]), self.best[at]
            for way, moves in steps.items():
                if 0 <= place + way < len(order):
                    to = order[place + way]
                    moves.append(Move(at, to, unit.bytes[to] - unit.bytes[now], losses[at][to] - losses[at][now]))
        pairs = [
            (up.loss + down.loss, up, down)
            for up in steps[1]
            for down in steps[-1]
            if up.unit != down.unit and up.bytes + down.bytes <= room
        ]
        for _, up, down in sorted(pairs, key=lambda pair: (pair[0], pair[1].unit, pair[2].unit)):
            swapped = list(self.best)
            swapped[up.unit], swapped[down.unit] = up.to, down.to
            if tuple(swapped) not in self.measured:
                yield swapped


def _number(unit: Unit, choice: Choice) -> int | None:
    """Where a choice is among a unit's; 0 where it has only one."""
    if len(unit.choices) == 1:
        return 0
    return unit.choices.index(choice) if choice in unit.choices else None
