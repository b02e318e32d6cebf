"""Near duplicates, outliers and clusters are those that were put there."""

from __future__ import annotations

import numpy as np
import pytest

from nearfar.eval.data_look import look_at, purity, thinned_grid
from nearfar.ssl.errors import UserError


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    """Three clusters of 20, 15 and 10; rows 3 and 30 alike, as are 5 and 7; the last row is like nothing else."""
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [5 * np.eye(8)[k] + rng.normal(0, 0.6, (n, 8)) for k, n in enumerate((20, 15, 10))] + [-np.ones((1, 8))]
    )
    x[7] = x[5] * 2  # only the direction counts
    x[30] = x[22] + 1e-3
    return x.astype(np.float32)


def test_what_was_put_there_is_found(x: np.ndarray) -> None:
    found = look_at(x, clusters=4, duplicate=0.999)
    assert [sorted(pair) for pair in found.pairs.tolist()] == [[5, 7], [22, 30]]
    assert found.alike[0] == pytest.approx(1)
    assert found.outliers[0] == len(x) - 1 and (np.diff(found.lonely) >= 0).all()
    truth = np.repeat([0, 1, 2, 3], [20, 15, 10, 1])
    assert np.array_equal(found.cluster, truth)  # the largest is the first
    assert np.array_equal(truth[found.center], [0, 1, 2, 3])
    assert found.position.min() == 0 and found.position.max() == 1 and found.position.shape == (46, 2)
    assert np.array_equal(look_at(x, clusters=4, duplicate=0.999).position, found.position)


def test_pairs_are_those_of_all_cosines(x: np.ndarray) -> None:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = unit @ unit.T
    truth = {(i, j) for i in range(len(x)) for j in range(i + 1, len(x)) if cosine[i, j] >= 0.995}
    assert {(i, j) for i, j in look_at(x, clusters=3, duplicate=0.995).pairs.tolist()} == truth
    few = look_at(x, clusters=3, duplicate=0.995, pairs=1)
    assert (len(few.pairs), few.duplicates) == (1, len(truth)) and len(truth) > 1


def test_what_cannot_be_looked_at_is_said(x: np.ndarray) -> None:
    with pytest.raises(UserError, match="at least 4"):
        look_at(x[:3], clusters=2, duplicate=0.9)
    with pytest.raises(UserError, match="collapsed"):
        look_at(np.ones((10, 4), np.float32), clusters=2, duplicate=0.9)
    with pytest.raises(UserError, match="not finite"):
        look_at(np.full((10, 4), np.nan, np.float32), clusters=2, duplicate=0.9)
    assert len(look_at(x[:4], clusters=10, duplicate=0.9).position) == 4


def test_purity_and_the_grid_of_pictures() -> None:
    assert purity(np.array([0, 0, 0, 1]), np.array([2, 2, 5, 1])) == 75.0
    positions = np.array([[0.1, 0.1], [0.26, 0.24], [0.9, 1.0]])
    assert sorted(thinned_grid(positions, 2).tolist()) == [1, 2]  # the second is nearer to the middle of its cell
