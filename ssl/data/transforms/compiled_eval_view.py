"""The view that evaluation sees, compiled by numba, without the GIL: Pillow's resize and a crop, to the bit.

Only the rows and columns that the crop keeps are computed; the passes are those of compiled_crops.py.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearfar.ssl.data.transforms.compiled_crops import (
    _sum_rows,
    bicubic_weights,
    compiled_and_cached,
    padded,
    pitch,
    transpose_bytes,
)
from nearfar.ssl.data.transforms.crops import VERTICAL_MAY_BE_FIRST
from nearfar.ssl.data.transforms.eval_view import Window


class EvalScratch(NamedTuple):
    """What one thread needs; made once, and anew when a larger image or window comes."""

    pixels: NDArray[np.uint64]  # the decoded image: H rows of pitch(W) bytes
    columns: NDArray[np.uint64]  # transposed: 3 W rows (x, channel) of padded(H) bytes
    once: NDArray[np.uint64]  # the image after its first pass
    turned: NDArray[np.uint64]  # that, transposed for the second
    first: NDArray[np.int32]
    taps: NDArray[np.int32]
    weights: NDArray[np.int32]
    exact: NDArray[np.float64]
    sums: NDArray[np.int32]


def make_eval_scratch(height: int, width: int, side: int) -> EvalScratch:
    """For images of up to height x width pixels, resized to at most `side` pixels a side."""
    long, most = padded(max(height, width, side)), padded(side)
    plane = (3 * long + 8) * most // 8
    return EvalScratch(
        pixels=np.empty(padded(height) * pitch(width) // 8, np.uint64),
        columns=np.empty(pitch(width) * padded(height) // 8, np.uint64),
        once=np.empty(plane, np.uint64),
        turned=np.empty(plane, np.uint64),
        first=np.empty(side, np.int32),
        taps=np.empty(side, np.int32),
        weights=np.empty(4 * long + 16 * side, np.int32),
        exact=np.empty(5 * long + 64, np.float64),
        sums=np.empty(3 * long, np.int32),
    )


def make_eval_view(scratch: EvalScratch, height: int, width: int, window: Window, out: NDArray[np.uint8]) -> None:
    """The image in scratch.pixels (rows pitch(width) apart), resized and cropped, into out (3, crop height, width)."""
    _make_eval_view(tuple(scratch), height, width, np.array(window, np.int64), out.reshape(-1))


@compiled_and_cached
def _make_eval_view(s: tuple, height: int, width: int, window: NDArray, out: NDArray) -> None:
    new_h, new_w, top, left, h, w = window[0], window[1], window[2], window[3], window[4], window[5]
    pixels_, columns_, once_, turned_, first, taps, weights, exact, sums = s
    pixels, columns = pixels_.view(np.uint8), columns_.view(np.uint8)
    once, turned = once_.view(np.uint8), turned_.view(np.uint8)
    wide, tall = (3 * width + 7) // 8 * 8, (height + 7) // 8 * 8
    if VERTICAL_MAY_BE_FIRST and height - new_h > 2 * max(width - new_w, 0):
        stride = bicubic_weights(height, new_h, first, taps, weights, exact)
        for i in range(h):
            y = top + i
            _sum_rows(
                pixels, 0, wide, height - 1, first[y], taps[y], weights[y * stride :], 3 * width, sums, once, i * wide
            )
        rows = (h + 7) // 8 * 8
        transpose_bytes(once_, h, wide // 8, turned_)  # (x, channel) rows of the crop's height
        stride = bicubic_weights(width, new_w, first, taps, weights, exact)
        for c in range(3):
            for i in range(w):
                x = left + i
                _sum_rows(
                    turned, c * rows, 3 * rows, width - 1, first[x], taps[x], weights[x * stride :], h, sums, once,
                    i * rows,
                )  # fmt: skip
            for y in range(h):
                for x in range(w):
                    out[(c * h + y) * w + x] = once[x * rows + y]
    else:
        transpose_bytes(pixels_, height, wide // 8, columns_)
        side = (w + 7) // 8 * 8
        for c in range(3):
            stride = bicubic_weights(width, new_w, first, taps, weights, exact)
            for i in range(w):
                x = left + i
                _sum_rows(
                    columns, c * tall, 3 * tall, width - 1, first[x], taps[x], weights[x * stride :], height, sums,
                    once, i * tall,
                )  # fmt: skip
            transpose_bytes(once_, w, tall // 8, turned_)
            stride = bicubic_weights(height, new_h, first, taps, weights, exact)
            for i in range(h):
                y = top + i
                _sum_rows(
                    turned, 0, side, height - 1, first[y], taps[y], weights[y * stride :], w, sums, out,
                    (c * h + i) * w,
                )  # fmt: skip
