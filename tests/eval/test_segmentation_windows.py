"""Sliding windows against brute force over the whole image at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nearfar.eval.segmentation_windows import Windows, averaged_logits, predicted_classes
from nearfar.ssl.errors import UserError

CLASSES = 3


def logits_of(images: Tensor) -> Tensor:
    """A function that sees its whole window: patches of 4, what they hold, where they lie, and the window's mean."""
    pooled = F.avg_pool2d(images.double(), 4)
    position = torch.linspace(0, 1, pooled.shape[3], dtype=torch.float64)
    scores = torch.stack(
        [pooled[:, 0] * 3, pooled[:, 1] + position, pooled[:, 2] * pooled.mean((1, 2, 3))[:, None, None]], 1
    )
    return F.interpolate(scores, images.shape[-2:], mode="bilinear")


def brute_force(image: Tensor, side: int, stride: int) -> NDArray[Any]:
    """Every window added to arrays of the whole image, then divided."""
    _, height, width = image.shape
    total, count = np.zeros((CLASSES, height, width)), np.zeros((height, width))

    def starts(length: int) -> list[int]:
        found, at = [], 0
        while at + side < length:
            found.append(at)
            at += stride
        return [*found, length - side]

    for top in starts(height):
        for left in starts(width):
            window = image[None, :, top : top + side, left : left + side]
            total[:, top : top + side, left : left + side] += logits_of(window)[0].float().numpy()
            count[top : top + side, left : left + side] += 1
    assert count.min() >= 1
    return total / count


def picture(height: int, width: int) -> Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(height * width))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 31), (40, 20), (23, 17), (16, 24)])
@pytest.mark.parametrize("stride", [3, 5, 8])
@pytest.mark.parametrize("batch", [1, 3])
def test_overlapping_windows_are_averaged(height: int, width: int, stride: int, batch: int) -> None:
    image = picture(height, width)
    windows = Windows.of(8, stride, 4)._replace(batch=batch)
    rows = list(averaged_logits(image, logits_of, windows))
    found = torch.cat(rows, 1).numpy()
    expected = brute_force(image, 8, stride)
    assert found.shape == expected.shape == (CLASSES, height, width)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.array_equal(predicted_classes(image, logits_of, windows), found.argmax(0))


def test_one_window_is_the_whole_image() -> None:
    image = picture(12, 20)
    whole = logits_of(image[None])[0].float().numpy()
    for windows in (Windows.of(0, None, 4), Windows.of(20, 20, 4), Windows.of(32, None, 4)):
        (found,) = averaged_logits(image, logits_of, windows)
        np.testing.assert_array_equal(found.numpy(), whole)


def test_no_whole_patches_are_padded_with_the_mean_color() -> None:
    image = picture(10, 7)
    whole = logits_of(F.pad(image, (0, 1, 0, 2))[None])[0, :, :10, :7].float().numpy()
    (found,) = averaged_logits(image, logits_of, Windows.of(0, None, 4))
    np.testing.assert_array_equal(found.numpy(), whole)


def test_logits_are_held_for_one_row_of_windows() -> None:
    held = []
    for rows in averaged_logits(picture(400, 12), logits_of, Windows.of(8, 4, 4)):
        held.append(rows.shape[1])
    assert max(held) <= 8 and sum(held) == 400


@pytest.mark.parametrize(("side", "stride", "message"), [(10, None, "multiple of 4"), (8, 9, "between 1 and 8")])
def test_windows_that_cannot_cover_an_image_are_refused(side: int, stride: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Windows.of(side, stride, 4)
