"""The parts of healing: the loss against its closed form, and layers whose scales and integers learn."""

from __future__ import annotations

import copy

import pytest
import torch

from pennyweight.healing import loss
from pennyweight.healing.student import ScaledLinear, learn_stored
from pennyweight.quantization.grid import Grid, QuantizedLinear, find_scales, round_to_nearest
from pennyweight.recipe import Recover


@pytest.fixture
def rounded() -> tuple[torch.Tensor, QuantizedLinear]:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    grid = Grid(4, 16)
    return weight, round_to_nearest(weight, *find_scales(weight, grid, torch.bfloat16), grid)


def scaled(layer: QuantizedLinear, moves: str = "none", dtype: torch.dtype = torch.float32) -> ScaledLinear:
    return ScaledLinear(layer, torch.bfloat16, dtype, None, moves)


@pytest.mark.parametrize("chunk", [7, 40, 1000])
def test_chunked_loss_is_the_dense_one_with_its_gradient(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(loss, "CHUNK", chunk)
    torch.manual_seed(0)
    teacher, heads = torch.randn(40, 16), torch.randn(2, 97, 16)
    student = torch.randn(40, 16, requires_grad=True)
    found = loss.chunked_kl(student, teacher, heads[0], heads[1])
    (gradient,) = torch.autograd.grad(3 * found, student)
    exact = copy.deepcopy(student).double()
    expected = torch.log_softmax(teacher.double() @ heads[1].double().T, -1)
    dense = torch.nn.functional.kl_div(
        torch.log_softmax(exact @ heads[0].double().T, -1), expected, reduction="sum", log_target=True
    )
    (known,) = torch.autograd.grad(3 * dense, exact)
    assert found.item() == pytest.approx(dense.item(), rel=1e-5)
    assert ((gradient - known).norm() / known.norm()).item() < 1e-5


def test_relative_distance_of_a_doubled_state_is_one() -> None:
    states = torch.randn(5, 8)
    assert loss.relative_distance(2 * states, states).item() == pytest.approx(5.0)


def test_gradients_of_scales_and_inputs_are_those_of_the_product(rounded: tuple[torch.Tensor, QuantizedLinear]) -> None:
    _, layer = rounded
    module = scaled(layer)
    module.change.requires_grad_(True)
    inputs = torch.randn(3, 32, requires_grad=True)
    (module(inputs) ** 2).sum().backward()
    change = torch.zeros_like(layer.scales, requires_grad=True)
    again = inputs.detach().clone().requires_grad_(True)
    centred = layer.integers.float().view(6, 2, 16) - layer.zeros.float().unsqueeze(-1)
    weight = (centred * (layer.scales * change.exp()).unsqueeze(-1)).flatten(1)
    ((again @ weight.T) ** 2).sum().backward()
    torch.testing.assert_close(module.change.grad, change.grad)
    torch.testing.assert_close(inputs.grad, again.grad)


def test_scales_are_used_as_they_are_stored(rounded: tuple[torch.Tensor, QuantizedLinear]) -> None:
    module = scaled(rounded[1])
    module.change.data.fill_(0.123)
    healed = module.healed_scales()
    assert torch.equal(healed, healed.to(torch.bfloat16).float())
    torch.testing.assert_close(healed, rounded[1].scales * 1.1309, rtol=1e-2, atol=0)


def test_a_norm_computed_in_bfloat16_learns_in_float32() -> None:
    norm = torch.nn.RMSNorm(4).bfloat16()
    trained = learn_stored(norm, "weight", torch.bfloat16).parameter
    assert trained.dtype == torch.float32
    inputs = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.bfloat16)
    norm(inputs).sum().backward()
    assert trained.grad.tolist() == pytest.approx([1, -1, 1, -1], rel=1e-2)
    for _ in range(8):  # each a fifth of what bfloat16 can tell apart just above 1
        trained.data += 2**-7 / 5
    assert norm.weight.dtype == torch.bfloat16
    assert norm.weight.tolist() == [1 + 2**-6] * 4


def test_places_start_where_the_weight_was_and_move_by_one(rounded: tuple[torch.Tensor, QuantizedLinear]) -> None:
    weight, layer = rounded
    module = scaled(layer, "by-one")
    (places,) = module.learn_places(weight, 1, torch.Generator())
    assert module.moved() == 0
    # A place just below a half: the least push upwards takes the integer to its neighbour, and never further.
    nearest = places.parameter.data.masked_fill(module.integers == 15, -1.0).argmax()
    places.parameter.data.view(-1)[nearest] += 0.2
    assert module.moved() == 1
    places.parameter.data.fill_(9.0)
    moved = module.healed_integers().flatten(1) - layer.integers.float()
    assert set(moved.unique().tolist()) <= {0.0, 1.0}
    assert module.healed_integers().max() <= 15


def test_gradient_of_a_place_is_that_of_its_integer(rounded: tuple[torch.Tensor, QuantizedLinear]) -> None:
    weight, layer = rounded
    module = scaled(layer, "by-one")
    (places,) = module.learn_places(weight, 1, torch.Generator())
    inputs = torch.randn(3, 32)
    (module(inputs) ** 2).sum().backward()
    dense = layer.dequantize().requires_grad_(True)
    ((inputs @ dense.T) ** 2).sum().backward()
    expected = dense.grad.view(6, 2, 16) * layer.scales.unsqueeze(-1)
    torch.testing.assert_close(places.parameter.grad, expected)


def test_budgets() -> None:
    assert Recover(text="x").limits == {"steps": 60}
    both = Recover(text="x", steps=100, tokens=5000, batch=4, length=256)
    assert both.most_steps == 5
    assert both.calibrate.samples == both.held_out + 20
    assert Recover(text="x", minutes=2).calibrate.samples == 8 + 1024
    with pytest.raises(ValueError, match="both move the integers"):
        Recover(text="x", train=["rounding", "low_rank"])
