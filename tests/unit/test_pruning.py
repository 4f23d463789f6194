"""Pruning: what is chosen, what is cut, and what is fitted, against arithmetic of its own."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from pennyweight import checkpoints, cli
from pennyweight.columns import spans
from pennyweight.errors import StageError, StoreError, UsageError
from pennyweight.plan.shapes import config_after
from pennyweight.pruning import depth
from pennyweight.pruning.columns import without_inputs
from pennyweight.pruning.config import cut_config, kept_channels, pruned_config
from pennyweight.pruning.refit import refit
from pennyweight.pruning.scan import format_scan, scan
from pennyweight.pruning.trials import Trials
from pennyweight.quantization import decoder
from pennyweight.quantization.walk import Block, at_the_first_block
from pennyweight.recipe import Prune
from pennyweight.steps import StepContext, prune
from pennyweight.store import Store

WINDOWS = torch.randint(1, 200, (16, 16), generator=torch.Generator().manual_seed(3))
SMALL = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 8},
}


def small_model(kind: str = "llama", seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**SMALL, **KINDS[kind], **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases and norms of which each channel has its own value, so that a wrong cut shows
        for value in model.parameters():
            if value.ndim == 1:
                value.add_(0.3 * torch.randn_like(value))
    return model.eval().requires_grad_(False)


def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(ids).logits.float(), -1)


def divergence(model: Any, other: Any, ids: torch.Tensor = WINDOWS) -> float:
    expected, found = log_probabilities(model, ids), log_probabilities(other, ids)
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


def without(model: Any, removed: tuple[int, ...], tmp_path: Path) -> Any:
    """The model without some blocks, by way of its file: tensors under new names, and a config of fewer layers."""
    config = cut_config(json.loads(model.config.to_json_string(use_diff=False)), list(removed))
    kept = [index for index in range(model.config.num_hidden_layers) if index not in removed]
    tensors = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if "layers" in parts:
            if int(parts[2]) in removed:
                continue
            parts[2] = str(kept.index(int(parts[2])))
        tensors[".".join(parts)] = value
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    made.load_state_dict(tensors)
    return made.eval()


def silence(block: Any) -> None:
    """Make a block hand on what it gets."""
    for name, linear in block.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            linear.weight.data.zero_()


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_of_a_removal_is_that_of_the_smaller_model(kind: str, tmp_path: Path) -> None:
    model = small_model(kind)
    trials = Trials(model, WINDOWS, 4)
    for removed in ((), (1,), (0, 3), (2, 3, 5)):
        expected = divergence(model, without(model, removed, tmp_path))
        assert trials.kl(removed) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_trials_that_share_blocks_are_those_measured_alone() -> None:
    model = small_model()
    together, removals = Trials(model, WINDOWS, 8), [frozenset(pair) for pair in combinations(range(6), 2)]
    found = together.of(removals, together.batches)
    for removed, value in zip(removals, found):
        alone = Trials(model, WINDOWS, 8)
        torch.testing.assert_close(value, alone.of([removed], alone.batches)[0])
    assert together.passes < 2 * sum(6 - 2 for _ in removals)


def test_influence_is_one_minus_the_cosine_of_what_goes_in_and_comes_out() -> None:
    model = small_model()
    with torch.no_grad():
        states = model.model(WINDOWS, output_hidden_states=True).hidden_states
    influence = Trials(model, WINDOWS, 4).influence()
    for index in range(5):  # the last state is normed
        before, after = states[index], states[index + 1]
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        assert influence[index] == pytest.approx(1 - cosine.mean().item(), abs=1e-5)


@pytest.mark.parametrize("measure", ["kl", "influence"])
def test_a_block_that_does_nothing_goes_first_and_costs_nothing(measure: str) -> None:
    model = small_model()
    silence(model.model.layers[3])
    choices = depth.choose(model, WINDOWS, 2, measure, lambda *_: None)
    assert choices[0].removed == {3}
    assert choices[0].kl == pytest.approx(0, abs=1e-6)
    assert 3 in choices[1].removed and choices[1].kl > 1e-3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_search_finds_the_best_choice_that_there_is(seed: int) -> None:
    model = small_model(seed=seed, initializer_range=0.5)
    trials = Trials(model, WINDOWS, 16)
    found = depth.by_divergence(trials, 3, lambda *_: None)
    for choice in found:
        best = min(combinations(range(6), len(choice.removed)), key=trials.kl)
        assert sorted(choice.removed) == sorted(best)
        assert choice.kl == trials.kl(best)


def test_exchanges_repair_a_bad_choice() -> None:
    model = small_model(initializer_range=0.5)
    trials = Trials(model, WINDOWS, 16)
    worst = max(combinations(range(6), 2), key=trials.kl)
    best = min(combinations(range(6), 2), key=trials.kl)
    found = depth.exchanged(trials, depth.Choice(frozenset(worst), trials.kl(worst)))
    assert sorted(found.removed) == sorted(best)


def test_what_stays_of_a_layer_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    weight = torch.randn(10, 24, generator=generator)
    for together, keep in ((1, 15), (4, 3)):
        kept, fitted = without_inputs(weight, inputs.T @ inputs, keep, together, dampening=1e-9)
        assert len(kept) == keep * together
        assert kept.view(-1, together)[:, 0].remainder(together).eq(0).all()
        expected = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.T).solution.T
        torch.testing.assert_close(fitted, expected, rtol=1e-3, atol=1e-3)


def test_inputs_go_whose_loss_the_others_can_make_up_for() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 6, generator=generator)
    inputs[:, 2] = inputs[:, 0] + inputs[:, 1]  # a large one that the others can replace
    weight = torch.ones(3, 6)
    weight[:, 1], weight[:, 4] = 3, 0.1
    kept, _ = without_inputs(weight, inputs.T @ inputs, 4, dampening=1e-6)
    assert 4 not in kept
    assert len({0, 1, 2} & set(kept.tolist())) == 2


def test_the_best_pair_of_groups_stays() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(300, 12, generator=generator)
    weight = torch.randn(5, 12, generator=generator)

    def loss(groups: tuple[int, ...]) -> float:
        columns = [index for group in groups for index in range(3 * group, 3 * group + 3)]
        solution = torch.linalg.lstsq(inputs[:, columns], inputs @ weight.T).solution
        return (inputs @ weight.T - inputs[:, columns] @ solution).square().sum().item()

    kept, _ = without_inputs(weight, inputs.T @ inputs, 3, 3, dampening=1e-9)
    assert {int(index) // 3 for index in kept} == set(min(combinations(range(4), 3), key=loss))


def test_a_refit_brings_back_a_weight_that_was_disturbed() -> None:
    model = small_model()
    windows = torch.randint(1, 200, (64, 16), generator=torch.Generator().manual_seed(5))
    ids = list(windows.split(8))
    states, keywords = at_the_first_block(model, model.model.layers, ids)
    block = Block("0", model.model.layers[0], states, keywords[0])
    goal, down = list(block.run()), block.module.mlp.down_proj
    right = down.weight.clone()
    down.weight.data += 0.3 * torch.randn_like(right)
    before = (down.weight - right).norm()
    assert refit(block, down, goal, 1)
    assert (down.weight - right).norm() < 0.05 * before
    assert not refit(block, down, list(block.run()), 1)  # nothing is left to gain


def test_a_block_that_norms_what_its_net_adds_is_left_alone() -> None:
    model = small_model("gemma2")
    states, keywords = at_the_first_block(model, model.model.layers, [WINDOWS])
    block = Block("0", model.model.layers[0], states, keywords[0])
    weight = block.module.mlp.down_proj.weight.clone()
    assert not refit(block, block.module.mlp.down_proj, [2 * goal for goal in block.run()], 1)
    assert torch.equal(block.module.mlp.down_proj.weight, weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [{"layers": 2}, {"drop": [0, 3], "refit": False}, {"ffn": 0.5}, {"kv_groups": 1}, {"layers": 1, "ffn": 0.25}],
    ids=str,
)
def test_every_architecture_loads_what_was_made_of_it(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    source, files = tmp_path / "source", tmp_path / "made"
    files.mkdir()
    base = small_model(kind)
    base.to(torch.bfloat16).save_pretrained(source)
    step = Prune(text="any", samples=16, length=16, **settings)
    record = prune.run(checkpoints.describe(source, "test"), step, StepContext("cpu", 0, WINDOWS.numpy()), files)
    made = checkpoints.describe(files, "test")
    config = checkpoints.read_config(files)
    assert config["num_hidden_layers"] == record.layers[1] == 6 - step.removed_layers
    assert record.parameters == (checkpoints.describe(source, "test").parameters, made.parameters)
    assert made.dtype == "bfloat16" and record.reload_difference < 0.3
    model = AutoModelForCausalLM.from_pretrained(files, dtype=torch.float32)
    assert made.parameters == sum(value.numel() for value in model.parameters())
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert record.kl == pytest.approx(divergence(whole, model, WINDOWS[-step.held_out :]), rel=0.1, abs=0.01)
    layer = model.model.layers[0]
    if step.ffn:
        assert layer.mlp.down_proj.in_features == config["intermediate_size"] == {0.5: 32, 0.25: 48}[step.ffn]
    if step.kv_groups:
        assert (layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features) == (16, 8)
        assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 8)


def test_a_sliding_window_stays_with_its_block() -> None:
    config = {"model_type": "gemma2", **SMALL, **KINDS["gemma2"]}
    kinds = AutoConfig.for_model(**config).layer_types
    cut = cut_config(config, [1, 2])
    assert cut["layer_types"] == [kinds[0], *kinds[3:]]
    assert "layer_types" not in config
    assert cut_config({"model_type": "llama", **SMALL}, [1]) == {"model_type": "llama", **SMALL, "num_hidden_layers": 5}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": 6, "text": "any"}, "6 of 6 blocks leave none; take out 5 at most"),
        ({"drop": [1, 6]}, "blocks 0 to 5, and none of number 6"),
        ({"kv_groups": 2, "text": "any"}, "2 of 2 key/value heads leave none; take out 1 at most"),
        ({"ffn": 0.001, "text": "any"}, "8 at a time"),
    ],
)
def test_more_than_there_is_cannot_be_taken_out(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        pruned_config({"model_type": "llama", **SMALL}, Prune(**settings))
    source = tmp_path / "source"
    small_model().save_pretrained(source)
    with pytest.raises(StageError, match=words):
        prune.run(checkpoints.describe(source, "test"), Prune(**settings), StepContext("cpu", 0), tmp_path)


#: Decoders that are put together in another way than Llama's.
OTHERS: dict[str, dict[str, Any]] = {
    "phi3": {},
    "mixtral": {"num_local_experts": 2},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    "olmo2": {},
    "gpt2": {"n_embd": 32, "n_layer": 6, "n_head": 4},
}


def other_model(kind: str) -> Any:
    torch.manual_seed(0)
    body = {"vocab_size": 200} if kind == "gpt2" else SMALL
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**body, **OTHERS[kind]})).eval()


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("phi3", {"ffn": 0.5}, "the linear layers o_proj, qkv_proj, gate_up_proj, down_proj, and no feed-forward net"),
        ("phi3", {"kv_groups": 1}, "qkv_proj, gate_up_proj, down_proj, and no q_proj; leave `kv_groups` out"),
        ("mixtral", {"ffn": 0.5}, "MixtralDecoderLayer has experts, and no feed-forward net of 64 channels"),
        ("qwen3_moe", {"ffn": 0.5}, "Qwen3MoeDecoderLayer has experts"),
        ("olmo2", {"kv_groups": 1}, "Olmo2Attention holds more than heads of 8"),
        ("gpt2", {"ffn": 0.5}, "ffn: the model's config states no single `intermediate_size`"),
    ],
)
def test_blocks_that_cannot_be_made_narrower_are_refused_from_the_config(
    kind: str, settings: dict[str, Any], words: str
) -> None:
    config = {"model_type": kind, **({} if kind == "gpt2" else SMALL), **OTHERS[kind]}
    with pytest.raises(ValueError, match=words):
        config_after(config, Prune(text="any", **settings))
    assert config_after(config, Prune(drop=[1])) != config


@pytest.mark.parametrize("settings", [{"drop": [0]}, {"layers": 2, "text": "any"}])
def test_blocks_that_would_be_of_another_kind_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    """DeepSeek's first blocks, by number, have no experts."""
    config = {
        "model_type": "deepseek_v3", **SMALL, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    }  # fmt: skip
    with pytest.raises(ValueError, match="without block 0, block 1 becomes number 0, which is put together in another"):
        config_after(config, Prune(**settings))
    assert config_after(config, Prune(drop=[1, 4]))["num_hidden_layers"] == 4
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(tmp_path)
    with pytest.raises(StageError, match="prune: without block 0"):
        prune.run(checkpoints.describe(tmp_path, "test"), Prune(**settings), StepContext("cpu", 0), tmp_path)


