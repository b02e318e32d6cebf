"""Labels of other images are those of the same classes, or refused in words."""

from __future__ import annotations

import numpy as np
import pytest

from nearfar.ssl.data.labels import labels_as
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.errors import UserError


def test_labels_of_other_images_are_matched_by_name() -> None:
    classes = ["red", "green", "blue"]
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    other = ArraySource(pixels, [0, 1, 0], classes=["blue", "red"])
    assert labels_as(classes, other, "val").tolist() == [2, 0, 2]
    assert labels_as(classes, ArraySource(pixels, [2, 1, 0]), "val").tolist() == [2, 1, 0]
    with pytest.raises(UserError, match=r"1 classes of val are not among .*: pink. It knows red, green, blue"):
        labels_as(classes, ArraySource(pixels, [0, 1, 1], classes=["red", "pink"]), "val")
    with pytest.raises(UserError, match="trained on: 3"):
        labels_as(classes, ArraySource(pixels, [0, 3, 1]), "val")
