"""Bounds of what a machine allows, against values worked out by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pennyweight.benchmark.roofline import decode_step, peak, prefill, read_speed, roofline
from pennyweight.benchmark.work import Work, work_of
from pennyweight.records import Candidate, Checkpoint, CostPoint, Interval, Measured, Percentiles

MIB = 1 << 20

# Two layers of one KV head of 8 numbers and 2 heads of queries.
TOY = Work(
    weight_bytes=1000, body_weights=400, head_weights=100, kv_bytes=2 * 8 * 4, attention_width=16,
    windows=(None, None), dtype="float32", integers=False,
)  # fmt: skip
# 1,000 bytes and 10,000 operations a microsecond.
CEILINGS = Measured(threads=1, read_gb_per_s=1.0, gflops_fp32=10.0, gflops_bf16=20.0)


def point(concurrency: int, n: int, m: int, prefill_seconds: float, step_seconds: float, **more: Any) -> CostPoint:
    """What a wave of those times is recorded as."""
    wave, speed = prefill_seconds + (m - 1) * step_seconds, concurrency / step_seconds
    nothing = Percentiles(p50=1, p95=1)
    return CostPoint(
        concurrency=concurrency, input_tokens=n, output_tokens=m, rounds=3,
        output_tokens_per_second=concurrency * m / wave, total_tokens_per_second=concurrency * (n + m) / wave,
        prefill_tokens_per_second=concurrency * n / prefill_seconds, decode_tokens_per_second=speed,
        ttft_ms=nothing, tpot_ms=nothing, usd_per_1m_tokens=1, usd_per_1m_output_tokens=1, **more,
    )  # fmt: skip


# --- work -------------------------------------------------------------------------------------------------------------


def test_a_step_reads_the_weights_once_and_each_requests_cache() -> None:
    assert TOY.step_bytes(requests=3, cached=10) == 1000 + 3 * 10 * (2 * 64)


def test_a_step_multiplies_every_weight_and_attends_to_what_is_before_it_and_itself() -> None:
    # Two operations for each of 500 weights; scores and sums of 16 numbers for 11 positions in 2 layers, 2 each.
    assert TOY.step_operations(requests=3, cached=10) == 3 * (2 * 500 + 2 * 2 * 16 * 11 * 2)


def test_a_prompt_needs_the_head_once_and_attends_to_half_the_square() -> None:
    assert TOY.prefill_operations(requests=2, length=4) == 2 * (2 * (4 * 400 + 100) + 2 * 2 * 16 * (1 + 2 + 3 + 4) * 2)


def test_windows_cut_what_is_attended_to() -> None:
    work = Work(**(vars(TOY) | {"windows": (None, 3, 0)}))
    assert work.step_bytes(1, cached=5) == 1000 + 64 * (5 + 3)
    assert work.prefill_operations(1, 5) == 2 * (5 * 400 + 100) + 4 * 16 * ((1 + 2 + 3 + 4 + 5) + (1 + 2 + 3 + 3 + 3))


# --- ceilings ---------------------------------------------------------------------------------------------------------


def test_a_model_is_bounded_by_memory_no_larger_than_itself() -> None:
    reads = {MIB: 100.0, 4 * MIB: 50.0, 16 * MIB: 20.0}
    found = Measured(threads=1, read_gb_per_s=20.0, gflops_fp32=1, gflops_bf16=1, reads=reads)
    speeds = [read_speed(found, size) / 1e9 for size in (1000, MIB, 5 * MIB, 16 * MIB, 1 << 40)]
    assert speeds == [100, 100, 50, 20, 20]


def test_a_disturbed_measurement_of_little_memory_does_not_lower_the_bound() -> None:
    reads = {MIB: 0.1, 4 * MIB: 15.0, 16 * MIB: 20.0}
    found = Measured(threads=1, read_gb_per_s=20.0, gflops_fp32=1, gflops_bf16=1, reads=reads)
    assert {read_speed(found, size) for size in (1000, 5 * MIB, 17 * MIB)} == {20e9}
    assert read_speed(CEILINGS, 5 * MIB) == 1e9


@pytest.mark.parametrize(
    ("dtype", "integers", "int8", "gops"),
    [
        ("float32", False, 400, 100),
        ("float32", True, 400, 400),
        ("float32", True, 30, 100),
        ("float32", True, None, 100),
        ("bfloat16", False, 400, 200),
        ("float16", True, 150, 200),
    ],
)
def test_the_peak_is_that_of_the_fastest_way_to_multiply(dtype: str, integers: bool, int8: float, gops: float) -> None:
    found = Measured(threads=1, read_gb_per_s=1, gflops_fp32=100, gflops_bf16=200, gops_int8=int8)
    assert peak(found, dtype, integers) == gops * 1e9


# --- the bound --------------------------------------------------------------------------------------------------------


def test_the_bound_of_a_toy_by_hand() -> None:
    """One request, 2 tokens in and 3 out: a prompt, then steps with 2 and 3 positions before them."""
    reading = prefill(TOY, CEILINGS, 1, 2)
    assert (reading.memory, reading.compute) == pytest.approx((1e-6, (2 * 900 + 4 * 16 * 3 * 2) / 1e10))
    steps = [decode_step(TOY, CEILINGS, 1, cached) for cached in (2, 3)]
    assert [step.memory for step in steps] == pytest.approx([1.256e-6, 1.384e-6])
    assert [step.compute for step in steps] == pytest.approx([(1000 + 384) / 1e10, (1000 + 512) / 1e10])
    least = 1e-6 + 1.256e-6 + 1.384e-6

    base = point(1, 2, 3, prefill_seconds=4e-6, step_seconds=8e-6)
    saving = Interval(value=0.5, low=0.4, high=0.6)
    found = roofline(TOY, CEILINGS, point(1, 2, 3, prefill_seconds=2e-6, step_seconds=4e-6, saving=saving), base)
    assert found.best_output_tokens_per_second == pytest.approx(3 / least)
    assert found.bound == "memory"
    assert found.realized == pytest.approx(least / 10e-6)
    assert found.mbu == pytest.approx(1320 / 4e-6 / 1e9)
    assert found.mfu == pytest.approx((2184 + 1384 + 1512) / 10e-6 / 1e10)
    assert found.largest_saving == pytest.approx(1 - least / 20e-6)
    assert found.saving_realized == pytest.approx(0.5 / (1 - least / 20e-6))
    assert found.prefill_seconds == pytest.approx(1e-6)
    assert found.decode_step_seconds == pytest.approx(1.32e-6)
    assert (found.weight_bytes, found.kv_bytes_per_position) == (1000, 128)
    assert (found.read_gb_per_s, found.peak_gops) == pytest.approx((1.0, 10.0))


def test_many_requests_are_bound_by_products() -> None:
    """A weight is read once for all requests: beyond some load, products take longer than reading."""
    work = Work(**(vars(TOY) | {"kv_bytes": 1}))
    bounds = [roofline(work, CEILINGS, point(load, 4, 4, 1.0, 1.0), None).bound for load in (1, 100)]
    assert bounds == ["memory", "compute"]


def test_without_a_base_nothing_is_said_of_savings() -> None:
    found = roofline(TOY, CEILINGS, point(1, 2, 3, 2e-6, 4e-6), None)
    assert (found.largest_saving, found.saving_realized) == (None, None)


def test_a_format_that_cannot_save_realizes_nothing() -> None:
    base = point(1, 2, 3, prefill_seconds=1e-6, step_seconds=1e-6)
    saving = Interval(value=-2.0, low=-2.1, high=-1.9)
    found = roofline(TOY, CEILINGS, point(1, 2, 3, 2e-6, 4e-6, saving=saving), base)
    assert found.largest_saving is not None
    assert found.largest_saving < 0
    assert found.saving_realized is None


def test_what_no_engine_can_beat_is_above_what_engines_reach() -> None:
    """An engine that reads and multiplies one after the other, each at most at its ceiling, stays below the bound; one
    that does both at once at the ceilings reaches it exactly."""
    draw = random.Random(0)
    for _ in range(200):
        work = Work(
            weight_bytes=draw.randrange(10**5, 10**9), body_weights=draw.randrange(10**5, 10**9),
            head_weights=draw.randrange(1, 10**8), kv_bytes=draw.randrange(1, 4096),
            attention_width=draw.choice([64, 1024]), windows=draw.choice([(None,) * 4, (None, 16, 16, 0)]),
            dtype=draw.choice(["float32", "bfloat16"]), integers=draw.random() < 0.5,
        )  # fmt: skip
        reads = {MIB: 100.0, 32 * MIB: 40.0, 256 * MIB: 15.0}
        found = Measured(
            threads=2, read_gb_per_s=15.0, gflops_fp32=100, gflops_bf16=200, gops_int8=400, reads=reads
        )  # fmt: skip
        requests, n, m = draw.randrange(1, 64), draw.randrange(1, 300), draw.randrange(2, 60)
        reading, rate = read_speed(found, work.weight_bytes), peak(found, work.dtype, work.integers)

        def seconds(size: float, operations: float, reading: float = reading, rate: float = rate) -> float:
            return draw.uniform(1, 3) * size / reading + draw.uniform(1, 3) * operations / rate

        first = seconds(work.weight_bytes, work.prefill_operations(requests, n))
        sizes = [(work.step_bytes(requests, n + t), work.step_operations(requests, n + t)) for t in range(m - 1)]
        step = np.mean([seconds(*size, reading=read_speed(found, size[0])) for size in sizes])
        shown = roofline(work, found, point(requests, n, m, first, step), None)
        assert 0 < shown.realized < 1
        assert 0 < shown.mbu < 1
        assert 0 < shown.mfu < 1

        least = [prefill(work, found, requests, n), *(decode_step(work, found, requests, n + t) for t in range(m - 1))]
        step = sum(phase.seconds for phase in least[1:]) / (m - 1)
        perfect = roofline(work, found, point(requests, n, m, least[0].seconds, step), None)
        assert perfect.realized == pytest.approx(1)


# --- a candidate's work -----------------------------------------------------------------------------------------------

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
BODY = 2 * (2 * 96 * 96 + 2 * 32 * 96 + 2 * 160 * 96 + 96 * 160)
HEAD = 160 * 96


def candidate(folder: Path, runtime: str, dtype: str, form: str = "safetensors", **config: Any) -> Candidate:
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    checkpoint = Checkpoint(
        path=str(folder), digest="d", bytes=1, weight_bytes=1, format=form, dtype="bfloat16", parameters=1, origin="o"
    )
    return Candidate(
        id=f"a@{runtime}", variant="a", runtime=runtime, checkpoint=checkpoint, path=str(folder), digest="d",
        bytes=1, weight_bytes=12345, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize(("tied", "dtype", "itemsize"), [(True, "bfloat16", 2), (False, "float32", 4)])
def test_transformers_reads_every_matrix_unpacked(tmp_path: Path, tied: bool, dtype: str, itemsize: int) -> None:
    """An embedding that is not the head is looked up, not read; grouped queries share one head of keys and values."""
    found = work_of(candidate(tmp_path, "transformers", dtype, "compressed-tensors", tie_word_embeddings=tied))
    assert found == Work(
        weight_bytes=itemsize * (BODY + HEAD), body_weights=BODY, head_weights=HEAD, kv_bytes=2 * 32 * itemsize,
        attention_width=96, windows=(None, None), dtype=dtype, integers=False,
    )  # fmt: skip


def test_layers_with_a_window_are_told_from_those_without(tmp_path: Path) -> None:
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 16}
    found = work_of(candidate(tmp_path, "transformers", "float32", model_type="qwen2", **kinds))
    assert found is not None
    assert found.windows == (16, None)


@pytest.mark.parametrize("odd", [{"num_local_experts": 8}, {"kv_lora_rank": 64}, {"text_config": {"num_experts": 4}}])
def test_other_kinds_of_models_have_no_bound(tmp_path: Path, odd: dict[str, Any]) -> None:
    assert work_of(candidate(tmp_path, "transformers", "float32", **odd)) is None


@pytest.mark.parametrize("tied", [True, False])
def test_onnxruntime_does_not_read_tables_whole(tmp_path: Path, tied: bool) -> None:
    import onnx
    from onnx import helper, numpy_helper

    sizes = {"embedding": (160, 96), "head": (96, 160), "layer": (96, 32), "cos": (64, 16), "norm": (4,)}
    nodes = [
        helper.make_node("Gather", ["embedding", "ids"], ["x"]),
        helper.make_node("GroupQueryAttention", ["x", "cos"], ["y"], domain="com.microsoft"),
        helper.make_node("MatMul", ["y", "layer"], ["z"]),
        helper.make_node("Mul", ["z", "norm"], ["u"]),
    ]
    if tied:
        nodes.append(helper.make_node("Transpose", ["embedding"], ["head"]))
        del sizes["head"]
    nodes.append(helper.make_node("MatMul", ["u", "head"], ["logits"]))
    tensors = [numpy_helper.from_array(np.zeros(size, np.float32), name) for name, size in sizes.items()]
    graph = helper.make_graph(nodes, "decoder", [], [], tensors)
    onnx.save_model(
        helper.make_model(graph), tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data",
        size_threshold=1024,
    )  # fmt: skip
    found = work_of(candidate(tmp_path, "onnxruntime", "float32", "compressed-tensors", tie_word_embeddings=tied))
    assert found is not None
    assert found.weight_bytes == 4 * (160 * 96 + 96 * 32)
    assert (found.kv_bytes, found.integers) == (2 * 32 * 4, True)


@pytest.mark.parametrize(("tied", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_openvino_reads_no_more_than_it_computes_in(tmp_path: Path, tied: bool, dtype: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((160, 96), np.float16))
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((32, 96), np.float32))
    if not tied:
        writer.add_tensor("output.weight", np.zeros((160, 96), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = work_of(candidate(tmp_path, "openvino", dtype, tie_word_embeddings=tied))
    assert found is not None
    itemsize = 2 if dtype == "bfloat16" else 4
    assert found.weight_bytes == 2 * 160 * 96 + 32 * 96 * itemsize
    assert found.kv_bytes == 2 * 32 * itemsize
