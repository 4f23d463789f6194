"""Exported files, read by the engines that they are for: each predicts what the checkpoint predicts.

Tolerances are |Δ log p| in nats of the tokens that follow. transformers and OpenVINO compute in float32 here; llama.cpp
rounds activations, to 8 bits where weights are integers, to float16 where they are not.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import engines
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from quantized import make
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from conftest import sentences
from pennyweight import checkpoints, formats
from pennyweight.cli import main
from pennyweight.errors import SourceError, StageError, UsageError
from pennyweight.formats.gguf import vocabulary
from pennyweight.formats.gguf.engines import OPENVINO
from pennyweight.quantization import packed

SCHEMES: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"scheme": "w8a16", "head": "w8a16"},
    "int4": {"scheme": "w4a16", "group_size": 64, "head": "w8a16"},
    "int4-asymmetric": {"scheme": "w4a16", "symmetric": False},
    "int3": {"scheme": "w3a16"},
    "int4-embedding": {"scheme": "w4a16", "embedding": "w8a16"},
    "mixed": {"scheme": "w4a16", "ignore": ["re:.*down_proj"]},
}
TYPES = {
    "plain": {"F16", "F32"},
    "int8": {"F16", "F32", "Q8_0"},
    "int4": {"F16", "F32", "Q4_0", "Q8_0"},
    "int4-asymmetric": {"F16", "F32", "Q4_1"},
    "int3": {"F16", "F32", "Q4_0"},
    "int4-embedding": {"F32", "Q4_0", "Q8_0"},
    "mixed": {"F16", "F32", "Q4_0"},
}
FLOAT32 = 0.005
ROUNDED_ACTIVATIONS = 0.15


@pytest.fixture(scope="module")
def ids(tiny_model: Path) -> np.ndarray:
    tokens = AutoTokenizer.from_pretrained(tiny_model)(" ".join(sentences(5, 3))).input_ids
    return np.array(tokens[:48]).reshape(2, 24)


@pytest.fixture(scope="module", params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(scheme: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / scheme
    return make(tiny_model, folder, **SCHEMES[scheme]) if SCHEMES[scheme] else tiny_model


@pytest.fixture(scope="module")
def written(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> formats.Exported:
    return formats.export(str(checkpoint), "gguf", tmp_path_factory.mktemp("gguf") / "model.gguf")


@pytest.fixture(scope="module")
def ours(checkpoint: Path, ids: np.ndarray) -> np.ndarray:
    return engines.transformers(checkpoint, ids)


def test_a_gguf_file_has_the_checkpoints_integers(scheme: str, checkpoint: Path, written: formats.Exported) -> None:
    import gguf

    assert set(written.tensors) == TYPES[scheme]
    assert written.bytes == Path(written.path).stat().st_size
    assert written.largest_change <= (0.01 if scheme == "int4-asymmetric" else 0)
    assert written.largest_rounding <= 2**-25
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(written.path).tensors}
    layers = packed.read_quantized(checkpoint) if SCHEMES[scheme] else {}
    assert written.quantized == len(layers)
    if layer := layers.get("model.layers.1.mlp.up_proj"):
        tensor = found["blk.1.ffn_up.weight"]
        np.testing.assert_allclose(
            gguf.dequantize(tensor.data, tensor.tensor_type), layer.dequantize(), atol=0.01 * layer.scales.max().item()
        )


def test_transformers_reads_it(written: formats.Exported, ours: np.ndarray, ids: np.ndarray) -> None:
    assert np.abs(engines.transformers(Path(written.path), ids) - ours).max() <= FLOAT32


def test_llama_cpp_reads_it(written: formats.Exported, ours: np.ndarray, ids: np.ndarray) -> None:
    assert np.abs(engines.LlamaCpp(Path(written.path)).follow(ids) - ours).max() <= ROUNDED_ACTIVATIONS


def test_openvino_reads_it(written: formats.Exported, ours: np.ndarray, ids: np.ndarray) -> None:
    assert written.unfit == {}
    assert np.abs(engines.openvino(Path(written.path), ids) - ours).max() <= FLOAT32


def test_openvino_rounds_offsets_that_are_no_whole_steps(tiny_model: Path, tmp_path: Path, ids: np.ndarray) -> None:
    """Why files of Q4_1 that others made are wrong there: it wants integer zero points, as ours have."""
    import gguf

    folder = make(tiny_model, tmp_path / "checkpoint", scheme="w4a16", symmetric=False)
    written = Path(formats.export(str(folder), "gguf", tmp_path / "model.gguf").path)
    for tensor in gguf.GGUFReader(written, "r+").tensors:
        if tensor.tensor_type.name == "Q4_1":
            blocks = tensor.data.reshape(-1, 20)
            scales, offsets = (blocks[:, at : at + 2].copy().view(np.float16) for at in (0, 2))
            blocks[:, 2:4] = (offsets + scales / 2).view(np.uint8)
    exact = engines.transformers(written, ids)
    assert np.abs(engines.LlamaCpp(written).follow(ids) - exact).max() <= ROUNDED_ACTIVATIONS
    assert np.abs(engines.openvino(written, ids) - exact).max() > 2 * ROUNDED_ACTIVATIONS


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3, "tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32, "num_hidden_layers": 7},
}


def random_model(kind: str, folder: Path, tokenizer: Path) -> Path:
    """A tiny model of another architecture, its norms and biases no ones and zeros."""
    sizes = {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2, "max_position_embeddings": 512,
        "initializer_range": 0.1, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | ARCHITECTURES[kind]))
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in tokenizer.glob("token*"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_other_architectures_predict_the_same(kind: str, tiny_model: Path, tmp_path: Path, ids: np.ndarray) -> None:
    base = random_model(kind, tmp_path / "base", tiny_model)
    folder = make(base, tmp_path / "int8", scheme="w8a16")
    written = formats.export(str(folder), "gguf", tmp_path / "model.gguf")
    ours = engines.transformers(folder, ids)
    assert np.abs(engines.LlamaCpp(Path(written.path)).follow(ids) - ours).max() <= ROUNDED_ACTIVATIONS
    assert (OPENVINO in written.unfit) == (kind == "llama" or kind.startswith("gemma"))
    if kind == "llama":  # read without a word, and wrongly
        for read in (engines.openvino, engines.transformers):
            assert np.abs(read(Path(written.path), ids) - ours).max() > ROUNDED_ACTIVATIONS
        assert "ignores RoPE's scaling" in written.unfit[OPENVINO]
    elif OPENVINO not in written.unfit:
        assert np.abs(engines.openvino(Path(written.path), ids) - ours).max() <= FLOAT32


TEXTS = [
    vocabulary.PROBE,
    "The old river runs slowly, and 42 birds keep 1999 stones.",
    "tabs\tand\n\nlines   and trailing space ",
    "Ünïcödé — 東京 🙂",
]


@pytest.mark.parametrize("pieces", [False, True], ids=["byte-level", "sentencepiece"])
def test_engines_tokenize_as_transformers_does(pieces: bool, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    if pieces:
        sentencepiece_tokenizer().save_pretrained(folder)
    ours = AutoTokenizer.from_pretrained(folder)
    ours.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    ours.save_pretrained(folder)
    written = formats.export(str(folder), "gguf", tmp_path / "model.gguf")
    engine = engines.LlamaCpp(Path(written.path))
    for text in TEXTS:
        assert engine.tokens(text) == ours(text, add_special_tokens=False).input_ids, text
    messages = [{"role": "user", "content": "the old river"}]
    assert engine.chat(messages) == ours.apply_chat_template(messages, tokenize=False)
    if pieces:
        assert "does not know SentencePiece" in written.unfit[OPENVINO]
    else:
        for text in TEXTS:
            assert engines.openvino_tokens(Path(written.path), text) == ours(text, add_special_tokens=False).input_ids


def sentencepiece_tokenizer() -> Any:
    """Llama 2's kind: spaces become ▁, one stands before the text, and unknown characters fall back to bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, max_token_length=12)
    tokenizer.train_from_iterator([word for text in sentences(0, 40) for word in text.split()], trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = described["added_tokens"][:3]  # bytes are pieces like others
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_compressed_tensors_is_the_checkpoint_itself(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "int4", scheme="w4a16")
    written = formats.export(str(folder), "compressed-tensors", tmp_path / "copy")
    assert checkpoints.describe(tmp_path / "copy", "x").digest == checkpoints.describe(folder, "x").digest
    assert written.tensors["4 bits, symmetric, groups of 32"] == written.quantized == 14


@pytest.mark.parametrize(
    ("settings", "version"),
    [
        ({"scheme": "w4a16", "head": "w8a16"}, "gptq"),
        ({"scheme": "w3a16"}, "gptq"),
        ({"scheme": "w4a16", "symmetric": False}, "gptq_v2"),
    ],
)
def test_gptq_files_say_what_they_hold(
    settings: dict[str, Any], version: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = make(tiny_model, tmp_path / "checkpoint", **settings)
    written = formats.export(str(folder), "gptq", tmp_path / "gptq")
    config = checkpoints.read_config(tmp_path / "gptq")["quantization_config"]
    assert (config["checkpoint_format"], config["sym"]) == (version, version == "gptq")
    assert config["bits"] == int(settings["scheme"][1])
    tensors = checkpoints.read_tensors(tmp_path / "gptq")
    layer = packed.read_quantized(folder)["model.layers.0.mlp.down_proj"]
    prefix, bits = "model.layers.0.mlp.down_proj", layer.bits
    integers = packed.unpack(tensors[f"{prefix}.qweight"], bits, (256, 128), dim=0)
    zeros = packed.unpack(tensors[f"{prefix}.qzeros"], bits, (8, 128), dim=1).int() + (version == "gptq")
    weight = (integers.view(8, 32, 128) - zeros.unsqueeze(1)) * tensors[f"{prefix}.scales"].float().unsqueeze(1)
    torch.testing.assert_close(weight.flatten(0, 1).T, layer.dequantize(), rtol=0, atol=0)
    assert written.largest_change == 0


def test_bad_calls_write_nothing(tiny_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "made" / "model.gguf"
    calls: list[tuple[str, str, Path, type[Exception], str]] = [
        (str(tiny_model), "ggfu", target, UsageError, "unknown format 'ggfu'"),
        (str(tiny_model), "gguf", tiny_model, UsageError, "exists"),
        (str(tiny_model), "gguf", target.with_suffix(".bin"), UsageError, r"does not end in \.gguf"),
        (str(tmp_path), "gguf", target, SourceError, "not a checkpoint"),
        (str(tmp_path / "nowhere"), "gguf", target, UsageError, "cannot be read"),
        (str(tiny_model), "gptq", target, StageError, "is not quantized"),
        (str(tiny_model), "compressed-tensors", target, StageError, "is not quantized"),
    ]
    for source, kind, path, error, says in calls:
        with pytest.raises(error, match=says) as caught:
            formats.export(source, kind, path)
        assert caught.value.hint
    odd = make(tiny_model, tmp_path / "odd", scheme="w4a16", group_size=16)
    with pytest.raises(StageError, match="groups of 16"):
        formats.export(str(odd), "gguf", target)
    assert not target.parent.exists() or not list(target.parent.iterdir())


def test_the_command_prints_what_was_written(tiny_model: Path, tmp_path: Path) -> None:
    command = ["export", str(tiny_model), "--format", "gguf", "--to", str(tmp_path / "m.gguf")]
    done = CliRunner().invoke(main, [*command, "--json"])
    assert done.exit_code == 0, done.output
    assert formats.Exported.model_validate_json(done.stdout).tensors == {"F16": 15, "F32": 5}
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 2
    assert "m.gguf exists" in again.stderr
