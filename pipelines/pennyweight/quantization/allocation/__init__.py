"""Bits layer by layer, so that the whole checkpoint fits a budget and predicts what the base predicts as far as it can.

`sensitivity` predicts what each choice costs, `knapsack` makes the best of that, `trials` measures, `search` corrects
the predictions by what was measured. Dong et al., «HAWQ-V2», NeurIPS 2020, choose bits by a second-order term too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pennyweight.errors import StageError
from pennyweight.plan.allocation import Widths, choice_bytes, layer_choices
from pennyweight.plan.sizes import ModelShape, dense_bytes
from pennyweight.quantization import decoder
from pennyweight.quantization.allocation import sensitivity
from pennyweight.quantization.allocation.search import Search
from pennyweight.quantization.allocation.trials import Trials
from pennyweight.quantization.allocation.units import Choice, Unit, alike, place
from pennyweight.quantization.grid import Grid
from pennyweight.recipe import Quantize
from pennyweight.records import Allocation

if TYPE_CHECKING:
    import torch


def allocate(
    model: Any,
    shape: ModelShape,
    step: Quantize,
    windows: torch.Tensor,
    dtype: torch.dtype,
    seed: int,
    report: Callable[[str, float], None],
) -> tuple[dict[str, Grid], Allocation]:
    """Grids of the layers that are rounded, and the record of how they were found. The model is left as it came.

    `windows` are token ids (windows, tokens): the last `search.held_out` of them measure, the first `search.windows`
    give the sensitivity. Scales are stored in `dtype`. Raises StageError for a budget that nothing fits.
    """
    assert step.budget
    tied = decoder.is_tied(model)
    if step.head != "none":
        decoder.untie(model)
    units = make_units(model, shape, step, windows)
    names = [name for unit in units for name in unit.names]
    budget = step.budget.allowed(shape.parameters, dense_bytes(shape))
    fixed = dense_bytes(shape) - sum(choice_bytes(shape, step, name, None) for name in names)
    if (least := fixed + sum(min(unit.bytes) for unit in units)) > budget:
        raise StageError(f"nothing fits {budget:,} bytes; {least:,} is the least", "raise `budget`, or add choices")
    trials = Trials(model, units, windows[-step.search.held_out :], step.scale_search, dtype)
    losses = _losses(model, units, windows[: step.search.windows], trials, seed)
    search = Search(trials, units, losses, budget - fixed, step.search.trials, report)
    search.run()
    trials.restore()
    if tied:
        decoder.tie(model)
    grids = {name: choice for unit, choice in zip(units, search.choices(search.best)) for name in unit.names}
    chosen = {name: grid for name, grid in grids.items() if grid is not None}
    return chosen, _record(search, grids, budget, fixed)


def _losses(model: Any, units: list[Unit], windows: torch.Tensor, trials: Trials, seed: int) -> list[list[float]]:
    """KL in nats per token of each unit's choices: predicted in the blocks, measured for the embedding and the head."""
    losses = sensitivity.predict(model, units, windows, trials.rounded, seed)
    for at, unit in enumerate(units):
        if unit.block is None and len(unit.choices) > 1:
            losses[at] = [trials.measure({at: choice}) for choice in unit.choices]
    return losses


def _record(search: Search, grids: dict[str, Choice], budget: int, fixed: int) -> Allocation:
    uniform = {describe(choice): search.measured[tuple(start)] for choice, start in search.uniform().items()}
    return Allocation(
        budget=budget,
        bytes=fixed + search.bytes(search.best),
        layers={name: describe(grid) for name, grid in grids.items()},
        predicted_kl=search.predicted(search.best),
        measured_kl=search.kl,
        uniform_kl=uniform,
        trials=search.spent,
    )


def make_units(model: Any, shape: ModelShape, step: Quantize, windows: torch.Tensor) -> list[Unit]:
    """Layers in groups that read one input, with the choices that the recipe gives them."""
    allowed = layer_choices(shape, step)
    units = []
    for names in alike(model, list(allowed), windows[:1, :16]):
        choices = allowed[names[0]]
        sizes = tuple(sum(choice_bytes(shape, step, name, choice) for name in names) for choice in choices)
        units.append(Unit(names, *place(model, names[0]), tuple(_grid(choice, step) for choice in choices), sizes))
    return units


def describe(choice: Choice) -> str:
    return "as it was" if choice is None else f"{choice.bits} bits, groups of {choice.group_size}"


def _grid(choice: Widths, step: Quantize) -> Choice:
    return None if choice is None else Grid(*choice, step.symmetric)
