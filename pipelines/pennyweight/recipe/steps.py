"""The steps of a variant, as a recipe writes them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pennyweight.recipe.learning import Distill, Recover
from pennyweight.recipe.pruning import Prune
from pennyweight.recipe.quantizing import Quantize
from pennyweight.schema import Name, Section


class From(Section):
    """Start from one of `bases` instead of `base`. It comes first; alone it lets that model compete unchanged."""

    imitates_base: ClassVar[bool] = False
    text_key: ClassVar[str] = ""
    calibrate: ClassVar[None] = None

    kind: Literal["from"] = "from"
    base: Name
    """A name in `bases`."""

    def describe(self) -> str:
        return f"from {self.base}"


Step = Annotated[From | Prune | Quantize | Recover | Distill, Field(discriminator="kind")]
STEPS: dict[str, type[Section]] = {
    "from": From,
    "prune": Prune,
    "distill": Distill,
    "quantize": Quantize,
    "recover": Recover,
}


def step_by_kind(item: Any) -> Any:
    """`{quantize: {…}}`, as a step is written, to `{kind: quantize, …}`. Raises ValueError for any other shape."""
    if isinstance(item, dict) and "kind" not in item and len(item) == 1:
        kind, body = next(iter(item.items()))
        return {"kind": kind, **body} if isinstance(body, dict) else {"kind": kind}
    if isinstance(item, str):
        raise ValueError(f"a step is a mapping with one key, the kind of step, and its settings: {{{item}: {{…}}}}")
    if isinstance(item, dict) and "kind" not in item:
        raise ValueError(f"a step is a mapping with one key, the kind of step; this one has {sorted(map(str, item))}")
    return item
