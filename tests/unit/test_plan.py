"""The preflight: exact sizes of a tiny decoder, what cannot work, what will not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pennyweight import installed, machine, plan, sources, speed
from pennyweight.errors import SourceError
from pennyweight.plan import Plan, constants, make_plan, sizes
from pennyweight.plan.problems import group_sizes
from pennyweight.plan.sizes import model_shape
from pennyweight.recipe import Base, Quantize, Recipe
from pennyweight.records import Measured
from pennyweight.store import Store

CONFIG = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 160,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
UNTIED = CONFIG | {"tie_word_embeddings": False}

# Matrices of one layer, (out, in): q and o, k and v, gate and up, down.
LAYER = 2 * 96 * 96 + 2 * 32 * 96 + 2 * 160 * 96 + 96 * 160
EMBEDDING = 160 * 96
NORMS = 5 * 96

SPEED = Measured(threads=2, read_gb_per_s=10.0, gflops_fp32=100.0, gflops_bf16=200.0)


def step(**settings: Any) -> Quantize:
    return Quantize(**{"scheme": "w4a16", "group_size": 32, **settings})


def recipe(steps: dict[str, list[dict[str, Any]]] | None = None, **settings: Any) -> Recipe:
    body = {
        "name": "tiny",
        "base": "hf:me/tiny@main",
        "device": "cpu",
        "variants": steps or {"int4": [{"quantize": {"scheme": "w4a16", "group_size": 32}}]},
        "runtimes": {"base": ["transformers", "onnxruntime"], "variants": ["onnxruntime"]},
        "evaluate": {"name": "smoke", "divergence": {"text": "news", "windows": 2, "length": 32}, "tasks": []},
        "gate": [{"metric": "kl_mean", "max": 0.1}],
        "benchmark": {
            "workload": {"input_tokens": 16, "output_tokens": 8},
            "concurrency": [1, 4],
            "decide_at": 1,
            "rounds": 3,
            "decide_rounds": 8,
            "price": {"name": "mine", "usd_per_hour": 1.0},
        },
        "register": "tiny",
    }
    return Recipe.model_validate(body | settings)


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """A machine of known speed with room to spare, and a base whose config can be had."""
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setattr(speed, "measure", lambda device="cpu": SPEED)
    monkeypatch.setattr(machine, "has_native_bf16", lambda: True)
    monkeypatch.setattr(machine, "free_disk_bytes", lambda _: 10**12)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 10**12)
    monkeypatch.setattr(installed, "missing_packages", lambda runtime, device: [])
    monkeypatch.setattr(installed, "conflicts", lambda gpu: [])
    monkeypatch.setattr(sources, "base_config", lambda base, store: CONFIG)
    return Store(tmp_path)


def problems(made: Plan) -> list[tuple[str, str]]:
    return [(problem.path, problem.message) for problem in made.problems]


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_shape_of_a_tiny_llama() -> None:
    shape = model_shape(CONFIG, "bfloat16")
    assert shape.linears["model.layers.1.mlp.down_proj"] == (96, 160)
    assert shape.linears["model.layers.0.self_attn.k_proj"] == (32, 96)
    assert len(shape.linears) == 14
    assert (shape.head, shape.head_name, shape.tied) == ((160, 96), "lm_head", True)
    assert shape.parameters == EMBEDDING + 2 * LAYER + NORMS
    assert shape.product_weights == EMBEDDING + 2 * LAYER
    assert shape.kv_bytes(itemsize=4) == 2 * 2 * 1 * 32 * 4
    assert model_shape(UNTIED, "bfloat16").parameters == shape.parameters + EMBEDDING


def test_dense_bytes() -> None:
    assert sizes.dense_bytes(model_shape(CONFIG, "bfloat16")) == 2 * (EMBEDDING + 2 * LAYER + NORMS)
    assert sizes.dense_bytes(model_shape(UNTIED, "float32")) == 4 * (2 * EMBEDDING + 2 * LAYER + NORMS)


def test_packed_bytes_by_hand() -> None:
    rest, shapes = 2 * (EMBEDDING + NORMS), 14 * 16
    scales = 2 * (2 * LAYER // 32)
    assert sizes.packed_bytes(model_shape(CONFIG, "bfloat16"), step()) == rest + LAYER + scales + shapes
    assert (
        sizes.packed_bytes(model_shape(CONFIG, "bfloat16"), step(scheme="w8a16")) == rest + 2 * LAYER + scales + shapes
    )


def test_a_quantized_tied_head_is_stored_beside_the_embedding() -> None:
    body = sizes.packed_bytes(model_shape(CONFIG, "bfloat16"), step())
    head = EMBEDDING + 2 * EMBEDDING // 32 + 16
    assert sizes.packed_bytes(model_shape(CONFIG, "bfloat16"), step(head="w8a16")) == body + head
    assert sizes.packed_bytes(model_shape(UNTIED, "bfloat16"), step(head="w8a16")) == body + head


@pytest.mark.parametrize(("scheme", "zeros"), [("w4a16", 4), ("w8a16", 8)])
def test_zero_points_are_packed_along_the_output(scheme: str, zeros: int) -> None:
    shape = model_shape(CONFIG, "bfloat16")
    more = sizes.packed_bytes(shape, step(scheme=scheme, symmetric=False)) - sizes.packed_bytes(
        shape, step(scheme=scheme)
    )
    assert more == 2 * LAYER // 32 * zeros // 8


@pytest.mark.parametrize("bits", [4, 8])
def test_odd_vocabulary_and_zero_points_equal_a_real_checkpoint(bits: int) -> None:
    """Files that llm-compressor 0.14 wrote for these shapes, vocabulary 130."""
    shape = model_shape(CONFIG | {"vocab_size": 130}, "bfloat16")
    assert sizes.packed_bytes(shape, step(scheme=f"w{bits}a16", symmetric=False)) == {4: 107840, 8: 180704}[bits]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scheme", ["w3a16", "w4a16", "w8a16"])
def test_packed_bytes_equal_the_tensors_written(scheme: str, symmetric: bool) -> None:
    """130 rows of 3-bit zero points end within a word."""
    import torch

    from pennyweight.quantization import grid, packed

    shape = model_shape(CONFIG | {"vocab_size": 130}, "bfloat16")
    settings = step(scheme=scheme, symmetric=symmetric, head=scheme.replace("w3", "w4"))
    expected, itemsize = sizes.dense_bytes(shape), 2
    for name, (rows, columns, bits) in sizes.quantized_layers(shape, settings).items():
        weight = torch.rand(rows, columns)
        chosen = grid.Grid(bits, 32, symmetric)
        layer = grid.round_to_nearest(weight, *grid.find_scales(weight, chosen, torch.bfloat16), chosen)
        expected += sum(value.nbytes for value in packed.layer_tensors(name, layer, torch.bfloat16).values())
        expected -= 0 if name == "lm_head" else rows * columns * itemsize
    assert sizes.packed_bytes(shape, settings) == expected


def test_packed_bytes_equal_what_the_step_writes(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from pennyweight import checkpoints
    from pennyweight.steps import StepContext, quantize

    base, quantized = tmp_path / "base", tmp_path / "quantized"
    AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG), dtype="bfloat16").save_pretrained(base)
    write_tokenizer(base)
    settings = step(head="w8a16", ignore=["re:.*k_proj", "model.layers.0.mlp.up_proj"])
    quantized.mkdir()
    quantize.run(checkpoints.describe(base, "test"), settings, StepContext("cpu", 0), quantized)
    written = checkpoints.describe(quantized, "test").weight_bytes
    assert sizes.packed_bytes(model_shape(CONFIG, "bfloat16"), settings) == written


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "settings", "written"),
    [
        (CONFIG | {"vocab_size": 130}, None, 623360),
        (UNTIED | {"vocab_size": 130}, None, 673280),
        (UNTIED | {"vocab_size": 130}, {"symmetric": False}, 196352),
        (CONFIG | {"vocab_size": 130}, {"ignore": ["re:.*k_proj"]}, 166400),
        (CONFIG, {"head": "w8a16"}, 175232),
        (UNTIED, {"scheme": "w8a16", "head": "w4a16"}, 238208),
        (CONFIG, {"embedding": "w8a16"}, 113792),
        (CONFIG, {"embedding": "w4a16", "symmetric": False}, 106112),
        (CONFIG, {"embedding": "w8a16", "head": "w4a16"}, 123392),
        (UNTIED, {"scheme": "w3a16", "embedding": "w3a16", "symmetric": False}, 167552),
    ],
)
def test_onnx_bytes_equal_real_exports(config: dict, settings: dict | None, written: int) -> None:
    """Files that onnxruntime-genai 0.18 wrote for these shapes: the tensors larger than 1 KiB."""
    chosen = None if settings is None else step(**settings)
    assert sizes.onnx_bytes(model_shape(config, "bfloat16"), chosen, "cpu") == written


def test_onnx_bytes_of_the_real_model() -> None:
    """SmolLM2-135M-Instruct, groups of 64."""
    config = CONFIG | {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
    }  # fmt: skip
    shape = model_shape(config, "bfloat16")
    assert sizes.dense_bytes(shape) == 269_030_016
    assert sizes.packed_bytes(shape, step(group_size=64, head="w8a16")) == 142_294_960
    assert sizes.onnx_bytes(shape, None, "cpu") == 540_157_184
    assert sizes.onnx_bytes(shape, step(group_size=64, symmetric=False), "cpu") == 176_102_144
    assert sizes.onnx_bytes(shape, step(scheme="w8a16", group_size=64, symmetric=False), "cpu") == 229_946_624
    assert sizes.onnx_bytes(shape, step(group_size=64, head="w8a16"), "cpu") == 205_284_608


def test_float16_on_cuda_halves_the_float_tensors() -> None:
    shape = model_shape(CONFIG | {"hidden_size": 576, "vocab_size": 512}, "bfloat16")
    assert sizes.onnx_bytes(shape, None, "cuda") * 2 == sizes.onnx_bytes(shape, None, "cpu")


# --- what cannot work -------------------------------------------------------------------------------------------------


def test_a_sound_recipe_has_no_problems(calm: Store) -> None:
    made = make_plan(recipe(), calm)
    assert made.problems == []
    assert [(stage.stage, stage.subject) for stage in made.stages] == [
        ("source", "base"),
        ("data", "none"),
        ("data", "token windows"),
        ("quantize", "int4"),
        ("export", "base@onnxruntime"),
        ("export", "int4@onnxruntime"),
        ("reference", "base@transformers"),
        ("evaluate", "base@transformers"),
        ("evaluate", "base@onnxruntime"),
        ("evaluate", "int4@onnxruntime"),
        ("benchmark", "all candidates"),
        ("track", "tiny"),
    ]
    assert made.weight_bytes("source", "base") == 2 * (EMBEDDING + 2 * LAYER + NORMS)
    assert made.weight_bytes("quantize", "nonesuch") is None
    assert made.expected_seconds("benchmark", "all candidates") > 0
    assert (
        Plan.model_validate(made.model_dump(exclude={"seconds", "peak_memory_bytes", "disk_bytes", "download_bytes"}))
        == made
    )


def test_a_group_that_does_not_divide_names_the_layer_and_sizes_that_would_do(calm: Store) -> None:
    made = make_plan(recipe({"int4": [{"quantize": {"scheme": "w4a16", "group_size": 64}}]}), calm)
    (problem,) = made.problems
    assert problem.path == "variants.int4.0.quantize.group_size"
    assert problem.message == "64 does not divide 96, the input size of model.layers.0.self_attn.q_proj and 13 more"
    assert problem.hint == "these sizes would do: 16, 32"
    assert problem.kind == "recipe"


def test_a_group_that_does_not_divide_the_head(calm: Store) -> None:
    settings = {"scheme": "w4a16", "group_size": 32, "head": "w8a16"}
    config = CONFIG | {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 160}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "base_config", lambda base, store: config)
        ignored = {**settings, "ignore": ["re:.*(q|k|v|o|gate|up)_proj"]}
        made = make_plan(recipe({"int4": [{"quantize": ignored}]}), calm)
    assert problems(made) == [
        ("variants.int4.0.quantize.group_size", "32 does not divide 48, the input size of lm_head")
    ]
    assert made.problems[0].hint == "these sizes would do: 16"


def test_onnxruntime_takes_powers_of_two(calm: Store) -> None:
    steps = {"int4": [{"quantize": {"scheme": "w4a16", "group_size": 8}}]}
    assert problems(make_plan(recipe(steps), calm)) == [
        ("variants.int4.0.quantize.group_size", "onnxruntime has no groups of 8: powers of two from 16 on")
    ]
    assert make_plan(recipe(steps, runtimes=["transformers"]), calm).problems == []


@pytest.mark.parametrize(
    ("inputs", "exported", "found"),
    [
        ([576, 1536], True, [16, 32, 64]),
        ([96, 160], False, [8, 16, 32]),
        ([4096, 14336], True, [16, 32, 64, 128, 256, 512, 1024]),
        ([100], True, []),
    ],
)
def test_group_sizes(inputs: list[int], exported: bool, found: list[int]) -> None:
    assert group_sizes(inputs, exported) == found


def test_a_head_that_the_exporter_cannot_pack(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPTQ layout packs 32 // bits rows of zero points into one integer."""
    monkeypatch.setattr(sources, "base_config", lambda base, store: CONFIG | {"vocab_size": 131})
    made = make_plan(recipe({"a": [{"quantize": {"scheme": "w4a16", "group_size": 32, "head": "w8a16"}}]}), calm)
    assert problems(made) == [
        ("variants.a.0.quantize.head", "onnxruntime's exporter packs 4 rows at a time, and lm_head has 131")
    ]


