"""The color half of a view on a CPU, compiled by numba: what colors.py does, on one view, to 8 bits.

Every operation is that of `colors.color` in float32 on values within [0, 1]; only sums are added in another order.
The result is rounded to 8 bits. All loops run over flat arrays of floats, without a branch, to become vector code.
"""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

_F = np.float32
_ZERO, _ONE = np.float32(0), np.float32(1)
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
_FAST = {"nnan", "ninf", "nsz", "reassoc", "contract"}  # values are finite, and sums may be taken in any order
_U = np.uint64


# Scratch for views of up to s x s pixels: red, green, blue (s * s each); another plane, a row with its borders, and the
# taps of the blur. A plain tuple, whose type for numba does not depend on a class.
Plane = NDArray[np.float32]
Planes = tuple[Plane, Plane, Plane, Plane, Plane, Plane]


def make_planes(side: int) -> Planes:
    def plane(n: int) -> Plane:
        return np.empty(n, np.float32)

    area = side * side
    return plane(area), plane(area), plane(area), plane(area), plane(3 * side), plane(side)


@njit(nogil=True, fastmath=_FAST)
def _scale_add(x: NDArray, n: int, factor: np.float32, add: np.float32) -> None:
    for i in range(_U(n)):
        value = x[i] * factor + add
        x[i] = min(max(value, _ZERO), _ONE)


@njit(nogil=True, fastmath=_FAST)
def _contrast(p: Planes, n: int, factor: np.float32) -> None:
    red, green, blue = p[0], p[1], p[2]
    total = _ZERO
    for i in range(_U(n)):
        total += red[i] * _RED + green[i] * _GREEN + blue[i] * _BLUE
    add = _F(total / _F(n)) * (_ONE - factor)
    for x in (red, green, blue):
        _scale_add(x, n, factor, add)


@njit(nogil=True, fastmath=_FAST)
def _saturation(p: Planes, n: int, factor: np.float32) -> None:
    rest = _ONE - factor
    red, green, blue = p[0], p[1], p[2]
    for i in range(_U(n)):
        r, g, b = red[i], green[i], blue[i]
        luma = (r * _RED + g * _GREEN + b * _BLUE) * rest
        red[i] = min(max(r * factor + luma, _ZERO), _ONE)
        green[i] = min(max(g * factor + luma, _ZERO), _ONE)
        blue[i] = min(max(b * factor + luma, _ZERO), _ONE)


@njit(nogil=True, fastmath=_FAST)
def _hue(p: Planes, n: int, turns: np.float32) -> None:
    """As `colors.shift_hue`, which explains the formula."""
    red, green, blue = p[0], p[1], p[2]
    shift_red = _F((turns * 6 + 3 + 5) % 6 - 5)
    shift_green = _F((turns * 6 + 1 + 5) % 6 - 5)
    shift_blue = _F((turns * 6 - 1 + 5) % 6 - 5)
    three, two, four = _F(3), _F(2), _F(4)
    for i in range(_U(n)):
        r, g, b = red[i], green[i], blue[i]
        value, low = max(max(r, g), b), min(min(r, g), b)
        chroma = value - low
        from_blue = r - g + four * chroma
        from_green = b - r + two * chroma
        hue = from_green if g == value else from_blue
        hue = g - b if r == value else hue
        top = value + chroma
        red[i] = min(max(top - abs(abs(hue + shift_red * chroma) - three * chroma), low), value)
        green[i] = min(max(top - abs(abs(hue + shift_green * chroma) - three * chroma), low), value)
        blue[i] = min(max(top - abs(abs(hue + shift_blue * chroma) - three * chroma), low), value)


@njit(nogil=True, fastmath=_FAST)
def _gray(p: Planes, n: int) -> None:
    red, green, blue = p[0], p[1], p[2]
    for i in range(_U(n)):
        luma = red[i] * _RED + green[i] * _GREEN + blue[i] * _BLUE
        red[i] = luma
        green[i] = luma
        blue[i] = luma


