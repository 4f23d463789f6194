"""Our own rounding: scales, integers, GPTQ and AWQ against what their definitions say."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pennyweight.errors import StageError
from pennyweight.quantization import awq, decoder, gptq, methods
from pennyweight.quantization.grid import Grid, find_scales, round_to_nearest
from pennyweight.quantization.packed import pack, unpack
from pennyweight.quantization.walk import Block, input_moments, walk


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def inputs() -> torch.Tensor:
    """Correlated inputs of unlike sizes, (tokens, in)."""
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    return mixed * torch.logspace(-1, 1, 64)


@pytest.fixture
def model(tiny_model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval().requires_grad_(False)


WINDOWS = torch.randint(1, 512, (6, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_integer_is_the_nearest_that_the_grid_has(weight: torch.Tensor, bits: int, symmetric: bool) -> None:
    grid = Grid(bits, 16, symmetric)
    scales, zeros = find_scales(weight, grid, torch.bfloat16)
    layer = round_to_nearest(weight, scales, zeros, grid)
    groups = weight.view(24, 4, 16, 1)
    reachable = (torch.arange(2**bits) - zeros.view(24, 4, 1, 1)) * scales.view(24, 4, 1, 1)
    nearest = (groups - reachable).abs().amin(-1).flatten(1)
    torch.testing.assert_close((weight - layer.dequantize()).abs(), nearest, rtol=1e-4, atol=1e-6)
    assert layer.integers.max() <= 2**bits - 1
    assert torch.equal(scales, scales.to(torch.bfloat16).float())
    assert layer.symmetric == symmetric


def test_a_searched_scale_never_loses_more_than_the_largest_weights(weight: torch.Tensor) -> None:
    grid, importance = Grid(3, 16), torch.rand(64)
    errors = []
    for search in ("max", "mse"):
        layer = round_to_nearest(weight, *find_scales(weight, grid, torch.bfloat16, search, importance), grid)
        errors.append(((weight - layer.dequantize()).square() * importance).view(24, 4, 16).sum(-1))
    assert (errors[1] <= errors[0] + 1e-6).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()


def test_a_group_of_zeros_stays_zero() -> None:
    for symmetric in (True, False):
        grid, weight = Grid(4, 16, symmetric), torch.zeros(2, 32)
        layer = round_to_nearest(weight, *find_scales(weight, grid, torch.bfloat16, "mse"), grid)
        assert torch.equal(layer.dequantize(), weight)


def test_gptq_without_correlation_is_rounding_to_nearest(weight: torch.Tensor) -> None:
    grid = Grid(4, 16)
    scales, zeros = find_scales(weight, grid, torch.bfloat16)
    solved = gptq.solve(weight, torch.diag(torch.rand(64) + 0.5), scales, zeros, grid, 0.01)
    assert torch.equal(solved.integers, round_to_nearest(weight, scales, zeros, grid).integers)


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_moves_less_of_the_output_than_rounding(weight: torch.Tensor, inputs: torch.Tensor, bits: int) -> None:
    grid, moments = Grid(bits, 16), inputs.T @ inputs
    scales, zeros = find_scales(weight, grid, torch.bfloat16, "mse", moments.diagonal())
    layers = (
        round_to_nearest(weight, scales, zeros, grid),
        gptq.solve(weight, moments, scales, zeros, grid, 0.01),
    )
    rounding, solved = (((weight - layer.dequantize()) @ inputs.T).square().sum() for layer in layers)
    assert solved < 0.7 * rounding


def test_gptq_of_two_columns_is_the_textbook_step() -> None:
    """Round the more important column; shift the other by the error times H₁₀/H₁₁; round that."""
    grid = Grid(4, 2)
    weight, moments = torch.tensor([[0.26, -0.41]]), torch.tensor([[4.0, 1.5], [1.5, 1.0]])
    scales, zeros = torch.tensor([[0.1]]), torch.tensor([[8.0]])
    solved = gptq.solve(weight, moments, scales, zeros, grid, 1e-9).integers
    first = round(0.26 / 0.1) * 0.1
    second = round((-0.41 + (0.26 - first) * 1.5 / 1.0) / 0.1)
    assert solved.tolist() == [[8 + round(0.26 / 0.1), 8 + second]]


def test_inputs_that_are_not_finite_are_refused(weight: torch.Tensor) -> None:
    scales, zeros = find_scales(weight, Grid(4, 16), torch.bfloat16)
    with pytest.raises(StageError, match="finite"):
        gptq.solve(weight, torch.full((64, 64), torch.nan), scales, zeros, Grid(4, 16), 0.01)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_packed_integers_come_back(bits: int, dim: int) -> None:
    values = torch.randint(0, 2**bits, (37, 45), dtype=torch.uint8)
    words = pack(values, bits, dim)
    assert words.shape == ((37, -(-45 * bits // 32)) if dim == 1 else (-(-37 * bits // 32), 45))
    assert torch.equal(unpack(words, bits, (37, 45), dim), values)


def test_the_walk_hands_each_block_what_the_model_would(model: torch.nn.Module) -> None:
    seen: list[torch.Tensor] = []
    walk(model, WINDOWS, 3, lambda block: seen.append(torch.cat(block.states)))
    expected = model(WINDOWS, output_hidden_states=True).hidden_states
    for ours, theirs in zip(seen, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_a_visit_changes_reaches_the_next_block(model: torch.nn.Module) -> None:
    seen: list[torch.Tensor] = []

    def visit(block: Block) -> None:
        seen.append(torch.cat(block.states))
        for layer in block.linears().values():
            layer.weight.data.zero_()

    walk(model, WINDOWS, 3, visit)
    torch.testing.assert_close(seen[1], seen[0])  # a block of zeros hands on what it gets


def test_moments_are_those_of_the_inputs(model: torch.nn.Module) -> None:
    layers = decoder.linears(model)
    with input_moments(layers) as moments:
        model(WINDOWS)
    caught = []
    handle = layers["model.layers.1.mlp.up_proj"].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    model(WINDOWS)
    handle.remove()
    flat = caught[0].flatten(0, 1)
    torch.testing.assert_close(moments["model.layers.1.mlp.up_proj"], flat.T @ flat, rtol=1e-4, atol=1e-4)
    assert moments["model.layers.1.mlp.up_proj"] is moments["model.layers.1.mlp.gate_proj"]
    assert moments["model.layers.1.mlp.up_proj"] is not moments["model.layers.1.mlp.down_proj"]


def test_awq_scales_inputs_without_changing_what_the_model_computes(model: torch.nn.Module) -> None:
    before, scaled = model(WINDOWS).logits, []
    grids = dict.fromkeys(decoder.linears(model), Grid(3, 32))

    def visit(block: Block) -> None:
        with input_moments(block.linears()) as moments:
            for _ in block.run():
                pass
        for fold in awq.folds(block):
            first = next(iter(fold.consumers))
            weights = copy.deepcopy(fold.consumers[first].weight)
            awq.scale(fold, moments[first], WINDOWS.numel(), grids, torch.bfloat16)
            scaled.append(not torch.equal(weights, fold.consumers[first].weight))

    walk(model, WINDOWS, 3, visit)
    assert len(scaled) == 6  # two norms and one gated product in each of two blocks
    assert any(scaled)
    torch.testing.assert_close(model(WINDOWS).logits, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrated_methods_diverge_less_than_rounding(model: torch.nn.Module, method: str) -> None:
    expected = torch.log_softmax(model(WINDOWS).logits, -1)
    kl = {}
    for name, search in (("rtn", "max"), (method, "mse")):
        rounded = copy.deepcopy(model)
        grids = dict.fromkeys(decoder.linears(rounded), Grid(3, 32))
        settings = methods.Settings(name, search, 0.01, torch.bfloat16)
        methods.quantize(rounded, grids, settings, WINDOWS, lambda *_: None)
        found = torch.log_softmax(rounded(WINDOWS).logits, -1)
        kl[name] = (expected.exp() * (expected - found)).sum(-1).mean().item()
    assert kl[method] < 0.9 * kl["rtn"]