BACKEND = {"backend": "llm-compressor", "group_size": 32}
TEXT = {"calibrate": {"source": "wiki", "samples": 2, "length": 32}}


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"scheme": "w8a8"}, "scheme", "onnxruntime cannot load w8a8: it rounds activations"),
        ({"scheme": "w4a8", "group_size": 32}, "scheme", "onnxruntime cannot load w4a8: it rounds activations"),
        ({"scheme": "fp8"}, "scheme", "onnxruntime cannot load fp8: it rounds activations"),
        (
            {"scheme": "w8a16", **BACKEND, "kv_cache": "fp8", **TEXT},
            "kv_cache",
            "onnxruntime cannot load the scales of a quantized KV cache",
        ),
    ],
    ids=lambda value: value["scheme"] if isinstance(value, dict) else None,
)
def test_what_onnxruntime_cannot_load(calm: Store, settings: dict[str, Any], key: str, message: str) -> None:
    steps = {"a": [{"quantize": settings}]}
    made = make_plan(recipe(steps), calm)
    assert problems(made) == [(f"variants.a.0.quantize.{key}", message)]
    assert "transformers" in made.problems[0].hint
    assert make_plan(recipe(steps, runtimes=["transformers"]), calm).problems == []


def test_notes_say_on_how_many_rounds_a_saving_is_judged(calm: Store) -> None:
    gate = [{"saving_at_least": 0.3}, {"saving_at_least": 0.0, "concurrency": 4}]
    notes = make_plan(recipe(gate=gate), calm).notes
    assert "the saving at 1 is judged on 8 rounds, benchmark.decide_rounds" in notes
    assert "the saving at 4 is judged on 3 rounds, benchmark.rounds" in notes


