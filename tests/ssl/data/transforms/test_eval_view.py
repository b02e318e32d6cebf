from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import nearfar.ssl.backbones  # noqa: F401  makes torchvision importable everywhere
from nearfar.ssl.data.transforms.eval_view import eval_view


def noise(n: int = 50, height: int = 20, width: int = 26, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


@settings(max_examples=20, deadline=None)
@given(st.integers(10, 80), st.integers(10, 80), st.sampled_from([(14, 16), (8, 8), (21, None)]))
def test_eval_view_equals_torchvision(height: int, width: int, sizes: tuple[int, int | None]) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as TF

    size, resize = sizes
    image = Image.fromarray(noise(1, height, width)[0])
    expected = TF.resize(image, [resize or 24], InterpolationMode.BICUBIC)
    if resize is None and (height, width) == (size, size):
        expected = image
    assert torch.equal(eval_view(image, size, resize), TF.pil_to_tensor(TF.center_crop(expected, [size])))


def test_eval_view_leaves_an_image_of_the_right_size_alone() -> None:
    image = Image.fromarray(noise(1, 32, 32)[0])
    assert np.array_equal(eval_view(image, 32).permute(1, 2, 0), np.asarray(image))
    assert not np.array_equal(eval_view(image, 32, 36).permute(1, 2, 0), np.asarray(image))
    with pytest.raises(ValueError, match="below"):
        eval_view(image, 32, 30)
