"""GGUF's blocks, row orders and vocabularies, against their definitions."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from pennyweight.errors import StageError
from pennyweight.formats.gguf import architecture, blocks, engines, vocabulary
from pennyweight.formats.gguf.header import read_header
from pennyweight.quantization.grid import QuantizedLinear

HALF = 2.0**-11  # of a float16's last place, relative


def layer(bits: int, symmetric: bool = True, group_size: int = 64, scale: float = 0.01) -> QuantizedLinear:
    draw = torch.Generator().manual_seed(bits)
    integers = torch.randint(0, 2**bits, (6, 128), generator=draw, dtype=torch.uint8)
    groups = (6, 128 // group_size)
    scales = (torch.rand(groups, generator=draw) * scale + scale).bfloat16().float()
    zeros = torch.full(groups, 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(0, 2**bits, groups, generator=draw, dtype=torch.uint8)
    return QuantizedLinear(integers, scales, zeros, bits)


def nibble(data: np.ndarray, at: int) -> int:
    return int(data[at % 16] & 15 if at < 16 else data[at % 16] >> 4)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group_size", [32, 64])
def test_symmetric_four_bits_are_q4_0(bits: int, group_size: int) -> None:
    content = layer(bits, group_size=group_size)
    made = blocks.from_layer("x", content)
    assert (made.type, made.change) == ("Q4_0", 0)
    rows = made.data.reshape(6, 4, 18)
    for row, block, at in ((0, 0, 0), (2, 1, 15), (3, 2, 16), (5, 3, 31)):
        scale = rows[row, block, :2].view(np.float16)[0]
        assert scale == content.scales[row, block * 32 // group_size]
        expected = content.integers[row, block * 32 + at].int() - 2 ** (bits - 1)
        assert nibble(rows[row, block, 2:], at) - 8 == expected


def test_asymmetric_four_bits_are_q4_1() -> None:
    content = layer(4, symmetric=False)
    made = blocks.from_layer("x", content)
    assert made.type == "Q4_1"
    assert made.change <= 15 * HALF  # the offset s · z has up to 12 digits, of which float16 keeps 11
    rows = made.data.reshape(6, 4, 20)
    for row, block, at in ((0, 0, 0), (2, 1, 15), (3, 2, 16), (5, 3, 31)):
        scale, offset = rows[row, block, :4].view(np.float16).astype(float)
        s, z = content.scales[row, block // 2].item(), content.zeros[row, block // 2].item()
        assert scale == s
        assert offset == pytest.approx(-s * z, rel=HALF)
        assert nibble(rows[row, block, 4:], at) == content.integers[row, block * 32 + at]


def test_symmetric_eight_bits_are_q8_0() -> None:
    content = layer(8)
    made = blocks.from_layer("x", content)
    assert (made.type, made.change) == ("Q8_0", 0)
    integers = made.data.reshape(6, 4, 34)[:, :, 2:].copy().view(np.int8).reshape(6, 128)
    np.testing.assert_array_equal(integers, content.integers.numpy().astype(int) - 128)


def test_a_change_is_recorded_in_steps_and_refused_beyond_its_bound() -> None:
    content = layer(4)
    odd = content.scales.clone()
    odd[3, 1] *= 1 + 2**-12  # between two float16 numbers
    made = blocks.from_layer("x", QuantizedLinear(content.integers, odd, content.zeros, 4))
    assert 0 < made.change <= 8 * HALF
    for scale in (1e-9, 1e6):
        with pytest.raises(StageError, match=r"model\.x: float16.*moves a weight"):
            blocks.from_layer("model.x", layer(4, scale=scale))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (layer(4, group_size=16), "groups of 16 are no multiple of GGUF's blocks of 32"),
        (layer(8, symmetric=False), "no blocks of 8-bit integers with zero points"),
    ],
)
def test_what_no_block_holds_is_refused_by_name(content: QuantizedLinear, says: str) -> None:
    with pytest.raises(StageError, match=says) as caught:
        blocks.from_layer("model.layers.3.mlp.up_proj", content)
    assert caught.value.message.startswith("model.layers.3.mlp.up_proj:")
    assert caught.value.hint


def test_rope_pairs_come_to_lie_side_by_side() -> None:
    config = SimpleNamespace(num_attention_heads=2, num_key_value_heads=1, head_dim=8, hidden_size=16)
    llama, qwen = architecture.ARCHITECTURES["llama"], architecture.ARCHITECTURES["qwen2"]
    head = [0, 4, 1, 5, 2, 6, 3, 7]
    order = architecture.row_order(llama, config, "model.layers.0.self_attn.q_proj.weight")
    assert order.tolist() == head + [8 + row for row in head]
    assert architecture.row_order(llama, config, "model.layers.0.self_attn.k_proj.bias").tolist() == head
    assert architecture.row_order(llama, config, "model.layers.0.self_attn.v_proj.weight") is None
    assert architecture.row_order(qwen, config, "model.layers.0.self_attn.q_proj.weight") is None


def test_an_unknown_architecture_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(StageError, match="models of type mamba") as caught:
        architecture.of(SimpleNamespace(model_type="mamba"))
    assert "qwen3" in caught.value.hint


def byte_level(*cuts: object, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=not cuts)])
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([vocabulary.PROBE * 3, "It'S 12345 I'LL don't café\r\n\r\n x = 77777"], trainer)
    return tokenizer


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe"])
def test_a_split_is_named_by_what_it_does(name: str) -> None:
    expressions, ignore_merges = vocabulary.SPLITS[name]
    cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    assert vocabulary.split_name(byte_level(*cuts, ignore_merges=ignore_merges)) == name


def test_plain_byte_level_splitting_is_that_of_gpt2() -> None:
    assert vocabulary.split_name(byte_level()) == "gpt-2"


def test_single_digits_are_those_of_smollm() -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert vocabulary.split_name(tokenizer) == "smollm"


def test_a_split_without_a_name_is_refused() -> None:
    with pytest.raises(StageError, match="has no name here"):
        vocabulary.split_name(byte_level(pre_tokenizers.Split(Regex("[aeiou]"), "isolated")))


def test_engines_that_read_a_file_wrongly_are_named() -> None:
    assert "does not know" in engines.unfit("gemma2", {"Q8_0"}, "qwen2", False)["OpenVINO GenAI"]
    assert "does not read BF16" in engines.unfit("llama", {"Q8_0", "BF16"}, "qwen2", False)["OpenVINO GenAI"]
    assert set(engines.unfit("llama", {"F16"}, "llama-bpe", True)) == {"OpenVINO GenAI", "transformers"}
    assert engines.unfit("qwen3", {"F32", "F16", "Q8_0", "Q4_0", "Q4_1"}, "qwen2", False) == {}
    assert "SentencePiece" in engines.unfit("llama", {"F16"}, vocabulary.PIECES, False)["OpenVINO GenAI"]


def test_words_that_openvino_splits_otherwise_are_noted() -> None:
    assert engines.notes("smollm") == engines.notes(vocabulary.PIECES) == []
    assert "token ids, not text" in engines.notes("gpt-2")[0]


def written(folder: Path, tensors: dict[str, tuple[str, np.ndarray]], **metadata: str) -> Path:
    """A GGUF file of a Llama with these tensors: name → (type, data)."""
    file = folder / f"{len(list(folder.iterdir()))}.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", **metadata}.items():
        writer.add_string(key, value)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_header_is_what_ggufs_own_reader_finds(tmp_path: Path) -> None:
    file = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for add, value in (
        (writer.add_uint8, 7), (writer.add_int8, -7), (writer.add_uint16, 700), (writer.add_int16, -700),
        (writer.add_uint32, 70_000), (writer.add_int32, -70_000), (writer.add_uint64, 2**40),
        (writer.add_int64, -(2**40)), (writer.add_float32, 0.5), (writer.add_float64, 0.25), (writer.add_bool, True),
        (writer.add_string, "naïve"),
    ):  # fmt: skip
        add(add.__name__, value)
    arrays = {"words": ["a", "naïve", ""], "numbers": [1, 2, 3, 4], "halves": [0.5, 1.5], "pairs": [["a", "b"], ["c"]]}
    for key, values in arrays.items():
        writer.add_array(key, values)
    writer.add_custom_alignment(64)
    data = {"Q8_0": np.zeros((3, 68), np.uint8), "F16": np.zeros((5, 7), np.float16), "F32": np.ones(3, np.float32)}
    for kind, values in data.items():
        writer.add_tensor(kind.lower(), values, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, expected = read_header(file), gguf.GGUFReader(file)
    fields = {key: field.contents() for key, field in expected.fields.items() if not key.startswith("GGUF.")}
    lengths = {key: len(values) for key, values in arrays.items()}
    assert found.fields == fields | lengths
    assert [(t.name, t.type, t.elements, t.bytes, t.offset) for t in found.tensors] == [
        (t.name, t.tensor_type.name, t.n_elements, t.n_bytes, t.data_offset) for t in expected.tensors
    ]


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    whole = written(tmp_path, {"a": ("F32", np.ones(4, np.float32))}).read_bytes()
    broken, nested = tmp_path / "broken.gguf", struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000
    for content, says in (
        (b"", "is no GGUF file"),
        (b"PK" + whole, "is no GGUF file"),
        (whole[:4] + whole[7:3:-1] + whole[8:], "another byte order"),
        (whole[:60], "ends within its header"),
        (whole[:16] + b"\xff" * 8 + whole[24:], "broken"),
        (whole[:-32], "ends before the data of a do"),
        (whole[:16] + (1).to_bytes(8, "little") + bytes(8) + nested, "arrays within arrays without end"),
    ):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=says):
            read_header(broken)


def test_a_file_of_others_that_openvino_would_misread_is_told(tmp_path: Path) -> None:
    ours = ("Q4_1", blocks.from_layer("x", layer(4, symmetric=False)).data)
    values = np.random.default_rng(0).normal(size=(6, 128)).astype(np.float32)
    theirs = ("Q4_1", gguf.quantize(values, gguf.GGMLQuantizationType.Q4_1))
    halves = ("F16", values.astype(np.float16))
    assert engines.openvino_misreads(written(tmp_path, {"a": ours, "b": halves})) == (None, [])
    reason, _ = engines.openvino_misreads(written(tmp_path, {"a": ours, "b": theirs}))
    assert reason == "it rounds the offsets of Q4_1 to whole steps, which those of b are not"
    constant = np.zeros((1, 20), np.uint8)
    constant[0, 2:4] = np.array([1], np.float16).view(np.uint8)  # a scale of 0 and an offset of 1
    assert engines.openvino_misreads(written(tmp_path, {"a": ("Q4_1", constant)}))[0]
    for metadata, says in (
        ({"llama.rope.scaling.type": "linear"}, "RoPE"),
        ({"tokenizer.ggml.model": "llama"}, "SentencePiece"),
    ):
        assert says in engines.openvino_misreads(written(tmp_path, {"a": halves}, **metadata))[0]
    untried = ("Q4_K", np.zeros((2, 144), np.uint8))
    assert engines.openvino_misreads(written(tmp_path, {"a": untried, "b": halves})) == (None, ["Q4_K"])