def test_notes_say_what_transformers_only_imitates(calm: Store) -> None:
    steps = {
        "a": [{"quantize": {"scheme": "fp8", "kv_cache": "fp8", **TEXT}}],
        "b": [{"quantize": {"scheme": "w4a16", "group_size": 32}}],
    }
    notes = make_plan(recipe(steps, runtimes=["transformers"]), calm).notes
    (fp8,) = [note for note in notes if note.startswith("fp8 in transformers: activations are rounded")]
    assert "compute capability 8.9" in fp8
    assert len([note for note in notes if note.startswith("fp8 kv_cache in transformers")]) == 1
    assert not any("w8a8" in note or "w4a8" in note for note in notes)
    assert not any("in transformers" in note for note in make_plan(recipe(), calm).notes)


def test_three_bits_take_four_in_onnxruntime(calm: Store) -> None:
    made = make_plan(recipe({"a": [{"quantize": {"scheme": "w3a16", "group_size": 32}}]}), calm)
    assert made.problems == []
    four = make_plan(recipe(), calm).weight_bytes("export", "int4@onnxruntime")
    assert made.weight_bytes("export", "a@onnxruntime") == four
    assert [note for note in made.notes if note.startswith("w3a16 in onnxruntime: it has no 3-bit integers")]


@pytest.mark.parametrize(
    ("settings", "message", "extra"),
    [
        ({"scheme": "w8a8"}, "llm-compressor is not installed", "llm-compressor"),
        (
            {"scheme": "w4a16", "group_size": 32, "method": "autoround", **TEXT},
            "auto-round is not installed",
            "auto-round",
        ),
    ],
)
def test_a_missing_backend_names_its_extra(
    calm: Store, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str, extra: str
) -> None:
    steps = {"a": [{"quantize": settings}], "b": [{"quantize": {"scheme": "w4a16", "group_size": 32}}]}
    monkeypatch.setattr(installed, "installed_version", lambda package: None)
    made = make_plan(recipe(steps, runtimes=["transformers"]), calm)
    assert problems(made) == [("variants.a.0.quantize", message)]
    assert (made.problems[0].kind, made.problems[0].hint) == ("machine", f"pip install 'pennyweight[{extra}]'")
    assert made.missing_extras == [extra]


