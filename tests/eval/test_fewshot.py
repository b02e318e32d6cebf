"""Few labels: what is drawn, and the scores against scikit-learn on the same draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from nearfar.eval.fewshot import draw_per_class, draw_share, few_labels, few_shot
from nearfar.ssl.errors import UserError

Digits = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]


def test_draws_hold_each_class_alike_and_differ_by_seed() -> None:
    y = torch.tensor([0] * 30 + [1] * 7 + [2] * 100)
    draws = [draw_per_class(y, 5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert all(torch.bincount(y[rows]).tolist() == [5, 5, 5] for rows in draws)
    assert all(len(rows.unique()) == 15 for rows in draws)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    share = draw_share(y, 0.1, torch.Generator().manual_seed(0))
    assert torch.bincount(y[share]).tolist() == [3, 1, 10]


def test_every_image_of_a_class_is_drawn_equally_often() -> None:
    y, seen = torch.tensor([0] * 4 + [1] * 6), torch.zeros(10)
    for seed in range(600):
        seen[draw_per_class(y, 2, torch.Generator().manual_seed(seed))] += 1
    torch.testing.assert_close(seen / 600, torch.tensor([1 / 2] * 4 + [1 / 3] * 6), atol=0.08, rtol=0)


def test_scores_are_scikit_learns_on_the_same_draws(digits: Digits) -> None:
    a, ya, b, yb = digits
    result = few_shot(*digits, shots=(5,), draws=3, seed=2)[5]
    expected = []
    for number in range(3):
        rows = draw_per_class(torch.from_numpy(ya), 5, torch.Generator().manual_seed(2000 + number)).numpy()
        scale = StandardScaler().fit(a[rows])
        judge = LogisticRegression(C=1.0, max_iter=2000).fit(scale.transform(a[rows]), ya[rows])
        expected.append(100 * judge.score(scale.transform(b), yb))
    assert result["draws"] == pytest.approx(expected, abs=0.3)
    assert result["mean"] == pytest.approx(np.mean(result["draws"]))
    assert result["std"] == pytest.approx(np.std(result["draws"], ddof=1))
    assert result["labels"] == 50


def test_more_labels_score_higher(digits: Digits) -> None:
    shots = few_shot(*digits, shots=(1, 10), draws=3)
    assert shots[10]["mean"] > shots[1]["mean"] + 10
    shares = few_labels(*digits, shares=(0.01, 0.1), draws=2)
    assert shares[0.1]["mean"] > shares[0.01]["mean"]
    assert [shares[share]["labels"] for share in (0.01, 0.1)] == [10, pytest.approx(90, abs=5)]


def test_unusable_input_is_explained(digits: Digits) -> None:
    a, ya, b, yb = digits
    with pytest.raises(UserError, match="1000 images a class is not possible"):
        few_shot(a, ya, b, yb, shots=(1000,))
    with pytest.raises(UserError, match="gaps"):
        few_shot(a[ya != 2], ya[ya != 2], b, yb)
    with pytest.raises(UserError, match="at least one draw"):
        few_shot(a, ya, b, yb, draws=0)
    with pytest.raises(UserError, match="at most 1"):
        few_labels(a, ya, b, yb, shares=(2,))
    with pytest.raises(UserError, match="no labels"):
        few_shot(a, None, b, yb)
