from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("numba")

from nearfar.ssl.data.transforms.compiled_crops import (
    bicubic_weights,
    make_scratch,
    make_views,
    padded,
    pitch,
    transpose_bytes,
)


def views_of(
    pixels: NDArray[Any],
    box: NDArray[Any] | list[tuple[int, int, int, int]],
    flip: NDArray[Any] | list[bool],
    size: NDArray[Any] | list[int],
) -> list[NDArray[Any]]:
    """Views of one image, (3, s, s) each, geometry only."""
    height, width = pixels.shape[:2]
    scratch = make_scratch(height, width, int(max(size)))
    for buffer in (scratch.pixels, scratch.columns, scratch.once, scratch.transposed):
        buffer[:] = np.random.default_rng(0).integers(0, 2**63, len(buffer))  # what a reused scratch may hold
    rows = scratch.pixels.view(np.uint8)[: height * pitch(width)].reshape(height, pitch(width))
    rows[:, : 3 * width] = pixels.reshape(height, -1)
    n, size = len(size), np.asarray(size)
    offset = np.concatenate([[0], np.cumsum(3 * size**2)])
    out = np.full(offset[-1] + 50, 7, np.uint8)
    no = np.zeros(n, bool)
    make_views(
        tuple(scratch), height, width, np.asarray(box, np.int32), np.asarray(flip), size, offset[:-1], out,
        False, no, np.zeros((n, 4), np.float32), np.zeros((n, 4), np.uint8), no, np.zeros(n, np.float32), no, 128,
    )  # fmt: skip
    assert (out[offset[-1] :] == 7).all()  # nothing is written beyond
    return [out[a:b].reshape(3, s, s) for a, b, s in zip(offset[:-1], offset[1:], size, strict=True)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 150), st.integers(1, 150))
def test_views_are_those_of_pillow_to_the_bit(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    h, w = rng.integers(1, height + 1, 6), rng.integers(1, width + 1, 6)
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    size, flip = rng.choice([1, 7, 16, 33, 64], 6), rng.random(6) < 0.5
    found = views_of(pixels, np.stack([top, left, h, w], 1), flip, size)
    image = Image.fromarray(pixels)
    for v, view in enumerate(found):
        crop = image.crop((left[v], top[v], left[v] + w[v], top[v] + h[v]))
        expected = np.asarray(crop.resize((size[v], size[v]), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(view.transpose(1, 2, 0), expected[:, ::-1] if flip[v] else expected)


@pytest.mark.parametrize(("height", "width"), [(300, 40), (40, 300), (8, 8), (3, 500)])
def test_extreme_shapes(height: int, width: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    (view,) = views_of(pixels, [(0, 0, height, width)], [False], [48])
    expected = np.asarray(Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(view.transpose(1, 2, 0), expected)


def test_a_view_larger_than_the_image_is_enlarged() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    (view,) = views_of(pixels, [(0, 0, 8, 9)], [True], [224])
    expected = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(view.transpose(1, 2, 0), expected[:, ::-1])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 20), st.integers(0, 99))
def test_bytes_are_transposed(rows: int, words: int, seed: int) -> None:
    source = np.random.default_rng(seed).integers(0, 256, (padded(rows), 8 * words), np.uint8)
    out = np.zeros(words * padded(rows), np.uint64)
    transpose_bytes(source.reshape(-1).view(np.uint64), rows, words, out)
    np.testing.assert_array_equal(out.view(np.uint8).reshape(8 * words, padded(rows)), source.T)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 600), st.integers(1, 300))
def test_weights_sum_to_one_and_stay_inside(n: int, size: int) -> None:
    scratch = make_scratch(n, n, size)
    stride = bicubic_weights(n, size, scratch.first, scratch.taps, scratch.weights, scratch.exact)
    weights = scratch.weights[: size * stride].reshape(size, stride)
    assert stride % 4 == 0
    assert np.abs(weights.sum(1) - 2**22).max() <= stride
    assert (scratch.first >= 0).all()
    assert (scratch.first + scratch.taps <= n).all()
    assert not weights[np.arange(stride) >= scratch.taps[:, None]].any()


def test_without_a_folder_to_keep_compiled_code_in_each_process_compiles() -> None:
    """The package and HOME are read-only in many containers; tests run as root, whom no permission stops."""
    program = textwrap.dedent("""
        import tempfile

        def refused(*_, **__):
            raise PermissionError(13, "Permission denied")

        tempfile.TemporaryFile = refused  # by which numba tries whether a folder can be written
        from nearfar.ssl.data.transforms.compiled_crops import compiled_and_cached

        @compiled_and_cached
        def store(out):
            out[0] = 3

        import numpy as np
        out = np.zeros(1)
        store(out)
        print(out[0])
    """)
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert (done.returncode, done.stdout) == (0, "3.0\n"), done.stderr