def test_gptqmodel_needs_a_gpu(calm: Store) -> None:
    settings = {"scheme": "w4a16", "group_size": 32, "method": "gptq", "backend": "gptqmodel", **TEXT}
    (problem,) = make_plan(recipe({"a": [{"quantize": settings}]}), calm).problems
    assert (problem.path, problem.kind) == ("variants.a.0.quantize.backend", "machine")
    assert problem.message == "gptqmodel runs on NVIDIA GPUs, and the device is the CPU"
    assert problem.hint == "remove `backend`: pennyweight's own gptq runs here"


def test_schemes_without_groups_fit_any_width(calm: Store) -> None:
    """128, the default group, divides neither 96 nor 160."""
    steps = {name: [{"quantize": {"scheme": name}}] for name in ("w8a8", "fp8")}
    made = make_plan(recipe(steps, runtimes=["transformers"]), calm)
    assert made.problems == []
    per_byte = 2 * (EMBEDDING + NORMS) + 2 * LAYER + 2 * 2 * (2 * 96 + 2 * 32 + 2 * 160 + 96)
    assert made.weight_bytes("quantize", "w8a8") == made.weight_bytes("quantize", "fp8") == per_byte
    (problem,) = make_plan(recipe({"a": [{"quantize": {"scheme": "w4a8"}}]}, runtimes=["transformers"]), calm).problems
    assert problem.hint == "these sizes would do: 8, 16, 32"


def test_compiling_on_a_cpu_needs_a_compiler(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = {"quantize": {"scheme": "w4a16", "group_size": 32}}
    steps = {"a": [quantize, {"recover": {"text": "wiki", "length": 32, "compile": True}}]}
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    assert make_plan(recipe(steps, runtimes=["transformers"]), calm).problems == []
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    (problem,) = make_plan(recipe(steps, runtimes=["transformers"]), calm).problems
    assert problem.path == "variants.a.1.recover.compile"


def test_recover_needs_packed_integers(calm: Store) -> None:
    steps = {"a": [{"quantize": {"scheme": "w8a8"}}, {"recover": {"text": "wiki", "length": 32}}]}
    (problem,) = make_plan(recipe(steps, runtimes=["transformers"]), calm).problems
    assert problem.path == "variants.a.1.recover"
    assert problem.message == "recover trains the scales of packed integers, which w8a8 has none of"


def test_an_adapter_is_counted_and_needs_a_runtime_that_loads_it(calm: Store) -> None:
    rounding = {"quantize": {"scheme": "w4a16", "group_size": 32}}
    healing = {"recover": {"text": "wiki", "length": 32, "train": ["adapter"], "rank": 8}}
    made = make_plan(recipe({"a": [rounding, healing]}, runtimes=["transformers"]), calm)
    sides = 2 * (96 + 96) + 2 * (96 + 32) + 3 * (96 + 160)
    assert made.weight_bytes("recover", "a") - made.weight_bytes("quantize", "a") == 2 * 8 * 2 * sides
    (problem,) = make_plan(recipe({"a": [rounding, healing]}), calm).problems
    assert problem.path == "variants.a.1.recover.train"
    assert problem.message == "onnxruntime cannot load a checkpoint's adapter"
    (problem,) = make_plan(recipe({"a": [rounding, healing, healing]}, runtimes=["transformers"]), calm).problems
    assert problem.message == "a step after this one would lose the adapter"


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"group_size": 16}, "group_size", "openvino has no groups of 16: multiples of 32"),
        ({"scheme": "w8a16", "symmetric": False}, "symmetric", "openvino has no zero points with 8-bit integers"),
        ({"scheme": "w4a8"}, "scheme", "openvino cannot load w4a8: it rounds activations"),
    ],
)
def test_what_openvino_cannot_load(calm: Store, settings: dict[str, Any], key: str, message: str) -> None:
    steps = {"a": [{"quantize": {"scheme": "w4a16", "group_size": 32} | settings}]}
    found = problems(make_plan(recipe(steps, runtimes=["transformers", "openvino"]), calm))
    assert (f"variants.a.0.quantize.{key}", message) in found


def test_openvino_is_for_cpus(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [{"name": "L4", "memory_gib": 24.0, "driver": "1"}])
    found = problems(make_plan(recipe(device="cuda", runtimes=["transformers", "openvino"]), calm))
    assert ("runtimes", "openvino runs on CPUs, and the device is an NVIDIA GPU") in found


def test_autoround_takes_longer_with_more_iterations(calm: Store) -> None:
    def seconds(iterations: int) -> float:
        settings = {"scheme": "w4a16", "group_size": 32, "method": "autoround", "iterations": iterations, **TEXT}
        return make_plan(recipe({"a": [{"quantize": settings}]}), calm).expected_seconds("quantize", "a")

    each = 3 * 2 * 2 * LAYER * 2 * 32 / (100e9 * constants.TRAINING_EFFICIENCY["float32"])
    assert seconds(1200) - seconds(200) == pytest.approx(1000 * each, rel=1e-6)


