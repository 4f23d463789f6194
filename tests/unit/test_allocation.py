"""Bits layer by layer: the exact knapsack, the predictions that it starts from, the measurements that overrule them."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from pennyweight.plan.allocation import allocated_bytes, budget_problems, layer_choices, least_bytes
from pennyweight.plan.problems import Problems, check_steps
from pennyweight.plan.schemes import check_runtimes
from pennyweight.plan.shapes import Shapes, Start
from pennyweight.plan.sizes import ModelShape, dense_bytes, model_shape
from pennyweight.quantization import decoder
from pennyweight.quantization.allocation import knapsack, sensitivity
from pennyweight.quantization.allocation.search import Search
from pennyweight.quantization.allocation.trials import Trials
from pennyweight.quantization.allocation.units import Unit, alike, place
from pennyweight.quantization.grid import Grid
from pennyweight.recipe import Quantize, Recipe


def brute_force(losses: list[list[float]], costs: list[list[int]], budget: int) -> float:
    spans = [range(len(loss)) for loss in losses]
    return min(
        sum(loss[at] for loss, at in zip(losses, chosen))
        for chosen in itertools.product(*spans)
        if sum(cost[at] for cost, at in zip(costs, chosen)) <= budget
    )


@pytest.mark.parametrize("seed", range(60))
def test_knapsack_finds_what_trying_everything_finds(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.randint(1, 4) for _ in range(draw.randint(1, 7))]
    costs = [[draw.randint(1, 30) for _ in range(size)] for size in sizes]
    losses = [[draw.choice([0.0, draw.random(), draw.random() * 10]) for _ in range(size)] for size in sizes]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    for budget in {least, (least + most) // 2, draw.randint(least, most), most + 1}:
        found = knapsack.solve(losses, costs, budget)
        assert sum(cost[at] for cost, at in zip(costs, found)) <= budget
        total = sum(loss[at] for loss, at in zip(losses, found))
        assert total == pytest.approx(brute_force(losses, costs, budget), abs=1e-12)


def test_knapsack_that_cannot_be_filled_says_what_the_least_is() -> None:
    with pytest.raises(ValueError, match="7 is the least"):
        knapsack.solve([[1.0, 0.0], [1.0]], [[3, 9], [4]], 6)


def test_knapsack_of_a_large_model_is_solved_exactly_in_reasonable_time() -> None:
    """200 items of equal sizes, against dynamic programming over every cost."""
    draw = random.Random(0)
    costs = [[3, 4, 5, 8, 16] for _ in range(200)]
    losses = [[weight * 4.0**-bits for bits in (3, 4, 5, 8, 16)] for weight in (draw.expovariate(1) for _ in costs)]
    budget = 200 * 5 + 1
    least = [0.0] * (budget + 1)
    for loss, cost in zip(losses, costs):
        least = [
            min((least[at - c] + v for c, v in zip(cost, loss) if c <= at), default=float("inf"))
            for at in range(budget + 1)
        ]
    found = knapsack.solve(losses, costs, budget)
    assert sum(loss[at] for loss, at in zip(losses, found)) == pytest.approx(least[budget], rel=1e-12)


# --- predictions, and what they are worth ----------------------------------------------------------------------------

CHOICES = (Grid(3, 32), Grid(4, 32), Grid(8, 32), None)
WINDOWS = torch.from_numpy(np.random.default_rng(0).integers(0, 512, (24, 32)))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def units(model: torch.nn.Module) -> list[Unit]:
    """What each choice stores is counted in bits a weight, so that budgets are easy to read."""
    groups = alike(model, list(decoder.linears(model)), WINDOWS[:1])
    return [Unit(names, *place(model, names[0]), CHOICES, (3, 4, 8, 16)) for names in groups]


@pytest.fixture
def trials(model: torch.nn.Module, units: list[Unit]) -> Iterator[Trials]:
    made = Trials(model, units, WINDOWS[16:], "max", torch.bfloat16)
    yield made
    made.restore()


@pytest.fixture(scope="module")
def predicted(model: torch.nn.Module, units: list[Unit]) -> list[list[float]]:
    rounder = Trials(model, units, WINDOWS[:1], "max", torch.bfloat16).rounded
    return sensitivity.predict(model, units, WINDOWS[:16], rounder, seed=0)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(WINDOWS[16:]).logits


def test_layers_that_read_one_input_are_one_unit(units: list[Unit]) -> None:
    parts = [[name.rpartition(".")[2] for name in unit.names] for unit in units]
    assert parts == 2 * [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert [(unit.block, unit.kind) for unit in units][4:6] == [(1, "self_attn.q_proj"), (1, "self_attn.o_proj")]


def test_predictions_from_one_backward_pass_are_close_to_what_is_measured(
    units: list[Unit], trials: Trials, predicted: list[list[float]]
) -> None:
    pairs = [
        (row[number], trials.measure({at: CHOICES[number]})) for at, row in enumerate(predicted) for number in range(3)
    ]
    assert all(0.6 < guess / seen < 1.6 for guess, seen in pairs)
    assert all(row[3] == 0 for row in predicted)


def test_a_change_in_a_late_block_is_measured_like_the_whole_model(model: torch.nn.Module, trials: Trials) -> None:
    """Against the divergence of the logits themselves; the model comes back as it was."""
    base = torch.log_softmax(logits(model), -1)
    trials.assign([CHOICES[1]] * 8)
    found = trials.measure({6: None, 7: CHOICES[0]})
    trials.assign([CHOICES[1]] * 6 + [None, CHOICES[0]])
    ours = torch.log_softmax(logits(model), -1)
    assert found == pytest.approx((base.exp() * (base - ours)).sum(-1).mean().item(), abs=1e-6)
    trials.restore()
    torch.testing.assert_close(torch.log_softmax(logits(model), -1), base, rtol=0, atol=0)


@pytest.mark.parametrize("limit", [0, 12])
def test_the_search_is_never_worse_than_uniform_and_keeps_the_budget(
    units: list[Unit], trials: Trials, predicted: list[list[float]], limit: int
) -> None:
    search = Search(trials, units, predicted, capacity=8 * 4, limit=limit)
    search.run()
    assert search.bytes(search.best) <= 8 * 4
    assert search.spent <= limit
    assert search.kl == min(search.measured.values())
    assert set(search.uniform()) == {CHOICES[0], CHOICES[1]}
    assert all(search.kl <= search.measured[tuple(start)] for start in search.uniform().values())
    assert search.kl == pytest.approx(trials.assign(search.choices(search.best)), abs=1e-6)


def test_a_misleading_prediction_is_overruled_by_measurement(units: list[Unit], trials: Trials) -> None:
    """Losses that call the most sensitive layer harmless: the uniform assignment is kept, or something better."""
    liar = [[0.0, 0.0, 0.0, 0.0] if at == 0 else [3.0, 2.0, 1.0, 0.0] for at in range(8)]
    search = Search(trials, units, liar, capacity=8 * 4, limit=0)
    search.run()
    lied = search.solve({})
    assert lied[0] == 0
    assert search.measured[tuple(lied)] > search.kl == search.measured[tuple(search.uniform()[CHOICES[1]])]


# --- the recipe and the plan -----------------------------------------------------------------------------------------


def auto(**settings: object) -> Quantize:
    body = {"scheme": "auto", "calibrate": {"source": "text", "samples": 16}, "group_size": 32}
    return Quantize.model_validate(body | {"budget": {"bits_per_weight": 5}} | settings)


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> dict[str, Any]:
    return json.loads((tiny_model / "config.json").read_text())


@pytest.fixture(scope="module")
def shape(config: dict[str, Any]) -> ModelShape:
    return model_shape(config, "bfloat16")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"choices": [16]}, "16 alone leaves every layer as it is"),
        ({"search": {"windows": 14, "held_out": 3}}, r"takes 14 \+ 3 windows of the calibration text, which has 16"),
        ({"scheme": "w4a16", "method": "gptq", "budget": None, "embedding": "auto"}, "`embedding: auto` needs scheme"),
    ],
)
def test_settings_that_leave_nothing_to_choose(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        auto(**settings)


def test_bytes_by_hand(shape: ModelShape) -> None:
    """A tied embedding of 512 × 128 at 4 bits in groups of 32, and k of 64 × 128 at 8 bits in groups of 64."""
    chosen = {"model.embed_tokens": (4, 32), "model.layers.0.self_attn.k_proj": (8, 64), "lm_head": None}
    saved = 512 * 128 * 2 - (512 * 64 + 512 * 4 * 2 + 16) + 64 * 128 * 2 - (64 * 128 + 64 * 2 * 2 + 16)
    assert allocated_bytes(shape, auto(), chosen) == dense_bytes(shape) - saved


def test_a_budget_below_the_smallest_says_what_is_possible(shape: ModelShape) -> None:
    least = least_bytes(shape, auto())
    ((key, message, hint),) = budget_problems(shape, auto(budget={"bytes": least - 1}))
    assert key == "budget"
    assert f"the smallest checkpoint of these choices takes {least:,}" in message
    assert f"{least:,} bytes" in hint
    assert list(budget_problems(shape, auto(budget={"bytes": least}))) == []


def test_a_budget_above_everything_says_that_nothing_needs_rounding(shape: ModelShape) -> None:
    ((key, message, _),) = budget_problems(shape, auto(budget={"ratio": 1.0}))
    assert key == "budget"
    assert "nothing needs rounding" in message


def test_sizes_that_divide_no_layer_are_refused(shape: ModelShape) -> None:
    ((key, message, _),) = budget_problems(shape, auto(group_sizes=[48]))
    assert key == "group_sizes"
    assert "48 do not divide 128, the input size of model.layers.0.self_attn.q_proj" in message
    assert layer_choices(shape, auto(group_sizes=[48, 256]))["model.layers.0.mlp.down_proj"] == [
        (4, 256),
        (8, 256),
        None,
    ]


def test_the_plan_finds_what_a_runtime_cannot_run(config: dict[str, Any], tiny_recipe_text: str) -> None:
    body = yaml.safe_load(tiny_recipe_text)
    step = auto(choices=[3, 4], group_sizes=[8, 32], head="auto", embedding="auto", budget={"bytes": 1000})
    body["variants"] = {"mixed": [{"quantize": step.model_dump(exclude={"kind"}, exclude_defaults=True)}]}
    body["runtimes"] = {"base": ["transformers"], "variants": ["onnxruntime"]}
    body["evaluate"] = {"name": "text", "divergence": {"text": "held-out-text"}}
    body["gate"] = [{"metric": "kl_mean", "max": 1.0}]
    found = Problems("recipe.yaml")
    recipe = Recipe.model_validate(body)
    shapes = Shapes(recipe)
    shapes.add("base", Start(config, "bfloat16"))
    check_steps(recipe, shapes, "cpu", found)
    check_runtimes(recipe, found)
    said = {problem.path.removeprefix("variants.mixed.0.quantize."): problem.message for problem in found.found}
    assert said.keys() == {"head", "budget", "group_sizes"}
    assert "head and embedding are one matrix here" in said["head"]
    assert "no groups of 8" in said["group_sizes"]
