"""The compiled view of evaluation against Pillow's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("numba")

from nearfar.ssl.data.transforms.compiled_crops import pitch
from nearfar.ssl.data.transforms.compiled_eval_view import make_eval_scratch, make_eval_view
from nearfar.ssl.data.transforms.eval_view import Window, center_window, eval_view


def compiled(pixels: NDArray[Any], window: Window) -> NDArray[Any]:
    height, width = pixels.shape[:2]
    scratch = make_eval_scratch(height, width, max(window.new_height, window.new_width))
    for buffer in scratch[:4]:
        buffer[:] = np.random.default_rng(0).integers(0, 2**63, len(buffer))  # what a reused scratch may hold
    rows = scratch.pixels.view(np.uint8)[: height * pitch(width)].reshape(height, pitch(width))
    rows[:, : 3 * width] = pixels.reshape(height, -1)
    out = np.empty((3, window.height, window.width), np.uint8)
    make_eval_view(scratch, height, width, window, out)
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 150), st.integers(2, 150), st.integers(8, 40), st.integers(0, 20))
def test_center_crops_are_those_of_pillow_to_the_bit(seed: int, height: int, width: int, size: int, more: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    expected = eval_view(Image.fromarray(pixels), size, size + more).numpy()
    np.testing.assert_array_equal(compiled(pixels, center_window(height, width, size, size + more)), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), *[st.integers(1, 120)] * 4)
def test_whole_images_of_another_shape_are_those_of_pillow_to_the_bit(
    seed: int, height: int, width: int, new_height: int, new_width: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BICUBIC))
    window = Window(new_height, new_width, 0, 0, new_height, new_width)
    np.testing.assert_array_equal(compiled(pixels, window).transpose(1, 2, 0), expected)
