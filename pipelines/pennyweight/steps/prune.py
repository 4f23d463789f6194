"""`prune`: take blocks, feed-forward channels and groups of heads out of a decoder, and prove what is left.

What stays is a plain checkpoint of the same architecture, which every runtime loads.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight import checkpoints
from pennyweight.errors import StageError
from pennyweight.memory import out_of_memory_of
from pennyweight.pruning import blocks
from pennyweight.pruning.config import cut_config, head_dim, kept_channels, pruned_config, text_model
from pennyweight.quantization import decoder, verify
from pennyweight.recipe import Prune
from pennyweight.records import Checkpoint, Pruning

if TYPE_CHECKING:
    from pennyweight.pruning.reduce import Cut
    from pennyweight.steps import StepContext


def run(checkpoint: Checkpoint, step: Prune, context: StepContext, files: Path) -> Pruning:
    """Write the pruned checkpoint to `files`. Raises StageError where the model has not that much to take out, or where
    what was written is not what was made."""
    import torch

    from pennyweight.pruning import depth, reduce
    from pennyweight.pruning.files import write
    from pennyweight.pruning.trials import Trials, batch_of

    begin, source = time.monotonic(), Path(checkpoint.path)
    torch.manual_seed(context.seed)
    if checkpoint.format != "safetensors":
        raise StageError("prune takes plain weights, and these are quantized", "put `prune` before `quantize`")
    config = checkpoints.read_config(source)
    possible(config, step)
    with out_of_memory_of("prune", "lower `samples` or `length`"):
        model = decoder.load(checkpoint, context.device)
        removed, choices, seen, text = frozenset(step.drop), [], None, None
        if context.calibration is not None:
            windows = torch.from_numpy(context.calibration).to(context.device)
            text, held_out = windows[: -step.held_out], windows[-step.held_out :]
            seen = Trials(model, held_out, batch_of(held_out))
        if step.layers:
            assert text is not None
            choices = depth.choose(model, text, step.layers, step.choose, _part(context, 0.0, 0.7))
            removed = choices[-1].removed
            possible(config, Prune(drop=sorted(removed)))
        curve = [(len(choice.removed), seen.kl(choice.removed)) for choice in choices] if seen else []
        kl_cut = seen.kl(removed) if seen and removed else None
        kl_influence = seen.kl(depth.least_influential(seen, len(removed))) if seen and removed else None
        cut, after = _cut(config, step, removed), cut_config(config, sorted(removed), step.ffn, step.kv_groups)
        refitted = 0 if text is None else reduce.reduce(model, cut, text, _part(context, 0.7, 1.0))
        reduce.become(model, removed, text_model(config), text_model(after))
        kl = seen.now() if seen else None
        _show(context, curve, kl)
        write(source, files, model, after, removed, checkpoint.dtype)
        difference = verify.check_reload(files, model)
    made = checkpoints.describe(files, origin="")
    return Pruning(
        removed=sorted(removed),
        layers=(len(decoder.blocks(model)[1]) + len(removed), len(decoder.blocks(model)[1])),
        measure="named" if step.drop else step.choose if step.layers else None,
        channels=(cut.channels, cut.kept_channels) if step.ffn else None,
        kv_groups=(cut.kept_groups + step.kv_groups, cut.kept_groups) if step.kv_groups else None,
        refitted=refitted,
        kl_cut=kl_cut,
        kl_influence=kl_influence,
        kl=kl,
        curve=curve,
        parameters=(checkpoint.parameters, made.parameters),
        weight_bytes=(checkpoint.weight_bytes, made.weight_bytes),
        reload_difference=difference,
        seconds=time.monotonic() - begin,
        earlier=checkpoint.pruning,
    )


def _show(context: StepContext, curve: list[tuple[int, float]], kl: float | None) -> None:
    """Tell the curve of blocks taken out against held-out KL, and what it is once what stays was fitted."""
    for number, found in curve:
        context.measure(number, {"held_out_kl": found})
    if kl is not None:
        context.measure(curve[-1][0] if curve else 0, {"held_out_kl_fitted": kl})


def possible(config: dict[str, Any], step: Prune) -> None:
    """Raise StageError where a model of that config has not that much to take out."""
    try:
        blocks.check(config, step)
        pruned_config(config, step)
    except ValueError as error:
        raise StageError(f"prune: {error}") from None


def _cut(config: dict[str, Any], step: Prune, removed: frozenset[int]) -> Cut:
    from pennyweight.pruning.reduce import Cut

    known = text_model(config)
    groups = known.num_key_value_heads - step.kv_groups if step.kv_groups else 0
    return Cut(
        removed=removed,
        channels=known.intermediate_size if step.ffn else None,
        kept_channels=kept_channels(known.intermediate_size, step.ffn) if step.ffn else 0,
        kept_groups=groups,
        head_dim=head_dim(known),
        refit=step.refit,
    )


def _part(context: StepContext, begin: float, end: float) -> Any:
    """A report on a part of the work."""
    return lambda detail, done: context.report(detail, begin + (end - begin) * done)
