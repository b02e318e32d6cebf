"""L-BFGS logistic regression against scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from nearfar.eval import logistic as module
from nearfar.eval.linear import standardize
from nearfar.eval.logistic import fit, logistic_probe
from nearfar.ssl.errors import UserError

Digits = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_weights_are_scikit_learns(digits: Digits, strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, _, _ = digits
    monkeypatch.setattr(module, "_CHUNK", 130)
    rows = standardize(x, torch.device("cpu"), "x")
    ours = fit(rows, torch.from_numpy(y), torch.arange(900), classes=10, strength=strength, iterations=500)
    judge = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(StandardScaler().fit_transform(x), y)
    assert ours["gradient"] < 1e-4
    np.testing.assert_allclose(ours["weight"][:, :-1].numpy(), judge.coef_, atol=5e-3)


def test_accuracy_is_scikit_learns(digits: Digits) -> None:
    a, ya, b, yb = digits
    scale = StandardScaler().fit(a)
    judge = LogisticRegression(C=1.0, max_iter=2000).fit(scale.transform(a), ya)
    assert logistic_probe(*digits)["top1"] == pytest.approx(100 * judge.score(scale.transform(b), yb), abs=0.3)


def test_unusable_input_is_explained(digits: Digits) -> None:
    a, ya, b, yb = digits
    with pytest.raises(UserError, match="must be positive"):
        logistic_probe(a, ya, b, yb, strength=0)
    with pytest.raises(UserError, match="one class only"):
        logistic_probe(a, ya * 0, b, yb)
    with pytest.raises(UserError, match="64 dimensions"):
        logistic_probe(a, ya, b[:, 1:], yb)
    with pytest.raises(UserError, match=r"897 feature rows of the test set.*not finite"):
        logistic_probe(a, ya, np.where(np.arange(897)[:, None] == 5, np.nan, b), yb)
