"""A pruned decoder as a plain checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from pennyweight.checkpoints import DTYPES, INDEX, read_headers
from pennyweight.pruning.trials import Removed
from pennyweight.quantization import decoder


def write(source: Path, target: Path, model: Any, config: dict[str, Any], removed: Removed, dtype: str) -> None:
    """Write `model`, whose blocks are numbered anew, and `config` to `target`; what else is in `source` comes along.

    Tensors get the names that they are published under, which for experts are not those that transformers computes
    with, and keep the dtypes that they have in `source`, where those of a block are under its former number; `dtype`
    where it has no such tensor.
    """
    import torch
    from huggingface_hub import save_torch_state_dict
    from transformers.core_model_loading import revert_weight_conversion

    name, blocks = decoder.blocks(model)
    count = len(blocks) + len(removed)
    former = [index for index in range(count) if index not in removed]
    pattern = re.compile(rf"^({re.escape(name)}\.)(\d+)(\..*)$")

    def before(key: str) -> str:
        return pattern.sub(lambda found: f"{found[1]}{former[int(found[2])]}{found[3]}", key)

    dtypes = {t.name: getattr(torch, DTYPES[t.dtype]) for t in read_headers(source) if t.dtype in DTYPES}
    computed = model.state_dict()
    if decoder.is_tied(model):
        computed.pop(f"{decoder.head_name(model)}.weight", None)
    tensors = {}
    for key, value in revert_weight_conversion(model, computed).items():
        otherwise = getattr(torch, dtype) if value.is_floating_point() else value.dtype
        tensors[key] = value.to("cpu", dtypes.get(before(key), otherwise)).contiguous()
    save_torch_state_dict(tensors, target)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", INDEX):
            shutil.copy(path, target)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
