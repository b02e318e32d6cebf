"""The table of bench/step.py by hand, and the products of a step it counts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Any:
    sys.path.insert(0, str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_step", BENCH / "step.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_step"] = module
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCH))
    return module


def test_ratios_are_taken_round_by_round(bench: Any) -> None:
    first = bench.Measurement("dino", [2.0, 4.0, 6.0], 10.0, float("nan"))
    second = bench.Measurement("plain", [1.0, 1.0, 4.0], 20.0, 3e9)
    _, row = bench.rows([first, second], 8, 100e9)
    assert row["seconds"] == 1 and row["img_per_s"] == 8 and row["share_of_peak"] == pytest.approx(0.2)
    assert (row["ratio"], row["ratio_least"], row["ratio_most"]) == (2, 1.5, 4)
    text = bench.markdown(bench.rows([first, second], 8, 100e9))
    assert "| plain | 1000.0 | 8.0 | 2.00 | 1.50 .. 4.00 | 20 % | 3.00 |" in text
    assert "| dino | 4000.0 | 2.0 | 1.00 | 1.00 .. 1.00 | 2 % | - |" in text


def test_products_grow_with_images_and_prototypes(bench: Any) -> None:
    """The last layer by hand: a prototype costs each image three products of 256 for each of the student's 3 views
    (forward, and the gradients of both factors), and one for each of the teacher's 2.
    """
    options = bench.StepOptions("vit_tiny_patch16", 4, (32, 16), 1, 64, "cpu", "fp32", 1)
    few, many = (bench.products("plain", options._replace(prototypes=k)) for k in (64, 1064))
    assert many - few == pytest.approx(1000 * 4 * 2 * 256 * (3 * 3 + 2) / 1e9)
    assert bench.products("plain", options._replace(batch=8)) == pytest.approx(2 * few, rel=0.05)
