"""A tiny random Llama with a tokenizer of its own, tiny data, and a recipe over both: the whole flow in seconds."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pennyweight.quantization import reload

PREDICT_AFRESH = reload.predict_afresh

if "PYTEST_XDIST_WORKER" in os.environ:
    # One of several test processes, each with a core of its own. Torch reads these when it is imported.
    os.environ["OMP_NUM_THREADS"] = os.environ["PENNYWEIGHT_THREADS"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("PENNYWEIGHT_PRICES", None)

WORDS = """
    the a one river stone light garden walks under over near old young green quiet runs sees keeps
    finds gives small large and but while because house road winter summer bird child letter water fire morning
    evening slowly always
""".split()  # noqa: SIM905


def sentences(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(40)).capitalize() + "." for _ in range(count)]


@pytest.fixture(scope="session", autouse=True)
def reload_here() -> Iterator[None]:
    """Steps that tests call themselves prove their checkpoint in this process: a fresh one takes seconds to import.
    `fresh_process` gives a test the real thing, and so does every run of the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reload, "predict_afresh", reload.predict)
        yield


@pytest.fixture
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "predict_afresh", PREDICT_AFRESH)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, every linear layer's input a multiple of 128."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(sentences(0, 200), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.1,  # larger than usual, so that the random model's predictions are not all alike
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_small(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer with the vocabulary of `tiny_model`."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("small") / "small")
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(tiny_model)
    config.num_hidden_layers = 1
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`calibration.jsonl`, `held-out.jsonl` and `more.jsonl`, no sentence in two of them."""
    folder = tmp_path_factory.mktemp("data")
    for name, seed in (("calibration", 1), ("held-out", 2), ("more", 3)):
        rows = [json.dumps({"body": text}) for text in sentences(seed, 60)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_recipe_text(tiny_model: Path, tiny_data: Path) -> str:
    """A recipe over the tiny model; small budgets everywhere."""
    recipe = {
        "name": "tiny",
        "base": str(tiny_model),
        "device": "cpu",
        "variants": {
            "int8": [{"quantize": {"scheme": "w8a16", "method": "rtn", "group_size": 32, "head": "w8a16"}}],
            "int4-gptq": [
                {
                    "quantize": {
                        "scheme": "w4a16",
                        "method": "gptq",
                        "group_size": 32,
                        "calibrate": {"source": "calibration-text", "samples": 8, "length": 32},
                    }
                }
            ],
        },
        "runtimes": {"base": ["transformers"], "variants": ["onnxruntime"]},
        "evaluate": {
            "name": "tiny",
            "divergence": {"text": "held-out-text", "windows": 4, "length": 64},
            "perplexity": [{"text": "more-text", "windows": 4, "length": 32}],
            "generation": {"text": "held-out-text", "prompts": 4, "input_tokens": 8, "output_tokens": 8},
            "tasks": [{"task": "openbookqa", "limit": 20}],
            "batch_size": 4,
        },
        "gate": [
            {"metric": "kl_mean", "max": 0.01},
            {"task": "openbookqa", "metric": "acc", "non_inferior_within": 0.5},
        ],
        "benchmark": {
            "workload": {"input_tokens": 16, "output_tokens": 8},
            "concurrency": [1, 2],
            "decide_at": 1,
            "rounds": 2,
            "decide_rounds": 6,
            "price": {"name": "test-machine", "usd_per_hour": 1.0},
        },
        "register": "tiny",
        "data": {
            "calibration-text": {"uri": f"file:{tiny_data}/calibration.jsonl", "text": "body"},
            "held-out-text": {"uri": f"file:{tiny_data}/held-out.jsonl", "text": "body"},
            "more-text": {"uri": f"file:{tiny_data}/more.jsonl", "text": "body"},
        },
    }
    return yaml.safe_dump(recipe, sort_keys=False)
