"""The scans that scenes are drawn from: train and val share none."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from sklearn.datasets import load_digits

from nearfar.launch.scenes import digits
from nearfar.launch.scenes.compose import make_scenes


def test_train_and_val_share_no_scan_and_every_class_has_both() -> None:
    _, labels, val, _ = digits.scans_of_digits()
    real = load_digits()
    assert np.array_equal(labels, real.target)
    for digit in range(10):
        share = val[labels == digit].mean()
        assert 0.15 < share < 0.25
    as_bytes = [image.tobytes() for image in real.images]
    assert not {as_bytes[i] for i in np.flatnonzero(val)} & {as_bytes[i] for i in np.flatnonzero(~val)}


@pytest.mark.parametrize("split", ["train", "val"])
def test_scans_are_drawn_from_their_split_only(split: Literal["train", "val"], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the other split's scans blanked out, nothing changes."""
    untouched = make_scenes(100, 1, split)
    scans, labels, val, boxes = digits.scans_of_digits()
    blanked = scans.copy()
    blanked[val != (split == "val")] = 0
    monkeypatch.setattr(digits, "scans_of_digits", lambda: (blanked, labels, val, boxes))
    assert np.array_equal(make_scenes(100, 1, split).masks, untouched.masks)