@pytest.mark.parametrize(
    ("config", "settings", "found"),
    [
        (CONFIG, {}, ["variants.a.0.quantize.embedding"]),
        (CONFIG, {"head": "w4a16", "ignore": []}, ["variants.a.0.quantize.head"]),
        (CONFIG | {"tie_word_embeddings": False}, {}, []),
    ],
    ids=["shared with the head", "beside a head", "untied"],
)
def test_an_embedding_that_the_exporter_cannot_pack(
    calm: Store, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], settings: dict[str, Any], found: list[str]
) -> None:
    monkeypatch.setattr(sources, "base_config", lambda base, store: config | {"vocab_size": 131})
    quantize = {"scheme": "w4a16", "group_size": 32, "embedding": "w8a16", **settings}
    made = make_plan(recipe({"a": [{"quantize": quantize}]}), calm)
    assert [path for path, _ in problems(made)] == found


def test_ignore_must_match_a_layer(calm: Store) -> None:
    ignore = ["model.layers.0.mlp.down_prj", "re:.*experts.*", "re:(", "re:.*k_proj"]
    made = make_plan(recipe({"a": [{"quantize": {"scheme": "w4a16", "group_size": 32, "ignore": ignore}}]}), calm)
    assert [problem.path for problem in made.problems] == [
        f"variants.a.0.quantize.ignore.{index}" for index in range(3)
    ]
    assert made.problems[0].hint == "did you mean 'model.layers.0.mlp.down_proj'?"
    assert made.problems[2].message == "'re:(' matches no layer"


def test_a_step_that_quantizes_nothing(calm: Store) -> None:
    made = make_plan(recipe({"a": [{"quantize": {"scheme": "w4a16", "ignore": ["re:.*_proj"]}}]}), calm)
    assert problems(made) == [("variants.a.0.quantize", "quantizes no layer of this model")]


def test_windows_longer_than_the_model_knows(calm: Store) -> None:
    calibrate = {"source": "wiki", "samples": 2, "length": 65}
    gptq = {"quantize": {"scheme": "w4a16", "group_size": 32, "method": "gptq", "calibrate": calibrate}}
    suite = {"name": "smoke", "divergence": {"text": "news", "length": 128}}
    load = recipe().benchmark.model_dump() | {"workload": {"input_tokens": 60, "output_tokens": 8}}
    made = make_plan(recipe({"a": [gptq]}, evaluate=suite, benchmark=load), calm)
    assert [path for path, _ in problems(made)] == [
        "variants.a.0.quantize.calibrate",
        "evaluate",
        "benchmark.workload",
    ]


