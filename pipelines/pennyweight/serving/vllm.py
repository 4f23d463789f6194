"""vLLM in place of our own server, where a GPU and vLLM are there.

Built from its documentation; not yet run on a GPU.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack

from pennyweight import machine
from pennyweight.errors import UsageError
from pennyweight.load import models
from pennyweight.serving.model import name_of
from pennyweight.serving.settings import Settings
from pennyweight.store import Store

#: Variable that vLLM reads its key from: an argument would be seen by all who list processes.
KEY_VARIABLE = "VLLM_API_KEY"


def is_here() -> bool:
    """A GPU, and the command `vllm`: it lives in an environment of its own, as it pins its own torch."""
    return machine.has_gpu() and shutil.which("vllm") is not None


def command(settings: Settings, store: Store, stack: ExitStack) -> list[str]:
    """The command that serves a target's checkpoint with vLLM, which sees for itself how it is quantized.

    What was fetched from the registry goes with `stack`. Raises UsageError for what vLLM cannot load.
    """
    model = models.find(settings.target, store, stack)
    if model.checkpoint is None:
        runtime = model.candidate.runtime if model.candidate else "another runtime"
        raise UsageError(
            f"{model.name} is made for {runtime}, and vLLM loads checkpoints", f"serve it with --runtime {runtime}"
        )
    longest = settings.max_prompt_tokens + settings.max_output_tokens
    context = _context(model.checkpoint.path)
    return [
        "vllm", "serve", model.checkpoint.path,
        "--served-model-name", settings.name or name_of(settings.target),
        "--host", settings.host,
        "--port", str(settings.port),
        "--dtype", model.checkpoint.dtype if model.checkpoint.dtype in DTYPES else "auto",
        "--max-model-len", str(longest if context is None else min(longest, context)),
    ]  # fmt: skip


def environment(settings: Settings) -> dict[str, str]:
    """What vLLM is told by its environment. Raises UsageError for several keys, of which it knows one."""
    if len(settings.keys) > 1:
        raise UsageError("vLLM takes one API key from its environment", "leave one, or put a gateway before it")
    return {KEY_VARIABLE: settings.keys[0].decode()} if settings.keys else {}


#: Of activations, as vLLM calls them.
DTYPES = ("bfloat16", "float16", "float32")


def _context(folder: str) -> int | None:
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None)
