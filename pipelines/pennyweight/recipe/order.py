"""The order in which a variant's steps make sense."""

from __future__ import annotations

from typing import Any


def check_order(steps: list[Any]) -> list[Any]:
    """The steps as they are. Raises ValueError for the first one that cannot stand where it does, with the reason."""
    for index, step in enumerate(steps):
        if reason := _misplaced(step, [before.kind for before in steps[:index]]) or _without_trunk(step, steps[:index]):
            raise ValueError(f"step {index + 1} of {len(steps)}, {step.kind}, {reason}")
    return steps


def _misplaced(step: Any, before: list[str]) -> str | None:
    """Why a step cannot follow steps of the kinds `before`."""
    match step.kind:
        case "from":
            return "must come first, and once: it says which base the variant starts from" if before else None
        case "recover":
            return None if "quantize" in before else "heals quantized weights: put a quantize step before it"
    if step.kind == "distill" and step.student and before:
        return "draws its student from the base, and what comes before it would be lost: put it first"
    if step.kind == "distill" and not before and step.student is None and step.ce == 0:
        return (
            "has nothing to learn, since student and teacher are both the base: put `prune` or `from` before it, or "
            "give it a `student`"
        )
    if "quantize" not in before:
        return None
    if step.kind == "quantize":
        return "would round weights that are quantized already: keep one of the two"
    return "changes floating-point weights, and these are quantized already: put it before quantize"


def _without_trunk(step: Any, before: list[Any]) -> str | None:
    """Why a step that trains what comes after a cut cannot follow the steps `before`."""
    if step.kind != "distill" or step.train != "after_cut":
        return None
    for other in before:
        if other.kind == "from":
            return "keeps blocks that are the base's own, and `from` starts from another model: leave `train` out"
        narrows = other.kind == "prune" and (other.ffn or other.kv_groups)
        if narrows or (other.kind == "distill" and other.train != "after_cut"):
            does = "makes all of them narrower" if narrows else "trains all of them"
            return f"keeps blocks that are the base's own, and the {other.kind} before it {does}: leave `train` out"
    return None
