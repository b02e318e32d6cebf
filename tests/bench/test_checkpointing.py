"""The table of bench/checkpointing.py by hand, and one small run of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def bench(load_bench: Callable[[str], Any]) -> Any:
    return load_bench("checkpointing")


def test_shares_and_ratios(bench: Any) -> None:
    rounds = [bench.Round(6.0, 0.5, 8.0, 1.2), bench.Round(3.0, 0.1, 8.0, 1.2), bench.Round(9.0, 0.6, 8.0, 1.2)]
    text = bench.table(rounds, 10**9, 5)
    assert "| at once | 6.000 | 2.000 % |" in text and "| in the background | 0.500 | 0.167 % |" in text
    assert "8.0 s of writing | 1.200 | 0.400 % |" in text and "15.0 times shorter (12.0 .. 30.0)" in text


def test_it_measures(bench: Any, tmp_path: Path) -> None:
    rounds, size = bench.measure("vit_tiny_patch16", 128, 1, 1, tmp_path / "run", "cpu")
    assert len(rounds) == 1 and all(seconds >= 0 for seconds in rounds[0]) and size > 16e6
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-000000002", "step-000000003",
    ]  # fmt: skip
