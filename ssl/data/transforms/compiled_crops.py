"""Crop, resize and flip on a CPU: all views of one decoded image, compiled by numba, without the GIL.

Pillow's antialiased bicubic to the bit: weights with 22 bits after the point, one pass an axis, rounded to 8 bits in
between. Both passes are the same loop, a weighted sum of whole rows, which compilers turn into vector code; for that
the horizontal one works on the transposed image, which all views share.

Sizes: an image is H x W pixels; rows are padded to 8 bytes, since transposing goes by blocks of 8 x 8 bytes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nearfar.ssl.data.transforms.compiled_colors import Planes, color_view, make_planes
from nearfar.ssl.data.transforms.crops import VERTICAL_MAY_BE_FIRST

_ONE = np.int32(1 << 22)  # a weight of 1
_HALF = np.int32(1 << 21)
_S8, _S16, _S32 = np.uint64(8), np.uint64(16), np.uint64(32)
_M8, _M16, _M32 = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00000000FFFFFFFF)
_U = np.uint64


class Scratch(NamedTuple):
    """What one thread needs to make views; made once, and anew when a larger image comes.

    Compiled functions get it as a plain tuple, for the reason given at `Planes`.
    """

    pixels: NDArray[np.uint64]  # the decoded image: H rows of pitch(W) bytes
    columns: NDArray[np.uint64]  # transposed: 3 W rows (x, channel) of H bytes
    once: NDArray[np.uint64]  # a crop after its first pass
    transposed: NDArray[np.uint64]  # that, transposed for the second
    first: NDArray[np.int32]  # of each pixel of a view: the first source pixel with a weight
    taps: NDArray[np.int32]  # and how many have one
    weights: NDArray[np.int32]
    exact: NDArray[np.float64]  # weights of one pixel, before they are rounded
    sums: NDArray[np.int32]
    planes: Planes  # for color


def padded(n: int) -> int:
    """The next multiple of 8."""
    return -(-n // 8) * 8


def pitch(width: int) -> int:
    """Bytes from one row of the decoded image to the next."""
    return padded(3 * width)


def make_scratch(height: int, width: int, side: int) -> Scratch:
    """For images of up to height x width pixels and views of up to `side`."""
    long = padded(max(height, width, side))
    return Scratch(
        pixels=np.empty(padded(height) * pitch(width) // 8, np.uint64),
        columns=np.empty(pitch(width) * padded(height) // 8, np.uint64),
        once=np.empty(3 * padded(side) * long // 8, np.uint64),
        transposed=np.empty((3 * long + 3 + padded(side)) * padded(side) // 8, np.uint64),
        first=np.empty(side, np.int32),
        taps=np.empty(side, np.int32),
        weights=np.empty(4 * long + 16 * side, np.int32),
        exact=np.empty(5 * long + 64, np.float64),
        sums=np.empty(3 * long, np.int32),
        planes=make_planes(side),
    )


@njit(nogil=True)
def transpose_bytes(source: NDArray, rows: int, words: int, out: NDArray) -> None:
    """(rows, 8 * words) bytes -> (8 * words, padded(rows)) bytes, both flat uint64.

    Rows up to padded(rows) are read. Eight words are a block of 8 x 8 bytes, transposed by swapping 1 x 1, then 2 x 2,
    then 4 x 4 blocks in it.
    """
    stride, height = _U(words), _U((rows + 7) // 8)
    for w in range(stride):
        for b in range(height):
            i = b * _S8 * stride + w
            a0, a1, a2, a3 = source[i], source[i + stride], source[i + _U(2) * stride], source[i + _U(3) * stride]
            i += _U(4) * stride
            a4, a5, a6, a7 = source[i], source[i + stride], source[i + _U(2) * stride], source[i + _U(3) * stride]
            t0, t2, t4, t6 = (
                (a0 >> _S8 ^ a1) & _M8,
                (a2 >> _S8 ^ a3) & _M8,
                (a4 >> _S8 ^ a5) & _M8,
                (a6 >> _S8 ^ a7) & _M8,
            )
            a0, a1, a2, a3 = a0 ^ t0 << _S8, a1 ^ t0, a2 ^ t2 << _S8, a3 ^ t2
            a4, a5, a6, a7 = a4 ^ t4 << _S8, a5 ^ t4, a6 ^ t6 << _S8, a7 ^ t6
            t0, t1, t4, t5 = (
                (a0 >> _S16 ^ a2) & _M16,
                (a1 >> _S16 ^ a3) & _M16,
                (a4 >> _S16 ^ a6) & _M16,
                (a5 >> _S16 ^ a7) & _M16,
            )
            a0, a2, a1, a3 = a0 ^ t0 << _S16, a2 ^ t0, a1 ^ t1 << _S16, a3 ^ t1
            a4, a6, a5, a7 = a4 ^ t4 << _S16, a6 ^ t4, a5 ^ t5 << _S16, a7 ^ t5
            t0, t1, t2, t3 = (
                (a0 >> _S32 ^ a4) & _M32,
                (a1 >> _S32 ^ a5) & _M32,
                (a2 >> _S32 ^ a6) & _M32,
                (a3 >> _S32 ^ a7) & _M32,
            )
            a0, a4, a1, a5 = a0 ^ t0 << _S32, a4 ^ t0, a1 ^ t1 << _S32, a5 ^ t1
            a2, a6, a3, a7 = a2 ^ t2 << _S32, a6 ^ t2, a3 ^ t3 << _S32, a7 ^ t3
            o = w * _S8 * height + b
            out[o], out[o + height], out[o + _U(2) * height], out[o + _U(3) * height] = a0, a1, a2, a3
            o += _U(4) * height
            out[o], out[o + height], out[o + _U(2) * height], out[o + _U(3) * height] = a4, a5, a6, a7


@njit(nogil=True)
def bicubic_weights(n: int, size: int, first: NDArray, taps: NDArray, weights: NDArray, exact: NDArray) -> int:
    """Weights of n source pixels in each of `size` pixels of a view, as Pillow takes them.

    Fills first, taps, weights; returns how many weights are kept a pixel: a multiple of 4, zero beyond `taps`.
    """
    scale = n / size
    wide = max(scale, 1.0)
    support = 2.0 * wide
    shrink = 1.0 / wide
    stride = (2 * math.ceil(support) + 1 + 3) // 4 * 4
    for i in range(size):
        center = (i + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        high = min(int(center + support + 0.5), n)
        total = 0.0
        for k in range(high - low):
            x = abs((k + low - center + 0.5) * shrink)
            value = 0.0
            if x < 1.0:
                value = (1.5 * x - 2.5) * x * x + 1.0
            elif x < 2.0:
                value = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
            exact[k] = value
            total += value
        for k in range(high - low):
            value = exact[k] / total * _ONE
            weights[i * stride + k] = np.int32(value - 0.5) if value < 0 else np.int32(value + 0.5)
        for k in range(high - low, stride):
            weights[i * stride + k] = 0
        first[i], taps[i] = low, high - low
    return stride


@njit(nogil=True)
def _sum_rows(
    source: NDArray, start: int, stride: int, last: int, row: int, count: int, w: NDArray, length: int,
    sums: NDArray, out: NDArray, offset: int,
) -> None:  # fmt: skip
    """out[offset:][:length] = the sum over k < count of w[k] * source[start + (row + k) * stride:][:length], as 8 bits.

    Four rows at a time; where there are fewer left, the last one (number `last`) comes again, with a weight of 0.
    Indices are unsigned: signed ones could count from the end, and asking would keep the loops from being vectors.
    """
    n, d, k = _U(length), _U(offset), 0
    while count - k > 4:
        o0, o1 = _U(start + (row + k) * stride), _U(start + (row + k + 1) * stride)
        o2, o3 = _U(start + (row + k + 2) * stride), _U(start + (row + k + 3) * stride)
        w0, w1, w2, w3 = w[k], w[k + 1], w[k + 2], w[k + 3]
        if k == 0:
            for j in range(n):
                sums[j] = _HALF + w0 * source[o0 + j] + w1 * source[o1 + j] + w2 * source[o2 + j] + w3 * source[o3 + j]
        else:
            for j in range(n):
                sums[j] += w0 * source[o0 + j] + w1 * source[o1 + j] + w2 * source[o2 + j] + w3 * source[o3 + j]
        k += 4
    o0, o1 = _U(start + min(row + k, last) * stride), _U(start + min(row + k + 1, last) * stride)
    o2, o3 = _U(start + min(row + k + 2, last) * stride), _U(start + min(row + k + 3, last) * stride)
    w0, w1, w2, w3 = w[k], w[k + 1], w[k + 2], w[k + 3]
    if k == 0:
        for j in range(n):
            sums[j] = _HALF
    for j in range(n):
        total = sums[j] + w0 * source[o0 + j] + w1 * source[o1 + j] + w2 * source[o2 + j] + w3 * source[o3 + j]
        value = np.int32(total) >> 22
        out[d + j] = np.uint8(0 if value < 0 else (255 if value > 255 else value))


@njit(nogil=True)
def _horizontal_first(s: tuple, height: int, box: NDArray, flip: bool, size: int, out: NDArray, offset: int) -> None:
    """One view into out[offset:], planar (3, size, size); `once` is 3 x (size of x, h of y), `transposed` a channel."""
    top, left, h, w = box[0], box[1], box[2], box[3]
    tall, long, side = (height + 7) // 8 * 8, (h + 7) // 8 * 8, (size + 7) // 8 * 8
    _, columns_, once_, transposed_, first, taps, weights, exact, sums, _ = s
    columns, once, transposed = columns_.view(np.uint8), once_.view(np.uint8), transposed_.view(np.uint8)
    stride = bicubic_weights(w, size, first, taps, weights, exact)
    for c in range(3):
        for i in range(size):
            x = size - 1 - i if flip else i
            _sum_rows(
                columns, (3 * left + c) * tall + top, 3 * tall, w - 1, first[i], taps[i],
                weights[i * stride :], h, sums, once, (c * side + x) * long,
            )  # fmt: skip
    stride = bicubic_weights(h, size, first, taps, weights, exact)
    for c in range(3):
        transpose_bytes(once_[c * side * long // 8 :], size, long // 8, transposed_)
        for i in range(size):
            _sum_rows(
                transposed, 0, side, h - 1, first[i], taps[i],
                weights[i * stride :], size, sums, out, offset + (c * size + i) * size,
            )  # fmt: skip


@njit(nogil=True)
def _vertical_first(s: tuple, width: int, box: NDArray, flip: bool, size: int, out: NDArray, offset: int) -> None:
    """As `_horizontal_first`, where the first pass is over the rows of the image as it is: `once` is (size, w, 3)."""
    top, left, h, w = box[0], box[1], box[2], box[3]
    wide, long, side = (3 * width + 7) // 8 * 8, (3 * w + 7) // 8 * 8, (size + 7) // 8 * 8
    pixels_, _, once_, transposed_, first, taps, weights, exact, sums, _ = s
    pixels, once, transposed = pixels_.view(np.uint8), once_.view(np.uint8), transposed_.view(np.uint8)
    stride = bicubic_weights(h, size, first, taps, weights, exact)
    for i in range(size):
        _sum_rows(
            pixels, top * wide + 3 * left, wide, h - 1, first[i], taps[i],
            weights[i * stride :], 3 * w, sums, once, i * long,
        )  # fmt: skip
    transpose_bytes(once_, size, long // 8, transposed_)  # (w, 3, size)
    stride = bicubic_weights(w, size, first, taps, weights, exact)
    for c in range(3):
        for i in range(size):
            x = size - 1 - i if flip else i
            _sum_rows(
                transposed, c * side, 3 * side, w - 1, first[i], taps[i],
                weights[i * stride :], size, sums, once, x * side,
            )  # fmt: skip
        last = transposed_[3 * side * (w + 1) // 8 :]  # beyond what is still needed
        transpose_bytes(once_, size, side // 8, last)
        plane = last.view(np.uint8)
        for y in range(size):
            o, d = _U(y * side), _U(offset + (c * size + y) * size)
            for j in range(_U(size)):
                out[d + j] = plane[o + j]


def compiled_and_cached(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled by numba and cached on disk for the next process, or compiled by each where no folder can be written.

    numba looks for a folder in NUMBA_CACHE_DIR, beside the file and in the user's cache folder, and raises RuntimeError
    when it finds none, as in a read-only container.
    """
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


