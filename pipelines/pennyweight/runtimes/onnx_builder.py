"""Runs onnxruntime-genai's model builder in a process of its own: `python -m … JOB.json`.

The builder prints thousands of lines, changes `sys.path`, and holds the whole model in memory; none of that should
outlast it. One thing is added to it: its reader of GPTQ checkpoints expects every linear layer to be quantized, and
here the layers that a variant leaves alone stay as they are.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def main(job_path: str) -> None:
    job: dict[str, Any] = json.loads(Path(job_path).read_text())
    package = find_spec("onnxruntime_genai")
    assert package is not None and package.submodule_search_locations
    sys.path.insert(0, str(Path(package.submodule_search_locations[0]) / "models"))
    builder = import_module("builder")
    _leave_float_layers_alone()
    paths = (job["source"], job["source"], job["target"], job["precision"], job["provider"], job["cache"])
    options = builder.parse_extra_options(*paths, job["options"])
    builder.create_model(*paths, **options)


def _leave_float_layers_alone() -> None:
    import torch

    base = import_module("loaders.base")
    quant_model = import_module("loaders.quant_model")

    class MixedGPTQModel(quant_model.GPTQModel):
        def set_properties(self) -> None:
            for layer in self.layers:
                for block in (layer.self_attn, layer.mlp):
                    for name, module in vars(block).items():
                        if isinstance(module, base.QuantizedTensorModule) and _is_float(module.qweight):
                            plain = base.TensorModule(weight=module.qweight, bias=module.bias)
                            plain.exclude_from_quantization = True
                            setattr(block, name, plain)
            super().set_properties()

    def _is_float(weight: Any) -> bool:
        return isinstance(weight, torch.Tensor) and weight.is_floating_point()

    quant_model.GPTQModel = MixedGPTQModel


if __name__ == "__main__":
    main(sys.argv[1])
