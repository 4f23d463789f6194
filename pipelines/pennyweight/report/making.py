"""How each variant was made: its steps, what was taken out, what was proved of it, and how it learnt and healed."""

from __future__ import annotations

from pennyweight.columns import spans
from pennyweight.records import Checkpoint, Distillation, Healing, Pruning, Rounding, RunRecord
from pennyweight.report import text
from pennyweight.report.markup import Html, el

HEAD = ("variant", "steps", "taken out", "integers", "off after reload", "learning: held-out KL", "time")


def variants(record: RunRecord) -> dict[str, Checkpoint]:
    """Each variant's checkpoint, where a step has said what it did, or where it starts from another base."""
    found = {result.variant: result.checkpoint for result in record.candidates if result.checkpoint}
    return {
        name: made
        for name, made in found.items()
        if made.pruning or made.distillation or made.rounding or made.healing or record.start_of(name) != "base"
    }


def table(record: RunRecord) -> Html:
    rows = [
        el("tr", el("th", name, scope="row"), _cells(made, record.start_of(name)))
        for name, made in variants(record).items()
    ]
    head = el("thead", el("tr", [el("th", name, scope="col", class_="text") for name in HEAD]))
    return el("div", el("table", head, el("tbody", rows), class_="making"), class_="scroll")


def _cells(made: Checkpoint, start: str) -> list[Html]:
    uri, *steps = made.origin.split(" → ")
    if start != "base":
        steps = [f"from {start}, {uri}", *steps]
    pruned = made.pruning.all if made.pruning else []
    distilled = made.distillation.all if made.distillation else []
    seconds = sum(part.seconds for part in (*pruned, *distilled, made.rounding, made.healing) if part)
    learnt = [line for step in distilled for line in _distillation(step)] + _healing(made.healing)
    proved = made.rounding or made.pruning
    return [
        el("td", [el("div", step) for step in steps], class_="text"),
        el("td", [line for step in pruned for line in _taken_out(step)] or text.MISSING, class_="text"),
        el("td", _integers(made.rounding), class_="text"),
        el("td", f"{proved.reload_difference:.2g} nats" if proved else text.MISSING, class_="text"),
        el("td", learnt or text.MISSING, class_="text"),
        el("td", text.duration(seconds)),
    ]


def _taken_out(pruning: Pruning) -> list[Html]:
    lines = []
    if pruning.removed:
        chosen = "" if pruning.measure == "named" else f" by {pruning.measure}"
        which = "layer" if len(pruning.removed) == 1 else "layers"
        lines.append(f"{which} {spans(pruning.removed)} of {pruning.layers[0]}{chosen}")
    for name, pair in (("FFN channels", pruning.channels), ("KV heads", pruning.kv_groups)):
        if pair:
            lines.append(f"{name}: {pair[0]:,} → {pair[1]:,}")
    lines.append(f"parameters: {pruning.parameters[0] / 1e6:,.1f} M → {pruning.parameters[1] / 1e6:,.1f} M")
    lines.append(f"weights: {text.size(pruning.weight_bytes[0])} → {text.size(pruning.weight_bytes[1])}")
    if pruning.kl is not None:
        fit = f", {pruning.refitted} {'block' if pruning.refitted == 1 else 'blocks'} refitted"
        lines.append(f"held-out KL {text.number(pruning.kl)}{fit if pruning.refitted else ''}")
    if pruning.kl_cut is not None:
        influence = f"; by influence {text.number(pruning.kl_influence)}" if pruning.measure != "influence" else ""
        lines.append(f"without those layers alone {text.number(pruning.kl_cut)}{influence}")
    return [el("div", line) for line in lines]


def _integers(rounding: Rounding | None) -> list[Html] | str:
    if rounding is None:
        return text.MISSING
    lines = [f"{count} {'layer' if count == 1 else 'layers'}: {kind}" for kind, count in rounding.layers.items()]
    if found := rounding.allocation:
        uniform = min(found.uniform_kl.values(), default=None)
        beaten = "" if uniform is None else f"; the best uniform choice {text.number(uniform)}"
        lines.append(f"{text.size(found.bytes)} of {text.size(found.budget)}")
        lines.append(f"held-out KL {text.number(found.measured_kl)}{beaten}; {found.trials} trials")
    return [el("div", line) for line in lines]


def _distillation(made: Distillation) -> list[Html]:
    said = made.cache_bytes_per_token
    cached = f", teacher cached in {said} bytes a token" if said else ""
    kept = (
        f"best at step {made.kept_step}" if made.kept_step else "never below where it began: its weights are as before"
    )
    stayed = f", the first {made.shared_blocks} layers as they were" if made.shared_blocks else ""
    return [
        el("div", f"distilled: {text.number(made.kl_before)} → {text.number(made.kl_after)}, {kept}{stayed}"),
        el("div", f"{made.steps} steps, {made.tokens:,} tokens, ended by {made.ended_by}"),
        el("div", f"{made.tokens_per_second:.0f} tokens/s{cached}"),
    ]


def _healing(healing: Healing | None) -> list[Html]:
    if healing is None:
        return []
    moved = f", {healing.moved:,} integers moved" if healing.moved else ""
    return [
        el("div", " → ".join(text.number(kl) for _, kl in healing.curve)),
        el("div", f"{healing.steps} steps, {healing.tokens:,} tokens, ended by {healing.ended_by}{moved}"),
        el("div", f"{healing.tokens_per_second:.0f} tokens/s"),
    ]
