"""The `transformers` runtime: loads a checkpoint as it is. The reference that quality is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.records import Candidate, Checkpoint
from pennyweight.runtimes import Limits, RuntimeKind
from pennyweight.runtimes.continuous import Continuous
from pennyweight.runtimes.waves import Choose

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pennyweight.plan.sizes import ModelShape

#: Kinds of layers that remember by keys and values alone.
ATTENTION = {"full_attention", "sliding_attention"}


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


def limits(candidate: Candidate) -> Limits:
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(candidate.path).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Limits(
        context=getattr(config, "max_position_embeddings", None),
        vocabulary=config.vocab_size,
        token_bytes=2 * config.num_hidden_layers * heads * head_size * getattr(torch, candidate.dtype).itemsize,
    )


class TransformersSession(Continuous):
    def __init__(self, candidate: Candidate, device: str):
        import torch

        from pennyweight import machine
        from pennyweight.quantization.unpacked import load_model

        super().__init__()
        if device == "cpu":
            torch.set_num_threads(machine.threads())
        self.device = device
        self.model: Any = load_model(Path(candidate.path), getattr(torch, candidate.dtype))
        self.model.to(device).eval()
        config = self.model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.caches_by_position = set(getattr(config, "layer_types", None) or ()) <= ATTENTION

    def logits(self, ids: np.ndarray) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            return self.model(torch.from_numpy(ids).to(self.device), use_cache=False).logits

    def hidden_states(self, ids: np.ndarray) -> torch.Tensor:
        """What the head is applied to: the final norm's output, (batch, length, hidden size)."""
        import torch

        with torch.inference_mode():
            return self.model.base_model(torch.from_numpy(ids).to(self.device), use_cache=False).last_hidden_state

    def head(self) -> torch.nn.Module:
        return self.model.get_output_embeddings()

    def columns(
        self, ids: np.ndarray, new_tokens: int, stop: bool, choose: Choose | None = None
    ) -> Iterator[np.ndarray]:
        import torch

        token, past = torch.from_numpy(ids).to(self.device), None
        for _ in range(new_tokens):
            token, past = self._next(token, past, stop, choose)
            yield token.cpu().numpy()[:, 0]  # the copy waits for the device, so the times are the device's

    def _next(self, ids: torch.Tensor, past: Any, stop: bool, choose: Choose | None) -> tuple[torch.Tensor, Any]:
        """The token (requests, 1) that follows `ids`, which follow what `past` holds; and what it then holds."""
        import torch

        with torch.inference_mode():
            output = self.model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            logits = output.logits[:, -1:]
            if choose is not None:
                chosen = choose(logits[:, 0].float().cpu().numpy())
                return torch.from_numpy(chosen)[:, None].to(self.device), output.past_key_values
            if not stop and (ends := self.ends()):
                logits[..., ends] = -torch.inf
            return logits.argmax(-1), output.past_key_values

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, places: torch.Tensor, cache: Any) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            output = self.model(
                ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            return output.logits[:, -1]

    def ends(self) -> list[int]:
        settings = self.model.generation_config or self.model.config
        end = settings.eos_token_id
        return [] if end is None else [end] if isinstance(end, int) else list(end)

    def close(self) -> None:
        import gc

        self.model = None
        gc.collect()


RUNTIME = RuntimeKind(
    version=2,
    libraries=("transformers", "torch", "compressed-tensors"),
    export=None,
    load=TransformersSession,
    compute_dtype=compute_dtype,
    streamed_bytes=streamed_bytes,
    unpacks=True,
    limits=limits,
)
