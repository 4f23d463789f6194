"""Checkpoint folders described from their headers; exact counts on folders of a few hundred bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pennyweight import checkpoints
from pennyweight.errors import SourceError
from pennyweight.store import folder_digest

EMBEDDING = np.zeros((10, 4), np.float16)
NORM = np.ones(4, np.float16)


def write(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def test_describes_a_plain_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path, {"model.embed_tokens.weight": EMBEDDING, "model.norm.weight": NORM})
    found = checkpoints.describe(folder, "file:here")
    assert (found.parameters, found.weight_bytes, found.dtype, found.format) == (44, 88, "float16", "safetensors")
    assert found.bytes == (folder / "model.safetensors").stat().st_size > found.weight_bytes
    assert found.digest == folder_digest(folder)
    assert (found.path, found.origin) == (str(folder), "file:here")
    assert checkpoints.quantization_config(folder) is None


def test_packed_integers_count_by_the_shape_that_they_unpack_to(tmp_path: Path) -> None:
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    tensors = {
        "model.embed_tokens.weight": EMBEDDING,
        "model.layers.0.mlp.up_proj.weight_packed": np.zeros((6, 2), np.int32),  # 6 × 16 in four bits
        "model.layers.0.mlp.up_proj.weight_shape": np.array([6, 16], np.int64),
        "model.layers.0.mlp.up_proj.weight_scale": np.zeros((6, 2), np.float32),
        "model.layers.0.mlp.up_proj.weight_zero_point": np.zeros((1, 2), np.int32),
        "model.layers.0.mlp.up_proj.weight_g_idx": np.zeros(16, np.int32),
        "model.rotary_emb.inv_freq": np.zeros(2, np.float32),
    }
    folder = write(tmp_path, tensors, quantization_config=quantization)
    found = checkpoints.describe(folder, "base")
    assert found.parameters == 40 + 96
    assert found.format == "compressed-tensors"
    assert found.dtype == "float16", "scales say nothing of what is not quantized"
    assert found.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoints.quantization_config(folder) == quantization


@pytest.mark.parametrize(("tied", "parameters"), [(True, 40), (False, 80)])
def test_a_tied_embedding_counts_once(tmp_path: Path, tied: bool, parameters: int) -> None:
    tensors = {"model.embed_tokens.weight": EMBEDDING, "lm_head.weight": EMBEDDING.copy()}
    folder = write(tmp_path, tensors, tie_word_embeddings=tied)
    assert checkpoints.describe(folder, "x").parameters == parameters


def test_the_index_says_which_files_are_weights(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a.weight": NORM})
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    save_file({"a.weight": NORM}, folder / "consolidated.safetensors")
    index = {"metadata": {"total_size": 8}, "weight_map": {"a.weight": "model-00001-of-00001.safetensors"}}
    (folder / checkpoints.INDEX).write_text(json.dumps(index))
    assert checkpoints.describe(folder, "x").parameters == 4
    (folder / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(SourceError, match=r"is incomplete: .* names model-00001-of-00001.safetensors"):
        checkpoints.describe(folder, "x")


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"compression_config": {"quant_method": "gptq"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
    ],
)
def test_quantization_is_found_wherever_configs_keep_it(config: dict[str, Any]) -> None:
    assert checkpoints.quantization_of(config) == {"quant_method": "gptq"}


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(SourceError, match=r"pickled weights \(pytorch_model.bin\)"):
        checkpoints.describe(tmp_path, "x")


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no config.json"):
        checkpoints.describe(tmp_path, "x")
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(SourceError, match="is not valid JSON"):
        checkpoints.describe(tmp_path, "x")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"has no .safetensors weights"):
        checkpoints.describe(tmp_path, "x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "its header says"),
        (lambda data: data[:20], "was cut short"),
        (lambda data: b"\xff" * 8 + data[8:], "not a safetensors file"),
        (lambda data: data[:8] + b"[" + data[9:], "broken safetensors header"),
        (lambda data: b"", "was cut short"),
    ],
)
def test_damaged_weights(tmp_path: Path, damage: Any, message: str) -> None:
    file = write(tmp_path, {"a.weight": NORM}) / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SourceError, match=message):
        checkpoints.describe(tmp_path, "x")


def test_a_packed_tensor_needs_its_shape(tmp_path: Path) -> None:
    write(tmp_path, {"a.weight_packed": np.zeros((2, 2), np.int32)})
    with pytest.raises(SourceError, match=r"a.weight_packed has no weight_shape"):
        checkpoints.describe(tmp_path, "x")
