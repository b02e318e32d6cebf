"""The position probe against scikit-learn, and on features that carry all, half or nothing of their position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LinearRegression

from nearfar.eval import position as module
from nearfar.eval.position import position_probe
from nearfar.ssl.errors import UserError


def grids(n: int, seed: int, noise: float = 1.0, h: int = 5, w: int = 7, dim: int = 9) -> NDArray[Any]:
    """Features with row and column somewhere in them, much else beside."""
    rng = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij"), -1)
    mix = np.random.default_rng(0).normal(size=(2, dim))
    return (places @ mix + noise * rng.normal(size=(n, h, w, dim)) + 3).astype(np.float32)


def test_agrees_with_least_squares_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TOKENS", 80)  # two images at a time
    a, b = grids(30, 1), grids(11, 2)
    result = position_probe(a, b, ridge=0)
    rows, columns = np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-1, 1, 7), indexing="ij")
    for name, position in (("row", rows), ("column", columns)):
        judge = LinearRegression().fit(a.reshape(-1, 9), np.tile(position.ravel(), 30))
        expected = judge.score(b.reshape(-1, 9), np.tile(position.ravel(), 11))
        assert result[name] == pytest.approx(expected, abs=1e-5)
    assert result["r2"] == pytest.approx((result["row"] + result["column"]) / 2)
    assert (result["train"], result["test"]) == (30 * 35, 11 * 35)


def test_all_half_and_nothing() -> None:
    assert position_probe(grids(20, 1, noise=1e-3), grids(5, 2, noise=1e-3))["r2"] > 0.999
    nothing = np.random.default_rng(0).normal(size=(60, 5, 7, 9))
    assert abs(position_probe(nothing[:40], nothing[40:])["r2"]) < 0.05
    only_rows = np.broadcast_to(np.linspace(0, 1, 5)[:, None, None], (8, 5, 7, 1)).copy()
    result = position_probe(only_rows, only_rows)
    assert result["row"] == pytest.approx(1, abs=1e-3)
    assert result["column"] == pytest.approx(0, abs=1e-3)


def test_channels_that_never_change_say_nothing() -> None:
    a, b = grids(20, 1), grids(5, 2)
    constant = np.full((*a.shape[:3], 1), 7.0)
    plain = position_probe(a, b)
    assert position_probe(np.concatenate([a, constant], 3), np.concatenate([b, constant[:5]], 3))[
        "r2"
    ] == pytest.approx(plain["r2"], abs=1e-6)


def test_unusable_grids_are_explained() -> None:
    a = grids(4, 1)
    with pytest.raises(UserError, match="at least 2 x 2"):
        position_probe(a[:, :1], a[:, :1])
    with pytest.raises(UserError, match="differ in shape"):
        position_probe(a, a[..., 1:])
    with pytest.raises(UserError, match="not finite"):
        position_probe(a * np.nan, a)
    with pytest.raises(UserError, match="negative"):
        position_probe(a, a, ridge=-1)
