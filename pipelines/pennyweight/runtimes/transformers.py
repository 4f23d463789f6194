"""The `transformers` runtime: loads a checkpoint as it is. The reference that quality is compared with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.records import Candidate, Checkpoint
from pennyweight.runtimes import Generation, RuntimeKind

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pennyweight.plan.sizes import ModelShape


def compute_dtype(checkpoint: Checkpoint, device: str) -> str:
    """The checkpoint's own dtype where the machine computes in it, else float32."""
    from pennyweight import machine

    if device == "cuda":
        return checkpoint.dtype
    native = {"bfloat16": machine.has_native_bf16(), "float32": True}
    return checkpoint.dtype if native.get(checkpoint.dtype, False) else "float32"


def streamed_bytes(candidate: Candidate, shape: ModelShape) -> int:
    """Every matrix once, unpacked."""
    from pennyweight.plan.sizes import ITEMSIZE

    return shape.product_weights * ITEMSIZE[candidate.dtype]


class TransformersSession:
    def __init__(self, candidate: Candidate, device: str):
        import torch

        from pennyweight import machine
        from pennyweight.quantization.unpacked import load_model

        if device == "cpu":
            torch.set_num_threads(machine.threads())
        self._device = device
        self.model: Any = load_model(Path(candidate.path), getattr(torch, candidate.dtype))
        self.model.to(device).eval()
        self.context: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def logits(self, ids: np.ndarray) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            return self.model(torch.from_numpy(ids).to(self._device), use_cache=False).logits

    def hidden_states(self, ids: np.ndarray) -> torch.Tensor:
        """What the head is applied to: the final norm's output, (batch, length, hidden size)."""
        import torch

        with torch.inference_mode():
            return self.model.base_model(torch.from_numpy(ids).to(self._device), use_cache=False).last_hidden_state

    def head(self) -> torch.nn.Module:
        return self.model.get_output_embeddings()

    def generate(self, ids: np.ndarray, new_tokens: int, stop: bool = False) -> Generation:
        import torch

        end = _end_tokens(self.model)

        def choose(logits: torch.Tensor) -> torch.Tensor:
            if end and not stop:
                logits[..., end] = -torch.inf
            return logits.argmax(-1)

        with torch.inference_mode():
            start = time.perf_counter()
            prompt = torch.from_numpy(ids).to(self._device)
            output = self.model(prompt, use_cache=True, logits_to_keep=1)
            token = choose(output.logits[:, -1:])
            tokens = [token.cpu()]  # the copy waits for the device, so the times are the device's
            ttft = time.perf_counter() - start
            steps: list[float] = []
            for _ in range(new_tokens - 1):
                if stop and bool(torch.isin(torch.cat(tokens, 1), torch.tensor(end)).any(1).all()):
                    break
                begin = time.perf_counter()
                output = self.model(token, past_key_values=output.past_key_values, use_cache=True)
                token = choose(output.logits[:, -1:])
                tokens.append(token.cpu())
                steps.append(time.perf_counter() - begin)
        return Generation(ttft, steps, torch.cat(tokens, dim=1).numpy())

    def close(self) -> None:
        import gc

        self.model = None
        gc.collect()


def _end_tokens(model: Any) -> list[int]:
    end = model.generation_config.eos_token_id if model.generation_config else model.config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


RUNTIME = RuntimeKind(
    version=2,
    libraries=("transformers", "torch", "compressed-tensors"),
    export=None,
    load=TransformersSession,
    compute_dtype=compute_dtype,
    streamed_bytes=streamed_bytes,
    unpacks=True,
)
