"""A student drawn from its teacher: fewer layers, each a copy of one of the teacher's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from pennyweight import checkpoints
from pennyweight.distillation.config import copied_layers, student_config
from pennyweight.quantization import decoder
from pennyweight.recipe import Distill


def draw(teacher: Path, step: Distill, folder: Path) -> None:
    """Write the student that the step's `student` names to `folder`, a checkpoint as the teacher's is.

    Raises ValueError where the teacher has too few layers.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    assert step.student
    config = checkpoints.read_config(teacher)
    with torch.device("meta"):
        name, blocks = decoder.blocks(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(teacher)))
    places = {layer: place for place, layer in enumerate(copied_layers(len(blocks), step.student.layers))}
    layer_of = re.compile(rf"^{re.escape(name)}\.(\d+)\.")
    tensors = {}
    for key, value in checkpoints.read_tensors(teacher).items():
        found = layer_of.match(key)
        if found is None:
            tensors[key] = value
        elif int(found[1]) in places:
            tensors[f"{name}.{places[int(found[1])]}.{key[found.end() :]}"] = value
    copy_beside(teacher, folder)
    (folder / "config.json").write_text(json.dumps(student_config(config, step), indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def copy_beside(source: Path, folder: Path) -> None:
    """A checkpoint's files but its weights: config, tokenizer, template."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != checkpoints.INDEX:
            shutil.copy(path, folder)
