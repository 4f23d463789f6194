"""What pruning makes of a model's config. Pure: it knows shapes, and no weights."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

from pennyweight.recipe import Prune

#: Channels go by so many where the model has a multiple of it, so that groups of quantized weights still fit; by fewer
#: powers of two where that would be more than an eighth of them.
CHANNELS_TOGETHER = 128
#: Windows that a search measures on, at most.
SEARCHED = 32
#: Choices that are carried on from one removal to the next.
BEAM = 2
#: Of the trials in a race one in so many goes on to twice the text.
SURVIVORS = 3
#: Tokens that go through the blocks together, about.
BATCH_TOKENS = 512


def pruned_config(config: dict[str, Any], step: Prune) -> dict[str, Any]:
    """The config of a model after `step`. Which blocks a search will take is not known yet; evenly spread ones stand
    for them. Raises ValueError, with a message for the recipe's author, where the model has not as much to take out."""
    count = layer_count(config)
    return cut_config(config, step.drop or spread(count, step.removed_layers), step.ffn, step.kv_groups)


def cut_config(
    config: dict[str, Any], removed: list[int], ffn: float | None = None, kv_groups: int | None = None
) -> dict[str, Any]:
    """The config without the blocks `removed`, a fraction `ffn` of the channels and `kv_groups` of the KV heads.

    Raises ValueError where that is more than there is, or makes a shape that the architecture does not allow.
    """
    cut = deepcopy(config)
    section = cut["text_config"] if isinstance(cut.get("text_config"), dict) else cut
    parsed = text_model(config)
    section |= _without_layers(parsed, removed) if removed else {}
    if ffn is not None:
        section["intermediate_size"] = kept_channels(whole(parsed, "intermediate_size", "ffn"), ffn)
    if kv_groups is not None:
        section |= _without_groups(parsed, kv_groups)
    _check(cut)
    return cut


def layer_count(config: dict[str, Any]) -> int:
    return whole(text_model(config), "num_hidden_layers", "layers")


def spread(count: int, removed: int) -> list[int]:
    """`removed` of `count` numbers, evenly spread; all of them where more are asked for."""
    return [int((index + 0.5) * count / removed) for index in range(removed)] if removed < count else list(range(count))


def kept_channels(channels: int, fraction: float) -> int:
    """How many of `channels` stay when about `fraction` of them go. Raises ValueError where none would go or stay."""
    together = min(math.gcd(channels, CHANNELS_TOGETHER), max(1, 2 ** int(math.log2(channels / 8))))
    kept = together * round(channels * (1 - fraction) / together)
    if kept in (0, channels):
        raise ValueError(
            f"ffn: {fraction:g} of {channels} channels, taken {together} at a time, leaves {kept}; "
            f"take from {together / channels:.3g} to {1 - together / channels:.3g}"
        )
    return kept


def _without_layers(parsed: Any, removed: list[int]) -> dict[str, Any]:
    count = whole(parsed, "num_hidden_layers", "layers")
    if wrong := [block for block in removed if not 0 <= block < count]:
        raise ValueError(f"drop: the model has blocks 0 to {count - 1}, and none of number {wrong[0]}")
    if len(removed) >= count:
        raise ValueError(f"{len(removed)} of {count} blocks leave none; {_at_most(count)}")
    kept = [block for block in range(count) if block not in removed]
    changed: dict[str, Any] = {parsed.attribute_map.get("num_hidden_layers", "num_hidden_layers"): len(kept)}
    for key, value in parsed.to_dict().items():
        if not isinstance(value, list) or "layer" not in key or not value:
            continue
        if len(value) != count:
            raise ValueError(f"`{key}` names {len(value)} things for {count} blocks, so it cannot be cut with them")
        changed[key] = [value[block] for block in kept]
    return changed


def _without_groups(parsed: Any, removed: int) -> dict[str, Any]:
    heads, groups = (whole(parsed, key, "kv_groups") for key in ("num_attention_heads", "num_key_value_heads"))
    if removed >= groups:
        raise ValueError(f"kv_groups: {removed} of {groups} key/value heads leave none; {_at_most(groups)}")
    kept = groups - removed
    return {
        "num_key_value_heads": kept,
        "num_attention_heads": heads // groups * kept,
        "head_dim": head_dim(parsed),
    }


def _at_most(count: int) -> str:
    return f"take out {count - 1} at most" if count > 1 else "it has no other"


def _check(cut: dict[str, Any]) -> None:
    """Raise ValueError where transformers refuses the config."""
    try:
        text_model(cut)
    except Exception as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"the architecture has no such shape: {reason}") from error


def text_model(config: dict[str, Any]) -> Any:
    """The text model's config, with all that its architecture derives."""
    return parse(config).get_text_config()


def head_dim(parsed: Any) -> int:
    return getattr(parsed, "head_dim", None) or parsed.hidden_size // parsed.num_attention_heads


def parse(config: dict[str, Any]) -> Any:
    """The whole model's config. Raises ValueError for an architecture that transformers does not know."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"transformers knows no model type {config.get('model_type')!r}")
    return AutoConfig.for_model(**{key: value for key, value in config.items() if key != "quantization_config"})


def whole(parsed: Any, key: str, setting: str) -> int:
    """A number of the config that `setting` of a step is about. Raises ValueError where it states none, or several."""
    value = getattr(parsed, key, None)
    if not isinstance(value, int):
        raise ValueError(f"{setting}: the model's config states no single `{key}`; leave `{setting}` out")
    return value