def test_a_quantized_base_is_refused(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    monkeypatch.setattr(sources, "base_config", lambda base, store: config)
    made = make_plan(recipe(), calm)
    assert problems(made) == [("base", "the base is quantized already, in awq format")]
    assert made.stages == []


@pytest.mark.parametrize("model_type", ["nonesuch", "vit"])
def test_an_unknown_model_type_is_refused(calm: Store, monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    monkeypatch.setattr(sources, "base_config", lambda base, store: {"model_type": model_type})
    (problem,) = make_plan(recipe(), calm).problems
    assert (problem.path, problem.kind) == ("base", "recipe")
    assert repr(model_type) in problem.message
    assert "transformers" in problem.hint


def test_missing_runtime_names_its_extra(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = {"onnxruntime": ["onnxruntime-genai"], "transformers": []}
    monkeypatch.setattr(installed, "missing_packages", lambda runtime, device: lacks[runtime])
    made = make_plan(recipe(), calm)
    assert made.missing_extras == ["cpu"]
    assert problems(made) == [("runtimes", "runtime onnxruntime needs onnxruntime-genai")]
    assert made.problems[0].hint == "pip install 'pennyweight[cpu]'"


def test_cuda_without_a_gpu_has_sizes_but_no_times(calm: Store) -> None:
    made = make_plan(recipe(device="cuda"), calm)
    assert [(problem.path, problem.kind) for problem in made.problems] == [("device", "machine")]
    assert made.measured is None
    assert made.weight_bytes("export", "base@onnxruntime") == sizes.onnx_bytes(
        model_shape(CONFIG, "bfloat16"), None, "cuda"
    )
    assert made.expected_seconds("benchmark", "all candidates") is None
    assert "  ? " in plan.format_plan(made)


def test_an_unreachable_hub_leaves_sizes_unknown(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(base: Any, store: Any) -> None:
        raise SourceError("the hub does not answer", "try later")

    monkeypatch.setattr(sources, "base_config", unreachable)
    made = make_plan(recipe(), calm)
    assert made.problems == []
    assert made.notes[0] == "the hub does not answer"
    assert made.weight_bytes("source", "base") is None
    assert "?" in plan.format_plan(made)
    (problem,) = make_plan(recipe(base="file:/nowhere"), calm).problems
    assert (problem.path, problem.message) == ("base", "the hub does not answer")


# --- what will not fit ------------------------------------------------------------------------------------------------


def test_a_full_disk(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_disk_bytes", lambda _: 1000)
    made = make_plan(recipe(), calm)
    (problem,) = made.resource_problems
    assert "of disk; 1 kB are free" in problem.message
    assert "PENNYWEIGHT_HOME" in problem.hint
    assert plan.format_plan(made).startswith("Will not fit:\n  tiny: a run needs ")


def test_too_little_memory_names_the_stage_that_needs_most(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 100 * 10**6)
    made = make_plan(recipe(), calm)
    worst = max(made.stages, key=lambda stage: stage.peak_memory_bytes)
    (problem,) = made.resource_problems
    assert problem.message.startswith(f"{worst.stage} {worst.subject} needs about ")
    assert problem.message.endswith("of memory; 100 MB are free")


def test_too_little_gpu_memory(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    big = CONFIG | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "num_attention_heads": 32}
    monkeypatch.setattr(sources, "base_config", lambda base, store: big)
    monkeypatch.setattr(machine, "gpus", lambda: [{"name": "small", "memory_gib": 2.0, "driver": "1"}])
    made = make_plan(recipe(device="auto"), calm)
    assert made.device == "cuda"
    (problem,) = made.resource_problems
    assert problem.message.endswith("of GPU memory; 2.15 GB are free")


def test_a_read_only_store(calm: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    made = make_plan(recipe(), Store(blocked / "store"))
    (problem,) = made.resource_problems
    assert "cannot be written" in problem.message
    assert made.measured == SPEED


# --- estimates --------------------------------------------------------------------------------------------------------


def test_speed_is_measured_once_a_day(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(speed, "measure", lambda device="cpu": calls.append(device) or SPEED)
    assert plan.measured_speed(calm, "cpu") == plan.measured_speed(calm, "cpu") == SPEED
    assert calls == ["cpu"]
    monkeypatch.setattr(plan.time, "strftime", lambda *_: "1999-01-01")
    plan.measured_speed(calm, "cpu")
    assert calls == ["cpu", "cpu"]


def test_an_archive_is_downloaded_once(calm: Store) -> None:
    digest = "0" * 64
    pinned = {"archive_sha256": digest, "bytes": 20_000_000}
    data = {
        "news": {"uri": "pypi:words==1.0/news.jsonl", "text": "t", **pinned},
        "wiki": {"uri": "pypi:words==1.0/wiki.jsonl", "text": "t", **pinned},
        "quiz": {"uri": "pypi:quiz==1.0/q.jsonl", "questions": "lettered", "bytes": 5_000_000},
        "mine": {"uri": "file:mine.jsonl", "text": "t"},
    }
    made = make_plan(recipe(data=data), calm)
    assert made.stages[1].download_bytes == 25_000_000
    assert made.download_bytes == 25_000_000 + 2 * (EMBEDDING + 2 * LAYER + NORMS)


def test_what_the_store_has_is_reused(calm: Store) -> None:
    calm.get_or_build("source", {"repo": "me/tiny"}, lambda files: {"origin": "hf:me/tiny@main"})
    source = make_plan(recipe(), calm).stages[0]
    assert (source.reused, source.seconds, source.download_bytes) == (True, 0.0, 0)
    assert make_plan(recipe(base="hf:me/tiny@other"), calm).stages[0].reused is False


def test_benchmark_time_is_the_sum_of_waves(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three candidates; eight rounds at concurrency 1 and three at 4, each with one short wave before them. The
    machine's speed is measured before and after."""

    def wave(job: Any, shape: Any, runtime: str, step: Any, concurrency: int, given: int, made: int) -> float:
        return {(16, 8): 1.0, (16, 2): 0.25}[given, made] * concurrency

    monkeypatch.setattr(plan.stages, "wave_seconds", wave)
    monkeypatch.setattr(plan.job, "IMPORT_SECONDS", dict.fromkeys(constants.IMPORT_SECONDS, 0.0))
    monkeypatch.setattr(plan.job, "SECONDS_PER_GB", dict.fromkeys(constants.SECONDS_PER_GB, 0.0))
    assert make_plan(recipe(), calm).expected_seconds("benchmark", "all candidates") == pytest.approx(
        3 * (8 + 0.25 + 3 * 4 + 0.25 * 4) + 2 * speed.CEILING_SECONDS
    )


def test_each_load_makes_a_graph(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """One to compare and one to benchmark; to evaluate one, or two where text is generated as well."""
    steps = {"int8": [{"quantize": {"scheme": "w8a16", "group_size": 32}}]}
    text = {"text": "wiki", "prompts": 2, "input_tokens": 8, "output_tokens": 8}
    names = {"export": "int8@openvino", "evaluate": "int8@openvino", "benchmark": "all candidates"}

    def seconds(generation: dict[str, Any] | None) -> dict[str, float]:
        runtimes = {"base": ["transformers"], "variants": ["openvino"]}
        suite = {"name": "tiny", "tasks": [], "generation": generation}
        suite |= {"divergence": {"text": "news", "windows": 2, "length": 32}}
        made = make_plan(recipe(steps, runtimes=runtimes, evaluate=suite), calm)
        return {stage: made.expected_seconds(stage, name) for stage, name in names.items()}

    for generation, graphs in ((None, 1), (text, 2)):
        monkeypatch.setattr(plan.job, "GRAPH_SECONDS", {})
        before = seconds(generation)
        monkeypatch.setattr(plan.job, "GRAPH_SECONDS", {"openvino": 100.0})
        grown = {stage: value - before[stage] for stage, value in seconds(generation).items()}
        assert grown == pytest.approx({"export": 100, "evaluate": 100 * graphs, "benchmark": 100})


def test_candidates_that_do_not_fit_together_are_loaded_in_turn(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    together = make_plan(recipe(), calm).stages[-2]
    monkeypatch.setattr(machine, "free_memory", lambda device: 10**6)
    in_turn = make_plan(recipe(), calm).stages[-2]
    assert in_turn.peak_memory_bytes < together.peak_memory_bytes
    assert in_turn.seconds > together.seconds
    assert (together.notes, len(in_turn.notes)) == ([], 1)


def test_libraries_are_imported_once(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_plan(recipe(), calm).seconds
    monkeypatch.setattr(plan.job, "IMPORT_SECONDS", constants.IMPORT_SECONDS | {"transformers": 1006.0})
    two = {name: [{"quantize": {"scheme": "w4a16", "group_size": 32}}] for name in ("a", "b")}
    assert make_plan(recipe(), calm).seconds - first == pytest.approx(1000)
    assert make_plan(recipe(two), calm).seconds < first + 1100


def test_gptq_takes_longer_than_rounding_by_its_text(calm: Store) -> None:
    def seconds(samples: int) -> float:
        calibrate = {"source": "wiki", "samples": samples, "length": 64}
        gptq = {"quantize": {"scheme": "w4a16", "group_size": 32, "method": "gptq", "calibrate": calibrate}}
        return make_plan(recipe({"a": [gptq]}), calm).expected_seconds("quantize", "a")

    rtn = make_plan(recipe(), calm).expected_seconds("quantize", "int4")
    assert rtn < seconds(8) < seconds(64)
    per_token = (seconds(1008) - seconds(8)) / (1000 * 64)
    hessians = 2 * sum(columns**2 for _, columns in model_shape(CONFIG, "bfloat16").linears.values()) / 100e9
    forward = 2 * (2 * (EMBEDDING + 2 * LAYER) / (200e9 * constants.EFFICIENCY["transformers", "bfloat16"].product))
    calls = 2 * 2 * constants.EFFICIENCY["transformers", "bfloat16"].layer_seconds / (constants.CALIBRATION_BATCH * 64)
    assert per_token == pytest.approx(hessians + forward + calls, rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "uri", "config", "expected"),
    [
        ("auto", "hf:a/b@c", {"dtype": "float32"}, "float32"),
        ("auto", "hf:a/b@c", {"torch_dtype": "bfloat16"}, "bfloat16"),
        ("auto", "hf:a/b@c", {}, "float32"),
        ("auto", "pypi:a==1/b.gguf", {"dtype": "float32"}, "bfloat16"),
        ("float16", "pypi:a==1/b.gguf", {}, "float16"),
    ],
)
def test_base_dtype(dtype: str, uri: str, config: dict[str, Any], expected: str) -> None:
    assert plan.base_dtype(Base(uri=uri, dtype=dtype), config) == expected


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (None, "?"),
        (0, "-"),
        (999, "999 B"),
        (269_030_016, "269 MB"),
        (1_617_000_000, "1.62 GB"),
        (999_700_000, "1000 MB"),
    ],
)
def test_format_bytes(size: int | None, shown: str) -> None:
    assert plan.format_bytes(size) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "?"), (0.4, "0 s"), (59.6, "1 min 00 s"), (190, "3 min 10 s"), (7500, "2 h 05 min")]
)
def test_format_seconds(seconds: float | None, shown: str) -> None:
    assert plan.format_seconds(seconds) == shown


def test_a_lever_that_no_engine_of_the_variants_has(calm: Store) -> None:
    settings = recipe().dump()["benchmark"] | {"levers": ["prefix_caching"]}
    made = make_plan(recipe(benchmark=settings), calm)
    assert problems(made) == [("benchmark.levers.0", "onnxruntime has no prefix_caching")]
    runtimes = {"base": ["transformers"], "variants": ["onnxruntime", "openvino"]}
    made = make_plan(recipe(benchmark=settings, runtimes=runtimes), calm)
    assert made.problems == []
    assert made.expected_seconds("levers", "the winner") > 0


# --- distilling -------------------------------------------------------------------------------------------------------


LOOSE = {
    "runtimes": ["transformers"],
    "gate": [{"metric": "kl_mean", "max": 0.1, "for_every_variant": True}],
}


SHORTER = {"prune": {"drop": [1]}}


def test_a_teachers_words_are_counted_once_for_all_variants(calm: Store) -> None:
    cached = {"text": "wiki", "ce": 0.5, "steps": 10, "batch": 2, "length": 32, "held_out": 4}
    cached["teacher"] = {"cache": "top_k", "k": 8}
    steps = {"a": [{"distill": cached}], "b": [{"distill": cached | {"learning_rate": 0.001}}]}
    made = make_plan(recipe(steps, **LOOSE), calm)
    assert not made.problems
    first, second = (next(s for s in made.stages if (s.stage, s.subject) == ("distill", name)) for name in "ab")
    # 20 windows of 32 tokens: 8 numbers and 9 log-probabilities of 2 bytes, and the states of 4 held out in float32.
    assert first.disk_bytes - second.disk_bytes == 20 * 32 * 34 + 4 * 4 * 32 * 96
    assert first.seconds > second.seconds
    assert any("34 bytes a token" in note for note in first.notes)
    live = make_plan(recipe({"a": [{"distill": cached | {"teacher": "live"}}]}, **LOOSE), calm)
    taught = next(stage for stage in live.stages if stage.stage == "distill")
    assert taught.peak_memory_bytes > second.peak_memory_bytes  # the teacher itself
    assert taught.weight_bytes == second.weight_bytes == 2 * (2 * LAYER + EMBEDDING + NORMS)


def test_what_cannot_be_distilled(calm: Store) -> None:
    def found(**settings: Any) -> list[tuple[str, str]]:
        step = {"distill": {"text": "wiki", "ce": 0.5, "length": 32, **settings}}
        return problems(make_plan(recipe({"a": [step]}, **LOOSE), calm))

    assert found(student={"layers": 2}) == [
        ("variants.a.0.distill", "a student of 2 layers drawn from 2 would be no smaller")
    ]
    assert found(teacher={"cache": "top_k", "k": 160}) == [
        ("variants.a.0.distill.teacher.k", "the vocabulary has 160 tokens, 160 of them are no choice")
    ]
    (path, message), *_ = found(length=100)
    assert path == "variants.a.0.distill.text"
    assert "windows of 100 tokens; the model knows 64 positions" in message


def test_a_part_that_learns_takes_less_time_and_memory(calm: Store) -> None:
    learns = {"text": "wiki", "steps": 10, "length": 32}
    steps = {name: [SHORTER, {"distill": learns | {"train": name}}] for name in ("all", "blocks", "after_cut")}
    made = make_plan(recipe(steps, **LOOSE), calm)
    assert not made.problems
    whole, *parts = (next(s for s in made.stages if (s.stage, s.subject) == ("distill", name)) for name in steps)
    assert parts[1].seconds < parts[0].seconds < whole.seconds
    # The embedding, and a block, do without a gradient and AdamW's two moments, in float32.
    for part, stays in zip(parts, (EMBEDDING, EMBEDDING + LAYER)):
        assert whole.peak_memory_bytes - part.peak_memory_bytes == pytest.approx(12 * stays, rel=0.01)
        assert whole.disk_bytes - part.disk_bytes == pytest.approx(8 * stays, rel=0.01)


def test_nothing_comes_before_a_cut_at_the_first_block(calm: Store) -> None:
    steps = [{"prune": {"drop": [0]}}, {"distill": {"text": "wiki", "length": 32, "train": "after_cut"}}]
    made = make_plan(recipe({"a": steps}, **LOOSE), calm)
    (problem,) = problems(made)
    assert problem == (
        "variants.a.1.distill.train",
        "the first block goes, or is fitted, so none before the cut is the base's",
    )


def test_a_student_that_writes_takes_its_time(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "installed_version", lambda package: "1")
    learns = {"text": "wiki", "steps": 10, "batch": 2, "accumulate": 3, "length": 32}
    writes = learns | {"on_policy": {"prompt": 8}}
    steps = {"reads": [SHORTER, {"distill": learns}], "writes": [SHORTER, {"distill": writes}]}
    made = make_plan(recipe(steps, **LOOSE), calm)
    assert not made.problems
    reads, writes = (next(s for s in made.stages if (s.stage, s.subject) == ("distill", name)) for name in steps)
    (note,) = [note for note in writes.notes if "the student writes" in note]
    assert "6 texts of up to 24 tokens, about " in note
    assert "on policy" in writes.notes[0]
    assert writes.seconds > reads.seconds
    assert not [note for note in reads.notes if "the student writes" in note]


def test_a_student_cannot_write_without_its_trainer(calm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "installed_version", lambda package: None)
    steps = {"a": [SHORTER, {"distill": {"text": "wiki", "length": 32, "on_policy": {"prompt": 8}}}]}
    made = make_plan(recipe(steps, **LOOSE), calm)
    assert problems(made) == [("variants.a.1.distill", "trl is not installed")]
    assert (made.problems[0].kind, made.problems[0].hint) == ("machine", "pip install 'pennyweight[trl]'")
    assert made.missing_extras == ["trl"]


# --- pruning ----------------------------------------------------------------------------------------------------------


ANY_GATE = [{"metric": "kl_mean", "max": 1.0, "for_every_variant": True}]


def test_a_pruned_variant_is_planned_before_anything_is_cut(calm: Store) -> None:
    taken = {"layers": 1, "text": "news", "samples": 16, "length": 32}
    made = make_plan(
        recipe(
            {"half": [{"prune": taken}], "narrow": [{"prune": taken | {"layers": None, "ffn": 0.5}}]}, gate=ANY_GATE
        ),
        calm,
    )
    assert made.weight_bytes("prune", "half") == 2 * (EMBEDDING + LAYER + 3 * 96)
    assert made.weight_bytes("prune", "narrow") == 2 * (EMBEDDING + 2 * (LAYER - 3 * 80 * 96) + NORMS)
    note = next(note for stage in made.stages for note in stage.notes if note.startswith("half: prune 1 layer by kl"))
    assert "0.2 M → 0.1 M parameters" in note and "× on onnxruntime" in note
    assert made.expected_seconds("prune", "half")


def test_text_to_fit_to_takes_memory(calm: Store) -> None:
    """Probabilities of what is held out, and three streams of hidden states of the rest."""
    taken = {"layers": 1, "text": "news", "length": 32}
    steps = {f"on-{samples}": [{"prune": taken | {"samples": samples}}] for samples in (16, 48)}
    made = make_plan(recipe(steps, **LOOSE), calm)
    few, many = (stage.peak_memory_bytes for stage in made.stages if stage.stage == "prune")
    elements = 4 * 32 * 160 + 3 * 28 * 32 * 96
    assert many - few in (2 * elements, 4 * elements)  # in the dtype that the machine computes in


def test_variants_that_begin_alike_share_the_work(calm: Store) -> None:
    cut = {"prune": {"layers": 1, "text": "news", "samples": 16, "length": 32}}
    taught = {"distill": {"text": "wiki", "steps": 2, "length": 32}}
    made = make_plan(recipe({"a": [cut], "b": [cut, taught], "c": [cut, cut | {}]}, **LOOSE), calm)
    steps = [(s.subject, s.stage, s.reused) for s in made.stages if s.stage in ("prune", "distill")]
    assert steps[:3] == [("a", "prune", False), ("b", "prune", True), ("b", "distill", False)]
    assert steps[3:] == [("c", "prune", True), ("c", "prune", False)]
    assert made.expected_seconds("prune", "b") == 0


def test_more_layers_than_there_are_is_a_problem_of_the_recipe(calm: Store) -> None:
    made = make_plan(recipe({"none": [{"prune": {"layers": 2, "text": "news"}}]}, gate=ANY_GATE), calm)
    assert ("variants.none.0.prune", "2 of 2 blocks leave none; take out 1 at most") in problems(made)