# The one that is cached: what it calls is compiled into it. A file for each of them could be written by one process and
# read by another that had compiled the rest, and numba's tables of types do not survive that.
@compiled_and_cached
def make_views(
    s: tuple, height: int, width: int, box: NDArray, flip: NDArray, size: NDArray, offset: NDArray, out: NDArray,
    colored: bool, jitter: NDArray, factors: NDArray, order: NDArray, gray: NDArray, sigma: NDArray,
    solarize: NDArray, threshold: int,
) -> None:  # fmt: skip
    """All V views of the image in `pixels` of tuple(Scratch), each from index `offset` on in the flat `out`.

    box (V, 4) as in ViewPlan, size (V,) the side of each view, offset (V,); with `colored`, color follows at once,
    by the other fields of the plan.
    """
    transpose_bytes(s[0], height, (3 * width + 7) // 8, s[1])
    for v in range(len(flip)):
        if VERTICAL_MAY_BE_FIRST and box[v, 2] - size[v] > 2 * max(box[v, 3] - size[v], 0):
            _vertical_first(s, width, box[v], flip[v], size[v], out, offset[v])
        else:
            _horizontal_first(s, height, box[v], flip[v], size[v], out, offset[v])
        if colored and (jitter[v] or gray[v] or sigma[v] > 0 or solarize[v]):
            color_view(
                out[offset[v] : offset[v] + 3 * size[v] * size[v]], size[v], s[9],
                jitter[v], factors[v], order[v], gray[v], sigma[v], solarize[v], threshold,
            )  # fmt: skip