def test_blocks_whose_kind_moves_with_them_can_go() -> None:
    """Qwen3-Next lists the kind of each block."""
    config = {
        "model_type": "qwen3_next",
        **SMALL,
        "num_experts": 2,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 8,
    }
    made = config_after(config, Prune(layers=2, text="any"))
    assert made["num_hidden_layers"] == 6 == len(made["layer_types"])
    assert len(set(made["layer_types"])) == 2


@pytest.mark.parametrize("kind", OTHERS)
def test_other_decoders_lose_blocks_under_the_names_of_their_own_files(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where transformers computes with other tensors than the files have, and in another dtype."""
    monkeypatch.setattr(decoder, "compute_dtype", lambda stored, device: torch.float32)
    source, files = tmp_path / "source", tmp_path / "made"
    files.mkdir()
    other_model(kind).to(torch.bfloat16).save_pretrained(source)
    step = Prune(layers=2, text="any", samples=16, length=16)
    record = prune.run(checkpoints.describe(source, "test"), step, StepContext("cpu", 0, WINDOWS.numpy()), files)
    assert record.layers == (6, 4) and record.reload_difference < 0.05
    known = {(tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in checkpoints.read_headers(source)}
    made = {(tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in checkpoints.read_headers(files)}
    assert made < known


def test_a_decoder_whose_blocks_hand_on_more_than_states_is_refused() -> None:
    config = AutoConfig.for_model("falcon", vocab_size=200, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    with pytest.raises(StageError, match="hands on more than hidden states"):
        Trials(AutoModelForCausalLM.from_config(config).eval(), WINDOWS, 4)


@pytest.mark.parametrize("settings", [{"layers": 1, "text": "any"}, {"drop": [0]}])
def test_the_only_block_stays(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="1 of 1 blocks leave none; it has no other"):
        pruned_config({"model_type": "llama", **SMALL, "num_hidden_layers": 1}, Prune(**settings))


def test_a_model_that_transformers_does_not_know_is_refused_in_a_line() -> None:
    with pytest.raises(ValueError) as caught:
        pruned_config({"model_type": "nothing", **SMALL}, Prune(drop=[0]))
    assert str(caught.value) == "transformers knows no model type 'nothing'"


def test_a_head_count_that_the_architecture_does_not_allow_is_refused() -> None:
    config = {"model_type": "llama", **SMALL, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4}
    assert cut_config(config, [], kv_groups=4)["num_attention_heads"] == 4
    with pytest.raises(ValueError, match="no such shape"):
        cut_config(config, [], kv_groups=1)


def test_channels_that_stay_are_a_multiple_that_groups_fit_in() -> None:
    assert kept_channels(1536, 0.25) == 1152
    assert kept_channels(1536, 0.3) == 1024
    assert kept_channels(64, 0.25) == 48
    assert kept_channels(4864, 0.5) == 2432
    assert kept_channels(100, 0.5) == 48


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "takes nothing out"),
        ({"layers": 2}, "is chosen by text; add `text: boolq-passages`"),
        ({"layers": 2, "drop": [1], "text": "any"}, "keep one of the two"),
        ({"drop": [1, 1]}, "names block 1 twice"),
        ({"drop": [-1]}, "greater than or equal to 0"),
        ({"ffn": 1.0, "text": "any"}, "less than 1"),
        ({"ffn": 0, "text": "any"}, "greater than 0"),
        ({"kv_groups": 0, "text": "any"}, "greater than or equal to 1"),
        ({"ffn": 0.5, "choose": "influence", "text": "any"}, "`choose` needs `layers`"),
        ({"drop": [1], "samples": 64}, "`samples` is about `text`, and there is none"),
        ({"drop": [1], "allow_overlap": True}, "`allow_overlap` is about `text`"),
        ({"sparsity": "2:4"}, "sparse tensor cores"),
        ({"sparsity": "unstructured"}, "no runtime here"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Prune(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": 1, "text": "any"}, "prune 1 layer by kl, refitted"),
        ({"drop": [5, 2, 3, 4, 9], "kv_groups": 1, "text": "any"}, "prune layers 2–5, 9, 1 KV group, refitted"),
        ({"drop": [2]}, "prune layer 2"),
    ],
)
def test_a_step_says_what_it_takes(settings: dict[str, Any], words: str) -> None:
    step = Prune(**settings)
    assert step.describe() == words
    assert Prune.model_validate(step.model_dump(mode="json")) == step


def test_a_scan_prints_what_each_removal_costs(tiny_model: Path) -> None:
    windows = torch.randint(1, 512, (4, 16), generator=torch.Generator().manual_seed(0)).numpy()
    found = scan(checkpoints.describe(tiny_model, "tiny"), "some", windows, 1, lambda *_: None)
    assert found.layers == 2 and len(found.by_kl) == len(found.by_influence) == 1
    assert found.by_kl[0].kl <= found.by_influence[0].kl
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    block = sum(value.numel() for value in model.model.layers[0].parameters())
    assert found.parameters == sum(value.numel() for value in model.parameters())
    assert found.by_kl[0].parameters == found.parameters - block
    lines = format_scan(found).splitlines()
    assert f"{found.by_kl[0].kl:.4f}" in lines[1] and "█" in lines[1]
    assert lines[1].split()[:5] == [
        "1",
        "of",
        "2",
        f"{1 - block / found.parameters:.0%}",
        str(found.by_kl[0].removed[0]),
    ]
    checkpoint = checkpoints.describe(tiny_model, "tiny")
    with pytest.raises(UsageError, match="--layers 2: 2 of 2 blocks leave none"):
        scan(checkpoint, "some", windows, 2, lambda *_: None)
    with pytest.raises(UsageError, match="the model knows 512 positions"):
        scan(checkpoint, "some", windows.reshape(1, -1).repeat(16, 1), 1, lambda *_: None)


def test_a_scan_that_cannot_be_is_refused_in_a_line(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    for name, changes, words in (
        ("quantized", {"quantization_config": {"quant_method": "awq"}}, "is quantized already, in awq format"),
        ("unknown", {"model_type": "nothing"}, "transformers knows no model type 'nothing'"),
    ):
        folder = shutil.copytree(tiny_model, tmp_path / name)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        done = CliRunner(env={"PENNYWEIGHT_HOME": str(tmp_path / "store")}).invoke(
            cli.main, ["prune-scan", str(folder), "--text", "boolq-passages", "--layers", "1"]
        )
        assert done.exit_code == 2 and words in done.stderr, done.output


def test_numbers_in_a_row_are_a_span() -> None:
    assert spans([]) == ""
    assert spans([0, 2, 3, 5, 6, 7, 9]) == "0, 2, 3, 5–7, 9"


def test_what_is_measured_is_told_while_it_is_made(tmp_path: Path) -> None:
    source, narrower = tmp_path / "source", tmp_path / "narrower"
    small_model().save_pretrained(source)
    told: list[tuple[int, dict[str, float]]] = []
    context = StepContext("cpu", 0, WINDOWS.numpy(), measure=lambda step, values: told.append((step, dict(values))))
    step = Prune(text="any", samples=16, length=16, layers=2)
    (tmp_path / "shorter").mkdir()
    record = prune.run(checkpoints.describe(source, "test"), step, context, tmp_path / "shorter")
    assert told == [
        *((number, {"held_out_kl": kl}) for number, kl in record.curve),
        (2, {"held_out_kl_fitted": record.kl}),
    ]
    assert [number for number, _ in record.curve] == [1, 2]
    narrower.mkdir()
    shorter = checkpoints.describe(tmp_path / "shorter", "test").model_copy(update={"pruning": record})
    again = prune.run(shorter, Prune(text="any", samples=16, length=16, ffn=0.5), context, narrower)
    assert again.all == [record, again] and record.all == [record]
    assert told[-1] == (0, {"held_out_kl_fitted": again.kl})


def test_a_disk_that_is_full_leaves_nothing_and_the_next_try_has_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    source, store = tmp_path / "source", Store(tmp_path / "store")
    small_model().save_pretrained(source)
    write = huggingface_hub.save_torch_state_dict

    def full(tensors: Any, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    def build(files: Path) -> dict[str, Any]:
        step = Prune(drop=[1])
        return prune.run(checkpoints.describe(source, "test"), step, StepContext("cpu", 0), files).model_dump(
            mode="json"
        )

    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", full)
    with pytest.raises(StoreError, match="no space left on the disk"):
        store.get_or_build("step", {}, build)
    assert not list((tmp_path / "store" / "tmp").iterdir()) and store.find("step", {}) is None
    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", write)
    made = store.get_or_build("step", {}, build)
    assert not made.reused and checkpoints.describe(made.files, "test").parameters == made.record["parameters"][1]
