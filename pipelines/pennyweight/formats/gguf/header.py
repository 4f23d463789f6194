"""What a GGUF file says of itself, without the text of its vocabulary: gguf's own reader takes seconds for that.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = 32
STRING, ARRAY = 8, 9
#: Type of a value → its code in `struct`.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Tensor:
    name: str
    type: str
    """ggml's name, such as Q8_0."""
    elements: int
    bytes: int
    offset: int
    """Of its data, from the beginning of the file."""


@dataclass(frozen=True)
class Header:
    fields: dict[str, Any]
    """Numbers, truth values and strings by key; of an array, how long it is."""
    tensors: list[Tensor]


def read_header(file: Path) -> Header:
    """Raises ValueError where it is no GGUF file of little-endian numbers, or ends too early, within its data too."""
    with file.open("rb") as opened:
        reader = _Reader(opened, file)
        try:
            fields = {reader.string(): reader.value(reader.number("I")) for _ in range(reader.fields)}
        except RecursionError:
            raise ValueError(f"{file} has arrays within arrays without end") from None
        tensors = [reader.tensor() for _ in range(reader.tensors)]
        alignment = fields.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{file} aligns its data to {alignment!r} bytes")
        data = -(-opened.tell() // alignment) * alignment
    placed = [_placed(*tensor, data) for tensor in tensors]
    size = file.stat().st_size
    if cut := next((tensor for tensor in placed if tensor.offset + tensor.bytes > size), None):
        raise ValueError(f"{file} ends before the data of {cut.name} do")
    return Header(fields, placed)


def _placed(name: str, kind: int, elements: int, offset: int, data: int) -> Tensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    of = GGMLQuantizationType(kind)
    block, size = GGML_QUANT_SIZES[of]
    return Tensor(name, of.name, elements, elements // block * size, data + offset)


class _Reader:
    def __init__(self, opened: BinaryIO, file: Path):
        self._opened, self._file, self._size = opened, file, file.stat().st_size
        if opened.read(4) != MAGIC:
            raise ValueError(f"{file} is no GGUF file")
        version = self.number("I")
        if version not in VERSIONS:
            raise ValueError(f"{file} is a GGUF file of version {version}, or of another byte order")
        self.tensors, self.fields = self.number("Q"), self.number("Q")

    def number(self, code: str) -> Any:
        size = struct.calcsize(code)
        return struct.unpack(f"<{code}", self._read(size))[0]

    def string(self) -> str:
        return self._read(self.number("Q")).decode(errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(self._code(kind))
        of, length = self.number("I"), self.number("Q")
        self._skip(of, length)
        return length

    def tensor(self) -> tuple[str, int, int, int]:
        """(name, type, elements, offset within the data)"""
        name, dimensions = self.string(), self.number("I")
        elements = math.prod(self.number("Q") for _ in range(dimensions))
        return name, self.number("I"), elements, self.number("Q")

    def _skip(self, kind: int, length: int) -> None:
        if kind == STRING:
            for _ in range(length):
                self._read(self.number("Q"))
        elif kind == ARRAY:
            for _ in range(length):
                self.value(ARRAY)
        else:
            self._read(length * struct.calcsize(self._code(kind)))

    def _code(self, kind: int) -> str:
        if kind not in NUMBERS:
            raise ValueError(f"{self._file} has a value of the unknown type {kind}")
        return NUMBERS[kind]

    def _read(self, size: int) -> bytes:
        found = self._opened.read(size) if size <= self._size else b""
        if len(found) < size:
            raise ValueError(f"{self._file} ends within its header")
        return found
