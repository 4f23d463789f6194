"""Windows of several texts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pennyweight import checkpoints
from pennyweight.errors import StageError
from pennyweight.stages import texts
from pennyweight.store import Store


@pytest.fixture
def cut(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> Any:
    """(names, count) → folder of so many windows of 16 tokens."""
    run: Any = SimpleNamespace(store=Store(tmp_path / "store"))
    base, paths = checkpoints.describe(tiny_model, "base"), {}
    for name, file in zip("abc", sorted(tiny_data.glob("*.jsonl"))):
        rows = [{"text": json.loads(line)["body"]} for line in file.read_text().splitlines()]
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda names, count: texts._windows_of(run, base, {n: paths[n] for n in names}, count, 16, 0).files


def test_several_texts_give_a_window_each_in_turn(cut: Any) -> None:
    mixed, alone = cut("abc", 7), [cut(name, 3) for name in "abc"]
    expected = [np.load(alone[number % 3] / "windows.npy")[number // 3] for number in range(7)]
    assert np.array_equal(np.load(mixed / "windows.npy"), expected)
    owners = np.load(mixed / "documents.npy")
    assert np.array_equal(owners % 3, np.array([0, 1, 2, 0, 1, 2, 0])[:, None].repeat(16, 1))


def test_more_windows_begin_with_the_same_ones(cut: Any) -> None:
    few, many = (np.load(cut("ab", count) / "windows.npy") for count in (5, 8))
    assert np.array_equal(few, many[:5])


def test_the_text_that_is_too_short_is_named(cut: Any) -> None:
    with pytest.raises(StageError, match=r"^a gives \d+ windows of 16 tokens .*, 500 are asked for") as found:
        cut("ab", 1000)
    available = int(found.value.message.split()[2])
    assert f"ask for {2 * available} at most" in found.value.hint
