"""Log-probabilities of the tokens that follow, from the engines that read exported files."""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np


def follow(log_probabilities: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """log p of each token of `ids` (windows, length) but the first, from (windows, length, vocabulary)."""
    return np.take_along_axis(log_probabilities[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]


def transformers(path: Path, ids: np.ndarray) -> np.ndarray:
    """A folder, or a GGUF file, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from pennyweight.quantization.unpacked import load_model

    if path.is_dir():
        model = load_model(path, torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        return follow(torch.log_softmax(model(torch.from_numpy(ids)).logits, -1).numpy(), ids)


def openvino(path: Path, ids: np.ndarray) -> np.ndarray:
    """A GGUF file: OpenVINO GenAI reads it into a graph, which is computed in float32."""
    import openvino
    import openvino_genai
    import torch

    folder = path.parent / f"{path.stem}-openvino"
    folder.mkdir()
    copy = Path(shutil.copy(path, folder))
    openvino_genai.LLMPipeline(
        str(copy), "CPU", scheduler_config=openvino_genai.SchedulerConfig(), enable_save_ov_model=True
    )
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}
    request = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", exact).create_infer_request()
    places = np.arange(ids.shape[1])[None].repeat(len(ids), 0)
    done = request.infer(
        {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": places,
            "beam_idx": np.arange(len(ids), dtype=np.int32),
        }
    )
    return follow(torch.log_softmax(torch.from_numpy(done["logits"].copy()), -1).numpy(), ids)


def openvino_tokens(path: Path, text: str) -> list[int]:
    import openvino_genai

    return openvino_genai.Tokenizer(str(path)).encode(text, add_special_tokens=False).input_ids.data[0].tolist()


class LlamaCpp:
    """llama.cpp's server on a GGUF file, in this process."""

    def __init__(self, path: Path):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 512, 1, False, 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        self._server = xllamacpp.Server(settings)

    def follow(self, ids: np.ndarray) -> np.ndarray:
        """Each token that follows is forced, and its log-probability before that is read."""
        found = np.empty((len(ids), ids.shape[1] - 1))
        for row, window in enumerate(ids.tolist()):
            for at in range(1, len(window)):
                forced = [[window[at], 1000.0]]
                asked = {"prompt": window[:at], "n_predict": 1, "n_probs": 1, "temperature": 0, "logit_bias": forced}
                asked["cache_prompt"] = False  # its cache of sliding windows changes predictions
                (chosen,) = self._server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
                assert chosen["id"] == window[at]
                found[row, at - 1] = chosen["logprob"]
        return found

    def tokens(self, text: str) -> list[int]:
        return self._ask("tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]

    def chat(self, messages: list[dict[str, str]]) -> str:
        return self._ask("apply-template", {"messages": messages})["prompt"]

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self._server.listening_address}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
