"""Turning what a model is published as into a plain safetensors checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pennyweight.checkpoints import INDEX, read_config, weight_files
from pennyweight.errors import SourceError

GGUF_LIBRARIES = ("transformers", "gguf", "torch", "safetensors")
CAST_LIBRARIES = ("torch", "safetensors")


def gguf_to_checkpoint(gguf: Path, folder: Path, dtype: str) -> None:
    """Unpack a GGUF file into `folder`: weights in `dtype`, config, generation config, tokenizer, chat template.

    Raises SourceError when transformers cannot read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype))
    except Exception as error:  # the reader raises whatever a broken or unknown file makes it trip over
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(
            f"transformers cannot read {gguf.name}: {reason}",
            "take the model's safetensors where it has them, or another GGUF file of it",
        ) from error
    # A model read from GGUF counts as quantized and refuses to be saved, although its weights are plain by now.
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(type(model.config).from_dict(config), dtype=getattr(torch, dtype))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    _set_special_tokens(tokenizer, config)
    tokenizer.save_pretrained(folder)


def _set_special_tokens(tokenizer: Any, config: dict[str, Any]) -> None:
    """Give the tokenizer the special tokens that the GGUF header names.

    transformers 5.17 takes the header's beginning-of-sequence token for the end-of-sequence token too.
    """
    for role in ("bos", "eos", "pad", "unk"):
        if (token := config.get(f"{role}_token_id")) is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token))
    tokenizer.clean_up_tokenization_spaces = False  # it would change text that a byte-level tokenizer decodes exactly


def cast_checkpoint(source: Path, folder: Path, dtype: str) -> None:
    """Copy a checkpoint with its floating-point tensors in `dtype`. One file's tensors are in memory at a time."""
    import torch
    from safetensors.torch import load_file, save_file

    wanted = getattr(torch, dtype)
    files = weight_files(source)
    total = 0
    for file in files:
        tensors = {name: t.to(wanted) if t.is_floating_point() else t for name, t in load_file(file).items()}
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
    for path in companion_files(source):
        shutil.copyfile(path, folder / path.name)
    config = {key: value for key, value in read_config(source).items() if key != "torch_dtype"}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")
    if (source / INDEX).is_file():
        index = json.loads((source / INDEX).read_text())
        index.setdefault("metadata", {})["total_size"] = total
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def companion_files(folder: Path) -> list[Path]:
    """The files beside the weights that belong to a checkpoint: config, tokenizer, templates, the model's own code."""
    names = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in names)
