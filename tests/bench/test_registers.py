"""bench/registers.py: every kernel of ours is listed with the types that it takes, compiles, and keeps its numbers in
registers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton")

BENCH = Path(__file__).resolve().parents[2] / "bench" / "registers.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_registers", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_registers"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("part", ["colors", pytest.param("scan", marks=pytest.mark.long)])
def test_every_kernel_compiles_and_none_spills(bench: Any, part: str) -> None:
    listed = [kernel for kernel in bench.kernels() if kernel[0].startswith(part)]
    assert len(listed) == 4
    for name, kernel, types, fixed in listed:
        registers, stack, shared = bench.usage(kernel, types, fixed, 90)
        assert 16 <= registers <= 255 and stack == 0 and 0 <= shared <= 48 * 1024, name
