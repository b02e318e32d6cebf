"""Sides in whole patches."""

import pytest

from nearfar.ssl.patches import whole_patches


@pytest.mark.parametrize(
    ("side", "patch", "whole"), [(224, 16, 224), (230, 16, 224), (233, 16, 240), (3, 16, 16), (240, 32, 256)]
)
def test_the_nearest_multiple_and_never_less_than_one(side: int, patch: int, whole: int) -> None:
    assert whole_patches(side, patch) == whole
