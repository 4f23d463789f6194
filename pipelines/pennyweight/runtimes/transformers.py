"""The `transformers` runtime: loads a checkpoint as it is. The reference that quality is compared with."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pennyweight.records import Candidate, Checkpoint
from pennyweight.runtimes import Generation, RuntimeKind

if TYPE_CHECKING:
    import numpy as np
    import torch


def compute_dtype(checkpoint: Checkpoint, device: str) -> str:
    """The checkpoint's own dtype where the machine computes in it, else float32."""
    from pennyweight import machine

    if device == "cuda":
        return checkpoint.dtype
    native = {"bfloat16": machine.has_native_bf16(), "float32": True}
    return checkpoint.dtype if native.get(checkpoint.dtype, False) else "float32"


class TransformersSession:
    def __init__(self, candidate: Candidate, device: str):
        import torch
        from transformers import AutoModelForCausalLM

        from pennyweight import machine

        if device == "cpu":
            torch.set_num_threads(machine.threads())
        self._device = device
        self._model: Any = AutoModelForCausalLM.from_pretrained(candidate.path, dtype=getattr(torch, candidate.dtype))
        self._model.to(device).eval()

    def logits(self, ids: np.ndarray) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            return self._model(torch.from_numpy(ids).to(self._device), use_cache=False).logits

    def hidden_states(self, ids: np.ndarray) -> torch.Tensor:
        """What the head is applied to: the final norm's output, (batch, length, hidden size)."""
        import torch

        with torch.inference_mode():
            return self._model.base_model(torch.from_numpy(ids).to(self._device), use_cache=False).last_hidden_state

    def head(self) -> torch.nn.Module:
        return self._model.get_output_embeddings()

    def generate(self, ids: np.ndarray, new_tokens: int) -> Generation:
        import torch

        with torch.inference_mode():
            start = time.perf_counter()
            prompt = torch.from_numpy(ids).to(self._device)
            output = self._model(prompt, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1:].argmax(-1)
            tokens = [token.cpu()]  # the copy waits for the device, so the times are the device's
            ttft = time.perf_counter() - start
            steps: list[float] = []
            for _ in range(new_tokens - 1):
                begin = time.perf_counter()
                output = self._model(token, past_key_values=output.past_key_values, use_cache=True)
                token = output.logits[:, -1:].argmax(-1)
                tokens.append(token.cpu())
                steps.append(time.perf_counter() - begin)
        return Generation(ttft, steps, torch.cat(tokens, dim=1).numpy())

    def close(self) -> None:
        import gc

        self._model = None
        gc.collect()


RUNTIME = RuntimeKind(
    version=1,
    libraries=("transformers", "torch", "compressed-tensors"),
    export=None,
    load=TransformersSession,
    compute_dtype=compute_dtype,
)
