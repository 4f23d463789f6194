"""The record of an export."""

from __future__ import annotations

from pydantic import Field

from pennyweight.records import Record


class Exported(Record):
    """What was written, and how much of the checkpoint it still is."""

    path: str
    format: str
    bytes: int
    tensors: dict[str, int] = Field(description="kind of tensor → how many there are")
    quantized: int = Field(description="layers whose integers were written")
    largest_change: float = Field(
        description="largest |Δw| in quantization steps; 0 where every integer, scale and zero is the checkpoint's own"
    )
    largest_rounding: float = Field(0.0, description="largest |Δw| of a matrix that is not quantized")
    unfit: dict[str, str] = Field({}, description="engine that loads the format, but not this file → why")
    notes: list[str] = Field([], description="what a server of the file must know")

    def describe(self) -> str:
        lines = [f"{self.path}: {self.bytes:,} bytes, {self.format}"]
        lines.append("tensors: " + ", ".join(f"{count} {kind}" for kind, count in sorted(self.tensors.items())))
        if self.quantized and self.largest_change:
            change = f"{self.largest_change:.2g}"
            lines.append(f"integers as in the checkpoint; float16 scales move weights by {change} of a step at most")
        elif self.quantized:
            lines.append("integers, scales and zeros exactly as in the checkpoint")
        if self.largest_rounding:
            lines.append(f"other matrices in float16, which moves weights by {self.largest_rounding:.1g} at most")
        lines += [f"not for {engine}: {why}" for engine, why in self.unfit.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)
