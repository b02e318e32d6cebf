"""k-NN against brute force in float64 and against scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from nearfar.eval.knn import accuracy, classify, confusion, knn, leave_one_out, per_class
from nearfar.ssl.errors import UserError


def brute_force(
    train_x: NDArray[Any],
    train_y: NDArray[Any],
    test_x: NDArray[Any],
    test_y: NDArray[Any],
    k: int,
    temperature: float = 0.07,
) -> float:
    """One query at a time, in float64, sorted by (-similarity, index)."""
    a = train_x / np.linalg.norm(train_x, axis=1, keepdims=True)
    b = test_x / np.linalg.norm(test_x, axis=1, keepdims=True)
    hits = 0
    for query, truth in zip(b, test_y, strict=True):
        similarity = a @ query
        nearest = sorted(range(len(a)), key=lambda i: (-similarity[i], i))[:k]
        votes = np.zeros(max(train_y.max(), test_y.max()) + 1)
        for i in nearest:
            votes[train_y[i]] += np.exp(similarity[i] / temperature)
        hits += int(votes.argmax() == truth)
    return 100 * hits / len(test_y)


def blobs(
    n: int, m: int, dim: int, classes: int, seed: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(classes, dim))
    y = rng.integers(0, classes, n + m)
    y[:2] = 0, 1  # never a training set of one class
    x = centers[y] + rng.normal(scale=1.5, size=(n + m, dim))
    return x[:n], y[:n], x[n:], y[n:]


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(5, 80), dim=st.integers(2, 12), classes=st.integers(2, 6), seed=st.integers(0, 99),
)  # fmt: skip
def test_agrees_with_brute_force(n: int, dim: int, classes: int, seed: int) -> None:
    data = blobs(n, 40, dim, classes, seed)
    ours = knn(*data, ks=(1, 3, 10))
    assert ours == {k: brute_force(*data, k=k) for k in sorted({1, 3, min(10, n)})}


def test_agrees_with_scikit_learn_on_digits() -> None:
    x, y = load_digits(return_X_y=True)
    for k, ours in knn(x[:900], y[:900], x[900:], y[900:], ks=(10, 20, 100)).items():
        # sklearn's cosine distance is 1 - similarity
        judge = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
        theirs = 100 * judge.fit(x[:900], y[:900]).score(x[900:], y[900:])
        assert ours == pytest.approx(theirs, abs=0.12)  # one image: votes that float32 cannot tell apart


def test_k_beyond_the_training_set_becomes_its_size() -> None:
    data = blobs(30, 10, 4, 3, 0)
    assert list(knn(*data, ks=(10, 20, 100, 200))) == [10, 20, 30]


def test_length_of_a_feature_does_not_matter() -> None:
    a, ya, b, yb = blobs(60, 30, 5, 3, 1)
    scale = np.random.default_rng(0).uniform(0.1, 50, size=(60, 1))
    assert knn(a * scale, ya, b, yb, ks=(5,)) == knn(a, ya, b, yb, ks=(5,))


def test_equal_neighbors_are_taken_by_index() -> None:
    # eight copies of one point: k = 2 must see the first two of them, whatever topk would pick
    x = np.ones((8, 3))
    assert knn(x, np.array([1, 1, 0, 0, 0, 0, 0, 0]), x[:1], np.array([1]), ks=(2,)) == {2: 100.0}
    assert knn(x, np.array([0, 0, 1, 1, 1, 1, 1, 1]), x[:1], np.array([1]), ks=(2,)) == {2: 0.0}


def test_equal_votes_go_to_the_smaller_class() -> None:
    x = np.ones((2, 3))
    assert knn(x, np.array([4, 2]), x[:1], np.array([2]), ks=(2,)) == {2: 100.0}


def test_small_temperatures_do_not_overflow() -> None:
    a, ya, b, yb = blobs(60, 30, 5, 3, 1)
    assert knn(a, ya, b, yb, ks=(20,), temperature=1e-6)[20] == knn(a, ya, b, yb, ks=(1,))[1]


def test_leave_one_out_classifies_each_image_by_the_others() -> None:
    x, y, _, _ = blobs(40, 0, 4, 3, 6)
    others = [np.arange(40) != i for i in range(40)]
    hits = [brute_force(x[o], y[o], x[i : i + 1], y[i : i + 1], 5) for i, o in enumerate(others)]
    assert leave_one_out(x, y, ks=(5,)) == {5: pytest.approx(np.mean(hits))}


def test_classes_are_ranked_by_votes() -> None:
    # by similarity to the query: class 7 once, then 3 twice, then 5; nobody else
    angles = np.array([0.0, 0.1, 0.1, 0.5])
    x = np.stack([np.cos(angles), np.sin(angles)], 1)
    ranked = classify(x, np.array([7, 3, 3, 5]), x[:1], ks=(1, 4))
    assert ranked[1].tolist() == [[7, -1, -1, -1, -1]]
    assert ranked[4].tolist() == [[3, 7, 5, -1, -1]]
    assert accuracy(ranked[4], torch.tensor([5])) == 0.0
    assert accuracy(ranked[4], torch.tensor([5]), top=5) == 100.0


def test_confusion_and_accuracy_per_class_count_by_hand() -> None:
    truth, predicted = torch.tensor([0, 0, 1, 3, 3, 3]), torch.tensor([0, 1, 1, 3, 0, -1])
    assert confusion(predicted, truth, 4).tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]
    assert per_class(predicted, truth, 4) == [50.0, 100.0, None, pytest.approx(100 / 3)]


def test_takes_tensors_and_half_precision() -> None:
    a, ya, b, yb = blobs(60, 30, 5, 3, 3)
    half = knn(a.astype(np.float16), ya, torch.from_numpy(b).half(), torch.from_numpy(yb), ks=(1,))
    assert half[1] == pytest.approx(knn(a, ya, b, yb, ks=(1,))[1], abs=7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, ya, b, yb: (a[:0], ya[:0], b, yb), "empty"),
        (lambda a, ya, b, yb: (a, ya[:-1], b, yb), "shape"),
        (lambda a, ya, b, yb: (a, ya, b[:, :2], yb), "dimensions"),
        (lambda a, ya, b, yb: (np.where(np.arange(20)[:, None] == 3, np.nan, a), ya, b, yb), "1 of 20"),
        (lambda a, ya, b, yb: (a, ya - 9, b, yb), "negative"),
        (lambda a, ya, b, yb: (a, ya * 0, b, yb), "one class only"),
        (lambda a, ya, b, yb: (a, None, b, yb), "no labels"),
        (lambda a, ya, b, yb: (a, ya, np.where(b == b[2], np.inf, b), yb), "1 of 10"),
    ],
)
def test_unusable_arrays_are_named(change: Callable[..., Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        knn(*change(*blobs(20, 10, 4, 3, 4)), ks=(1,))


def test_k_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1"):
        knn(*blobs(20, 10, 4, 3, 4), ks=(0,))
