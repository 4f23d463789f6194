import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pennyweight.errors import StageError
from pennyweight.formats import gptq
from pennyweight.quantization import packed
from pennyweight.quantization.grid import QuantizedLinear

NAME = "model.layers.0.q_proj"


def layer(
    bits: int, rows: int = 32, columns: int = 64, group_size: int = 32, symmetric: bool = False
) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(bits)
    integers = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    groups = (rows, columns // group_size)
    middle = torch.full(groups, 2 ** (bits - 1), dtype=torch.uint8)
    zeros = middle if symmetric else torch.randint(0, 2**bits, groups, generator=generator, dtype=torch.uint8)
    return QuantizedLinear(integers, torch.rand(groups, generator=generator).bfloat16().float(), zeros, bits)


def checkpoint(folder: Path, layers: dict[str, QuantizedLinear]) -> Path:
    folder.mkdir()
    tensors = {"model.norm.weight": torch.ones(4), "model.layers.0.o_proj.weight": torch.ones(8, 8)}
    for name, content in layers.items():
        tensors |= packed.layer_tensors(name, content, torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": packed.quantization_config(layers, [])}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def field(words: torch.Tensor, bits: int, at: int) -> int:
    """The integer `at` in a column of words, read as one long binary number."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
    return stream >> (bits * at) & (2**bits - 1)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_every_integer_and_zero_is_where_the_layout_says(bits: int, version: gptq.Version) -> None:
    content = layer(bits)
    tensors = gptq.layer_tensors(NAME, content, torch.float32, version)
    qweight, qzeros = tensors[f"{NAME}.qweight"], tensors[f"{NAME}.qzeros"]
    assert qweight.shape == (64 * bits // 32, 32)
    assert qzeros.shape == (2, 32 * bits // 32)
    for out in (0, 10, 21, 31):  # 10 and 21 lie across two words where integers have 3 bits
        for column in (0, 10, 21, 63):
            assert field(qweight[:, out], bits, column) == content.integers[out, column]
        for group in (0, 1):
            stored = field(qzeros[group], bits, out)
            assert (stored + (version == "gptq")) % 2**bits == content.zeros[out, group]
    assert torch.equal(tensors[f"{NAME}.scales"], content.scales.T)
    assert tensors[f"{NAME}.g_idx"].tolist() == [0] * 32 + [1] * 32


def test_words_hold_low_bits_first() -> None:
    content = QuantizedLinear(
        torch.arange(8, dtype=torch.uint8).repeat(8, 1), torch.ones(8, 1), torch.ones(8, 1, dtype=torch.uint8), 4
    )
    tensors = gptq.layer_tensors(NAME, content, torch.float32, "gptq_v2")
    assert tensors[f"{NAME}.qweight"][0, 0].item() == 0x76543210
    assert tensors[f"{NAME}.qzeros"][0, 0].item() == 0x11111111


def test_what_is_not_quantized_comes_along_and_is_declared(tmp_path: Path) -> None:
    layers = {NAME: layer(4), "model.layers.0.k_proj": layer(4), "lm_head": layer(8)}
    source = checkpoint(tmp_path / "source", layers)
    gptq.write(source, tmp_path / "target", layers, torch.bfloat16, "gptq_v2")
    written = load_file(tmp_path / "target" / "model.safetensors")
    assert torch.equal(written["model.norm.weight"], torch.ones(4))
    assert written[f"{NAME}.scales"].dtype == torch.bfloat16
    assert not any(name.endswith(packed.PARTS) for name in written)
    assert (tmp_path / "target" / "tokenizer.json").is_file()
    config = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["quant_method"]) == (4, 32, "gptq")
    assert (config["sym"], config["lm_head"], config["checkpoint_format"]) == (False, True, "gptq_v2")
    assert config["dynamic"] == {
        r"+:^lm_head(?:\.|$)": {"bits": 8, "group_size": 32},
        r"-:^model\.layers\.0\.o_proj(?:\.|$)": {},
    }


@pytest.mark.parametrize(("rows", "columns", "side"), [(30, 64, "outputs"), (32, 40, "inputs")])
def test_words_that_are_not_full_are_refused(rows: int, columns: int, side: str) -> None:
    with pytest.raises(StageError, match=f"{side} of 3 bits do not fill whole words"):
        gptq.layer_tensors(NAME, layer(3, rows, columns, 8), torch.float32, "gptq")
