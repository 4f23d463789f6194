import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

from pennyweight.errors import StageError
from pennyweight.runtimes.gptq_layout import pack, read_quantized, rewrite, unpack


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [32, 40])
def test_unpack_reads_what_compressed_tensors_packs(bits: int, columns: int) -> None:
    torch.manual_seed(0)
    half = 2 ** (bits - 1)
    signed = torch.randint(-half, half, (6, columns), dtype=torch.int8)
    assert torch.equal(unpack(pack_to_int32(signed, bits), bits, columns), (signed.int() + half).to(torch.uint8))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_pack_and_unpack_are_inverse(bits: int, dim: int) -> None:
    torch.manual_seed(1)
    values = torch.randint(0, 2**bits, (16, 24), dtype=torch.uint8)
    packed = pack(values, bits, dim)
    back = unpack(packed.T if dim == 0 else packed, bits, 16 if dim == 0 else 24)
    assert torch.equal(back.T if dim == 0 else back, values)


def test_words_hold_low_bits_first() -> None:
    assert pack(torch.arange(8, dtype=torch.uint8)[None], 4, dim=1).item() == 0x76543210
    assert pack(torch.full((1, 8), 15, dtype=torch.uint8), 4, dim=1).item() == -1  # all bits set, as int32


@pytest.mark.parametrize("symmetric", [True, False])
def test_rewriting_keeps_every_integer_scale_and_zero_point(tmp_path: Path, symmetric: bool) -> None:
    torch.manual_seed(2)
    rows, columns, group, bits = 16, 64, 32, 4
    integers = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    zeros = torch.randint(-8, 8, (rows, columns // group), dtype=torch.int8)
    scales = torch.rand(rows, columns // group).to(torch.bfloat16)
    tensors = {
        "model.layers.0.q_proj.weight_packed": pack_to_int32(integers, bits),
        "model.layers.0.q_proj.weight_scale": scales,
        "model.layers.0.q_proj.weight_shape": torch.tensor([rows, columns]),
        "model.norm.weight": torch.ones(4),
    }
    if not symmetric:
        tensors["model.layers.0.q_proj.weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0).contiguous()
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {}}))
    rewrite(source, tmp_path / "target")

    layer = read_quantized(source)["model.layers.0.q_proj"]
    assert torch.equal(layer.integers, (integers.int() + 8).to(torch.uint8))
    expected_zeros = torch.full_like(zeros, 8, dtype=torch.int32) if symmetric else zeros.int() + 8
    assert torch.equal(layer.zeros.int(), expected_zeros)
    written = load_file(tmp_path / "target" / "model.safetensors")
    assert torch.equal(unpack(written["model.layers.0.q_proj.qweight"].T, bits, columns), layer.integers)
    assert torch.equal(written["model.layers.0.q_proj.scales"].T, scales.float())
    stored = unpack(written["model.layers.0.q_proj.qzeros"], bits, rows).T.int()
    assert torch.equal((stored + 1) & 15, expected_zeros)  # the layout stores zero − 1
    assert torch.equal(written["model.norm.weight"], torch.ones(4))
    config = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["quant_method"]) == (4, 32, "gptq")


def test_a_checkpoint_without_integers_is_refused(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(StageError, match="no packed integers"):
        rewrite(tmp_path, tmp_path / "target")
