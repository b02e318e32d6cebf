"""Nearest neighbors against sorting everything in exact integers: the same to the bit, however it is tiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nearfar.eval import neighbors as module
from nearfar.eval.neighbors import neighbors, rounding, unit
from nearfar.ssl.errors import UserError


def oracle(memory: NDArray[Any], queries: NDArray[Any], k: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Python integers: unit vectors in units of 2**-26, every similarity exact, sorted by (-similarity, index)."""

    def whole(x: NDArray[Any]) -> list[list[int]]:
        x = np.asarray(x, dtype=np.float64)
        return [[int(v) for v in row] for row in np.rint(x / np.linalg.norm(x, axis=1, keepdims=True) * 2**26)]

    a, similarity, index = whole(memory), [], []
    for query in whole(queries):
        products = [sum(p * q for p, q in zip(row, query, strict=True)) for row in a]
        order = sorted(range(len(a)), key=lambda i: (-products[i], i))[:k]
        index.append(order)
        similarity.append([products[i] / 2**52 for i in order])
    return np.array(similarity), np.array(index)


def crowd(n: int, dim: int, seed: int, copies: float = 0.3) -> NDArray[Any]:
    """Rows of which many are exact or nearly exact copies of others."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, dim)).astype(np.float32)
    same = rng.random(n) < copies
    x[same] = x[rng.integers(0, max(1, n // 8), same.sum())] * rng.choice([1.0, 2.0, 1.0000001], (same.sum(), 1))
    return x


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(3, 150), m=st.integers(1, 9), dim=st.integers(1, 20), k=st.integers(1, 40), seed=st.integers(0, 99),
    tile=st.sampled_from([1, 7, 32, 4096]), chunk=st.sampled_from([1, 2, 1024]),
)  # fmt: skip
def test_same_as_sorting_everything_whatever_the_tiles(
    n: int, m: int, dim: int, k: int, seed: int, tile: int, chunk: int
) -> None:
    memory, queries, k = crowd(n, dim, seed), crowd(m, dim, seed + 1), min(k, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TILE", tile)
        patch.setattr(module, "_QUERIES", chunk)
        similarity, index = neighbors(memory, queries, k)
    expected = oracle(memory, queries, k)
    np.testing.assert_array_equal(index, expected[1])
    np.testing.assert_array_equal(similarity, expected[0])


def test_many_tiles_of_two_thousand_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE", 64)
    memory, queries = crowd(2000, 24, 1, copies=0.05), crowd(40, 24, 2, copies=0)
    similarity, index = neighbors(memory, queries, 10)
    a, b = (unit(torch.from_numpy(x), torch.float64) for x in (memory, queries))
    expected, order = (b @ a.T).sort(dim=1, descending=True, stable=True)  # such products are exact in any order
    assert torch.equal(index, order[:, :10])
    assert torch.equal(similarity, expected[:, :10])


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-3])
def test_a_collapsed_network_gets_exact_neighbors_too(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # all similarities within float32's rounding, so that candidates cannot be told apart in float32
    monkeypatch.setattr(module, "_TILE", 100)
    rng = np.random.default_rng(0)
    memory = 1 + noise * rng.normal(size=(700, 16))
    similarity, index = neighbors(memory, memory[:3], 5)
    expected = oracle(memory, memory[:3], 5)
    np.testing.assert_array_equal(index, expected[1])
    np.testing.assert_array_equal(similarity, expected[0])


def test_similarities_that_rise_with_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    # every tile holds nothing but new neighbors
    monkeypatch.setattr(module, "_TILE", 50)
    angle = np.linspace(1.5, 0, 1000)
    memory = np.stack([np.cos(angle), np.sin(angle)], 1)
    _, index = neighbors(memory, np.array([[1.0, 0.0]] * 3), 20)
    assert index.tolist() == [list(range(999, 979, -1))] * 3


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_memory_mapped_store_is_never_copied_as_a_whole(tmp_path: Path, dtype: type[Any]) -> None:
    memory = crowd(300, 8, 3).astype(dtype)
    np.save(tmp_path / "x.npy", memory)
    store = np.load(tmp_path / "x.npy", mmap_mode="r")
    largest = 0

    class Watched(np.memmap):
        def __getitem__(self, rows: Any) -> NDArray[Any]:
            nonlocal largest
            part = np.asarray(super().__getitem__(rows))
            largest = max(largest, len(part))
            return part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TILE", 32)
        found = neighbors(store.view(Watched), memory[:4], 3)
    assert 0 < largest < 150
    expected = oracle(memory, memory[:4], 3)
    np.testing.assert_array_equal(found[1], expected[1])


def test_leave_one_out_skips_only_the_query_itself() -> None:
    # five copies of one row: each sees the other four, the smallest indices first
    memory = np.concatenate([np.ones((5, 4)), np.eye(4)])
    _, index = neighbors(memory, memory, 2, leave_one_out=True)
    assert index[:5].tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]


def test_inputs_are_left_as_they_were() -> None:
    memory, queries = torch.rand(40, 5), torch.rand(3, 5)
    before = memory.clone(), queries.clone()
    neighbors(memory, queries, 2)
    assert torch.equal(memory, before[0])
    assert torch.equal(queries, before[1])


def test_tiny_huge_and_zero_rows() -> None:
    base = crowd(50, 6, 4, copies=0)
    similarity, index = neighbors(base, base[:5], 7)
    for scale in (1e-30, 1e30):
        scaled = neighbors(base.astype(np.float64) * scale, base[:5], 7)
        assert torch.equal(scaled[1], index)
    base[3] = 0
    assert neighbors(base, base[3:4], 2)[1].tolist() == [[0, 1]]  # similarity 0 to everything
    assert float(similarity.max()) <= 1 + 1e-6


def test_margin_covers_the_rounding_of_float32() -> None:
    x = torch.from_numpy(crowd(400, 384, 5, copies=0))
    exact, quick = unit(x, torch.float64), unit(x, torch.float32)
    assert float((quick @ quick.T - exact @ exact.T).abs().max()) < rounding(384)


def test_refuses_what_cannot_be_searched() -> None:
    x = np.ones((4, 3))
    with pytest.raises(UserError, match="between 1 and 4"):
        neighbors(x, x, 5)
    with pytest.raises(UserError, match="between 1 and 3"):
        neighbors(x, x, 4, leave_one_out=True)
    x[2, 1] = np.nan
    with pytest.raises(UserError, match="1 of 4"):
        neighbors(x, x[:1], 1)
