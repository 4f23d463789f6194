"""`recover`: heal a quantized checkpoint by training it to predict what the base predicts that it was made from.

What is not an integer learns (Hinton et al., 2015; for quantized weights Chen et al., EfficientQAT, 2024), so the
result has exactly the same size and format. Integers move, and an adapter is added, only where the recipe says so.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.errors import StageError
from pennyweight.memory import out_of_memory_of
from pennyweight.quantization import adapter, decoder
from pennyweight.recipe import Recover
from pennyweight.records import Checkpoint, Healing

if TYPE_CHECKING:
    from pennyweight.steps import StepContext


def run(checkpoint: Checkpoint, step: Recover, context: StepContext, files: Path) -> Healing:
    """Write the healed checkpoint to `files`. Raises StageError if nothing is quantized or the loss is not finite."""
    import torch

    from pennyweight.healing.student import Student
    from pennyweight.healing.train import heal

    if context.calibration is None or context.base is None:
        raise StageError("recover needs text and the base")
    begin = time.monotonic()
    torch.manual_seed(context.seed)
    with out_of_memory_of("recover", "lower `batch` or `length`, or leave `rounding` out of `train`"):
        teacher = decoder.load(context.base, context.device)
        rounded = context.rounded or context.base
        exact = teacher if rounded.digest == context.base.digest else decoder.load(rounded, context.device)
        student = Student(checkpoint, exact, step.moves)
        if not student.scaled:
            raise StageError("recover heals quantized checkpoints, and nothing in this one is quantized")
        trained = list(student.trainables(step.train, step.rank, context.seed))
        if not trained:
            raise StageError(f"this model has none of {', '.join(step.train)}", "add scales to `train`")
        windows = torch.from_numpy(context.calibration).to(context.device)
        held_out, text = windows[: step.held_out], windows[step.held_out :]
        with _compiled(step.compile, teacher, student.model):
            course = heal(student.model, teacher, trained, text, held_out, step, context.report)
    _write(Path(checkpoint.path), student.healed_tensors(), files)
    if step.keeps_adapter:
        adapter.write(files, student.healed_adapter(), step.rank)
    return Healing(
        steps=course.steps,
        tokens=course.tokens,
        ended_by=course.ended_by,
        trained=sum(item.parameter.numel() for item in trained),
        moved=student.moved(),
        kl_before=course.curve[0][1],
        kl_after=course.best,
        curve=course.curve,
        tokens_per_second=course.tokens / course.seconds,
        seconds=time.monotonic() - begin,
    )


@contextmanager
def _compiled(wanted: bool, *models: Any) -> Iterator[None]:
    """Within the block, where `wanted`, the models' passes up to their heads are compiled.

    Raises StageError where the compiler cannot.
    """
    if not wanted:
        yield
        return
    import torch._dynamo.exc

    for model in models:
        model.base_model.compile()
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise StageError(f"recover: torch.compile failed: {reason}", "leave `compile` out") from error
    finally:
        torch.compiler.reset()


def _write(source: Path, healed: dict[str, Any], files: Path) -> None:
    """The checkpoint's files with what was healed in them, in the dtypes that it had."""
    from safetensors.torch import load_file, save_file

    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, files)
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors.keys() & healed.keys():
            tensors[name] = healed[name].detach().to("cpu", tensors[name].dtype).contiguous()
        save_file(tensors, files / path.name, metadata={"format": "pt"})
