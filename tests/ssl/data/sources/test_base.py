from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nearfar.ssl.data.sources.base import ArraySource, Subset
from nearfar.ssl.errors import UserError


def pixels(value: int, height: int = 12, width: int = 16) -> NDArray[Any]:
    return np.full((height, width, 3), value, np.uint8)


def first(source: ArraySource | Subset, i: int) -> int:
    return int(np.asarray(source.read(i))[0, 0, 0])


def test_arrays() -> None:
    gray = np.arange(2, dtype=np.uint8)[:, None, None].repeat(9, 1).repeat(8, 2)
    source = ArraySource(gray, labels=[1, 0], masks=gray, classes=["a", "b"])
    assert source.read(1).size == (8, 9)
    assert source.read(1).mode == "RGB"
    assert first(source, 1) == 1
    for wrong in (np.ones((2, 9, 8, 3)), np.ones((2, 9, 8, 4), np.uint8), np.ones((9, 8), np.uint8)):
        with pytest.raises(UserError, match="must be uint8"):
            ArraySource(wrong)
    with pytest.raises(UserError, match="do not fit"):
        ArraySource(gray, masks=gray[:, :4])


def test_subset() -> None:
    images = np.stack([pixels(v) for v in range(5)])
    source = ArraySource(images, labels=range(5), masks=images[..., 0], classes=list("abcde"))
    part = Subset(source, [4, 1])
    assert [first(part, i) for i in range(len(part))] == [4, 1]
    assert part.labels.tolist() == [4, 1]
    assert part.classes == list("abcde")
    assert part.name(0) == "image 4"
    assert (part.mask(1) == 1).all()
    assert part.fingerprint != Subset(source, [1, 4]).fingerprint != source.fingerprint
