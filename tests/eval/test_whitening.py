"""Whitening against scikit-learn's PCA and Ledoit-Wolf, and what it is for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA

from nearfar.eval import whitening
from nearfar.eval.knn import knn
from nearfar.eval.whitening import fit
from nearfar.ssl.errors import UserError


def rows(n: int, dim: int) -> NDArray[Any]:
    """Unit rows around no origin, which vary more in some directions than in others."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    mixed = rng.normal(size=(n, dim)) * np.geomspace(1, 0.3, dim) @ turn + 0.2
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def test_of_many_rows_it_is_pca_whitening() -> None:
    x, other = np.split(rows(20_050, 6), [20_000])
    fitted = fit(x)
    oracle = PCA(whiten=True).fit(x)
    ours = fitted(other).numpy()
    assert fitted.shrinkage < 1e-3
    np.testing.assert_allclose(ours @ ours.T, oracle.transform(other) @ oracle.transform(other).T, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("n", "dim"), [(500, 8), (20, 30)])
def test_the_shrunk_covariance_becomes_the_identity(n: int, dim: int) -> None:
    x = rows(n, dim)
    fitted, oracle = fit(x), LedoitWolf().fit(x)
    assert fitted.shrinkage == pytest.approx(oracle.shrinkage_, rel=1e-4)
    np.testing.assert_allclose(fitted.mean, oracle.location_, atol=1e-7)
    identity = fitted.matrix.T @ oracle.covariance_ @ fitted.matrix
    np.testing.assert_allclose(identity, np.eye(dim), atol=1e-4)


def test_neighbors_follow_a_class_that_raw_cosines_do_not_see() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 1200)
    x = rng.normal(size=(1200, 4)) * [10, 10, 10, 0.1] + [0, 0, 50, 0]
    x[:, 3] += 0.4 * y
    train, test = slice(1000), slice(1000, None)
    raw = knn(x[train], y[train], x[test], y[test], (20,))[20]
    fitted = fit(x[train])
    white = knn(fitted(x[train]), y[train], fitted(x[test]), y[test], (20,))[20]
    assert raw < 65 and white > 85


def test_neither_length_nor_rotation_changes_a_similarity() -> None:
    x, other = np.split(rows(430, 7), [400])
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(7, 7)))
    lengths = np.random.default_rng(3).uniform(0.1, 10, (400, 1))
    one, two = fit(x)(other), fit(lengths * x @ turn)(other @ turn)
    torch.testing.assert_close(one @ one.T, two @ two.T, rtol=1e-3, atol=1e-3)


def test_arrays_of_any_kind_and_tiles_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(100, 5).astype(np.float32)
    expected = fit(x)(x)
    monkeypatch.setattr(whitening, "_ROWS", 7)
    assert torch.equal(fit(torch.from_numpy(x))(torch.from_numpy(x)), expected)


def test_of_too_many_rows_evenly_spread_ones_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(1000, 5)
    monkeypatch.setattr(whitening, "_FITTED", 500)
    fitted = fit(x)
    np.testing.assert_allclose(fitted.mean, x[np.linspace(0, 999, 100).round().astype(int)].mean(0), atol=1e-7)


def test_directions_that_never_vary_are_not_blown_up() -> None:
    x = np.concatenate([rows(20_000, 5), np.zeros((20_000, 3))], axis=1)
    assert torch.isfinite(fit(x)(x)).all() and fit(x)(x)[:, :8].abs().max() < 20


def test_features_all_alike_and_broken_ones_are_named() -> None:
    with pytest.raises(UserError, match=r"all alike .* collapsed"):
        fit(np.tile([1.0, 2.0, 3.0], (50, 1)) * np.arange(1, 51)[:, None])
    with pytest.raises(UserError, match=r"1 of 10 feature rows .* not finite"):
        fit(np.where(np.arange(10)[:, None] == 3, np.nan, rows(10, 4)))
