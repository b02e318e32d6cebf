"""bench/registers.py: every kernel of ours is listed with the types that it takes, compiles, and keeps its numbers in
registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton")


@pytest.fixture(scope="module")
def bench(load_bench: Callable[[str], Any]) -> Any:
    return load_bench("registers")


@pytest.mark.parametrize("part", ["colors", pytest.param("scan", marks=pytest.mark.long)])
def test_every_kernel_compiles_and_none_spills(bench: Any, part: str) -> None:
    listed = [kernel for kernel in bench.kernels() if kernel[0].startswith(part)]
    assert len(listed) == 4
    for name, kernel, types, fixed in listed:
        registers, stack, shared = bench.usage(kernel, types, fixed, 90)
        assert 16 <= registers <= 255 and stack == 0 and 0 <= shared <= 48 * 1024, name
