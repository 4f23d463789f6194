"""From a model in floating point to the integers of its linear layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pennyweight.quantization import awq, decoder, gptq
from pennyweight.quantization.grid import Grid, QuantizedLinear, find_scales, round_to_nearest
from pennyweight.quantization.walk import Block, input_moments, walk

if TYPE_CHECKING:
    import torch

#: Windows of calibration text that go through a block together. It changes peak memory, and the last digits.
CALIBRATION_BATCH = 8

Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Settings:
    method: Literal["rtn", "gptq", "awq"]
    search: Literal["max", "mse"]
    dampening: float
    dtype: torch.dtype
    """What scales are stored in."""


def quantize(
    model: Any, grids: dict[str, Grid], settings: Settings, windows: torch.Tensor | None, report: Report
) -> dict[str, QuantizedLinear]:
    """Round the layers that `grids` names and put what they became in their place. Returns their integers.

    `windows` are token ids (windows, tokens) to calibrate on. Layers outside the decoder's blocks, such as the head,
    are rounded to nearest, since calibration sees blocks only. Raises StageError where a layer cannot be solved.
    """
    layers: dict[str, QuantizedLinear] = {}
    embedding = decoder.embedding_name(model)
    if embedding in grids:  # before the blocks, so that they see what it hands on
        layers[embedding] = _alone(model.get_submodule(embedding), grids[embedding], settings)
    if settings.method != "rtn":
        assert windows is not None
        count = len(decoder.blocks(model)[1])

        def visit(block: Block) -> None:
            layers.update(_block(block, grids, settings))
            done = int(block.name.rpartition(".")[2]) + 1
            report(f"block {done} of {count}", done / count)

        walk(model, windows, CALIBRATION_BATCH, visit)
    for name, grid in grids.items():
        if name not in layers:
            layers[name] = _alone(model.get_submodule(name), grid, settings)
    return layers


def _alone(module: Any, grid: Grid, settings: Settings) -> QuantizedLinear:
    search = settings.search if settings.method == "rtn" else "mse"
    scales, zeros = find_scales(module.weight, grid, settings.dtype, search)
    layer = round_to_nearest(module.weight, scales, zeros, grid)
    put(module, layer)
    return layer


def put(module: Any, layer: QuantizedLinear) -> None:
    """Let a linear layer or an embedding compute with its integers' values."""
    module.weight.data = layer.dequantize().to(module.weight.device, module.weight.dtype)


def _block(block: Block, grids: dict[str, Grid], settings: Settings) -> dict[str, QuantizedLinear]:
    linears = {name: module for name, module in block.linears().items() if name in grids}
    if not linears:
        return {}
    with input_moments(linears) as moments:
        for _ in block.run():
            pass
    if settings.method == "awq":
        tokens = sum(state.shape[0] * state.shape[1] for state in block.states)
        for fold in awq.folds(block):
            if fold.consumers.keys() <= grids.keys():
                scaled = awq.scale(fold, moments[next(iter(fold.consumers))], tokens, grids, settings.dtype)
                moments |= dict.fromkeys(fold.consumers, scaled)
    layers: dict[str, QuantizedLinear] = {}
    for names in _alike(moments, grids):
        layers |= _solve({name: linears[name] for name in names}, moments[names[0]], grids[names[0]], settings)
    for name, layer in layers.items():
        put(linears[name], layer)
    return layers


def _alike(moments: dict[str, torch.Tensor], grids: dict[str, Grid]) -> list[list[str]]:
    """Layers that read the same input and are rounded alike: one factorization does for all of them."""
    groups: dict[tuple[int, Grid], list[str]] = defaultdict(list)
    for name, moment in moments.items():
        groups[id(moment), grids[name]].append(name)
    return list(groups.values())


def _solve(
    linears: dict[str, Any], moments: torch.Tensor, grid: Grid, settings: Settings
) -> dict[str, QuantizedLinear]:
    import torch

    weight = torch.cat([module.weight for module in linears.values()]).float()
    scales, zeros = find_scales(weight, grid, settings.dtype, settings.search, moments.diagonal())
    if settings.method == "gptq":
        solved = gptq.solve(weight, moments, scales, zeros, grid, settings.dampening)
    else:
        solved = round_to_nearest(weight, scales, zeros, grid)
    spans = torch.arange(len(weight), device=weight.device).split([len(module.weight) for module in linears.values()])
    return {name: solved.rows(span) for name, span in zip(linears, spans)}