@njit(nogil=True, fastmath=_FAST)
def _blur(x: NDArray, size: int, radius: int, taps: NDArray, line: NDArray, other: NDArray) -> None:
    """Blur a plane (size, size): along its rows into `other`, then down the columns, whole rows at a time."""
    n = _U(size)
    middle = taps[0]
    for y in range(size):
        o = _U(y * size)
        for j in range(n):
            line[_U(radius) + j] = x[o + j]
        for r in range(1, radius + 1):
            line[radius - r] = x[y * size + r]
            line[radius + size - 1 + r] = x[y * size + size - 1 - r]
        c = _U(radius)
        for j in range(n):
            other[o + j] = middle * line[c + j]
        for r in range(1, radius + 1):
            w, a, b = taps[r], _U(radius - r), _U(radius + r)
            for j in range(n):
                other[o + j] += w * (line[a + j] + line[b + j])
    for y in range(size):
        o = _U(y * size)
        for j in range(n):
            x[o + j] = middle * other[o + j]
        for r in range(1, radius + 1):
            above, below = abs(y - r), size - 1 - abs(size - 1 - y - r)
            w, a, b = taps[r], _U(above * size), _U(below * size)
            for j in range(n):
                x[o + j] += w * (other[a + j] + other[b + j])


@njit(nogil=True)
def _blur_taps(sigma: float, size: int, taps: NDArray) -> int:
    """As `colors.blur_taps`, which explains the formula; the number of taps beside the middle one."""
    variance = sigma * sigma / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    end = whole + 1
    part = (2 * whole + 1) * (whole * end - 3 * variance) / (6 * (variance - end * end))
    radius = min(3 * end, size - 1)
    total = 0.0
    for r in range(radius + 1):
        tap = 0.0
        for i in range(-end, end + 1):
            for j in range(-end, end + 1):
                k = abs(r - i - j)
                if k <= end:
                    ends = (abs(i) == end) + (abs(j) == end) + (k == end)
                    tap += part**ends
        taps[r] = tap
        total += tap * (1 if r == 0 else 2)
    for r in range(radius + 1):
        taps[r] /= total
    return radius


@njit(nogil=True, fastmath=_FAST)
def _unpack(view: NDArray, n: int, p: Planes) -> None:
    step = _F(1 / 255)
    for c, x in enumerate((p[0], p[1], p[2])):
        o = _U(c * n)
        for i in range(_U(n)):
            x[i] = _F(view[o + i]) * step


@njit(nogil=True, fastmath=_FAST)
def _pack(view: NDArray, n: int, p: Planes, solarize: bool, threshold: np.float32) -> None:
    half = _F(0.5)
    scale = _F(255)
    for c, x in enumerate((p[0], p[1], p[2])):
        o = _U(c * n)
        if solarize:
            for i in range(_U(n)):
                value = x[i]
                value = _ONE - value if value >= threshold else value
                view[o + i] = np.uint8(np.int32(value * scale + half))
        else:
            for i in range(_U(n)):
                view[o + i] = np.uint8(np.int32(x[i] * scale + half))


@njit(nogil=True)
def color_view(
    view: NDArray, size: int, p: Planes, jitter: bool, factors: NDArray, order: NDArray, gray: bool, sigma: float,
    solarize: bool, threshold: int,
) -> None:  # fmt: skip
    """Color a view in place: uint8, flat (3 * size * size), planar; the other arguments are as in ViewPlan."""
    n = size * size
    red, green, blue, other, line, taps = p
    _unpack(view, n, p)
    if jitter:
        for k in range(4):
            op = order[k]
            if op == 0:
                for x in (red, green, blue):
                    _scale_add(x, n, factors[0], _ZERO)
            elif op == 1:
                _contrast(p, n, factors[1])
            elif op == 2:
                _saturation(p, n, factors[2])
            else:
                _hue(p, n, factors[3])
    if gray:
        _gray(p, n)
    if sigma > 0:
        radius = _blur_taps(sigma, size, taps)
        for x in (red, green, blue):
            _blur(x, size, radius, taps, line, other)
    _pack(view, n, p, solarize, _F(threshold / 255))
