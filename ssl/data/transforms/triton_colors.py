"""The color half of a view on a GPU: the operations of colors.py in five launches, whatever the plan.

colors.py picks the samples that need an operation, which costs a GPU a wait for the host and several launches an
operation. Here a block of pixels reads its sample's row of the plan, one small array copied once, and follows it:

1. gray levels just before the contrast, summed a block            (the sums are added by torch: no atomics, so that
2. the four adjustments in the sample's order, then gray            a run gives the same numbers every time)
3. and 4. the blur along each axis, solarizing at the end

Triton comes with CUDA builds of torch. On a CPU the kernels run in Triton's interpreter, which is how they are tested.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a plan packed by `colors.pack`. Triton reads globals only as constexpr.
_FACTORS = tl.constexpr(0)  # brightness, contrast, saturation, hue
_ORDER = tl.constexpr(4)
_JITTER = tl.constexpr(8)
_GRAY = tl.constexpr(9)
_SIGMA = tl.constexpr(10)
_SOLARIZE = tl.constexpr(11)
_TAPS = tl.constexpr(12)  # and so on: the blur's, the middle one first
_CONTRAST = tl.constexpr(1)
_BLOCK = 1024


def color_batch(images: Tensor, packed: Tensor, threshold: int) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 (N, 3, H, W) in [0, 1], as `colors.color` with the plan that was packed.

    Args:
        images: contiguous, on the GPU.
        packed: (N, 13 + radius) of `colors.pack`, on the same device; the radius is below the side of an image.
        threshold: the gray level (0..256) from which solarizing inverts.
    """
    n, _, height, width = images.shape
    pixels, columns = height * width, packed.shape[1]
    blocks = triton.cdiv(pixels, _BLOCK)
    sums = packed.new_empty(n, blocks)
    x, y = (torch.empty(images.shape, dtype=torch.float32, device=images.device) for _ in range(2))
    _adjust_kernel[(n, blocks)](images, packed, sums, sums, x, pixels, columns, SUMMING=True, BLOCK=_BLOCK)
    mean = sums.sum(1) / pixels
    _adjust_kernel[(n, blocks)](images, packed, mean, sums, x, pixels, columns, SUMMING=False, BLOCK=_BLOCK)
    radius = columns - 13
    grid = (3 * n, blocks)
    _blur_kernel[grid](x, packed, y, height, width, columns, 0.0, RADIUS=radius, ACROSS=True, BLOCK=_BLOCK)
    _blur_kernel[grid](y, packed, x, height, width, columns, threshold / 255, RADIUS=radius, ACROSS=False, BLOCK=_BLOCK)
    return x


@triton.jit
def _luma(red, green, blue):  # type: ignore[no-untyped-def]
    return red * 0.2989 + green * 0.587 + blue * 0.114  # ITU-R 601-2, as in colors.py


@triton.jit
def _clamp(x):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _hue_channel(hue, chroma, value, low, sixths, offset):  # type: ignore[no-untyped-def]
    """As `colors.shift_hue`, which explains the formula."""
    turned = sixths + offset + 5.0
    shift = turned - 6.0 * tl.floor(turned / 6.0) - 5.0
    distance = tl.abs(hue + chroma * shift)
    return tl.minimum(tl.maximum(value + chroma - tl.abs(distance - 3.0 * chroma), low), value)


@triton.jit
def _adjust_kernel(images, packed, mean, sums, out, pixels, columns, SUMMING: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One block of one sample: its gray sum before the contrast (SUMMING), or its adjusted colors."""
    sample = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < pixels
    base = images + 3 * sample * pixels + index
    red = tl.load(base, inside, 0).to(tl.float32) / 255.0
    green = tl.load(base + pixels, inside, 0).to(tl.float32) / 255.0
    blue = tl.load(base + 2 * pixels, inside, 0).to(tl.float32) / 255.0
    row = packed + sample * columns
    going = tl.load(row + _JITTER) > 0
    for step in tl.static_range(4):
        op = tl.load(row + _ORDER + step).to(tl.int32)
        if SUMMING:
            going = going & (op != _CONTRAST)
        if going:
            factor = tl.load(row + _FACTORS + op)
            if op == 3:
                value = tl.maximum(tl.maximum(red, green), blue)
                low = tl.minimum(tl.minimum(red, green), blue)
                chroma = value - low
                other = tl.where(green == value, blue - red + 2.0 * chroma, red - green + 4.0 * chroma)
                hue = tl.where(red == value, green - blue, other)
                red = _hue_channel(hue, chroma, value, low, factor * 6.0, 3.0)
                green = _hue_channel(hue, chroma, value, low, factor * 6.0, 1.0)
                blue = _hue_channel(hue, chroma, value, low, factor * 6.0, -1.0)
            else:
                offset = tl.zeros([BLOCK], tl.float32)
                if op == _CONTRAST:
                    offset += tl.load(mean + sample) * (1.0 - factor)
                if op == 2:
                    offset = _luma(red, green, blue) * (1.0 - factor)
                red = _clamp(red * factor + offset)
                green = _clamp(green * factor + offset)
                blue = _clamp(blue * factor + offset)
    if SUMMING:
        gray = tl.where(inside, _luma(red, green, blue), 0.0)
        tl.store(sums + sample * tl.num_programs(1) + block, tl.sum(gray, 0))
    else:
        if tl.load(row + _GRAY) > 0:
            red = _luma(red, green, blue)
            green = red
            blue = red
        to = out + 3 * sample * pixels + index
        tl.store(to, red, inside)
        tl.store(to + pixels, green, inside)
        tl.store(to + 2 * pixels, blue, inside)


@triton.jit
def _blur_kernel(  # type: ignore[no-untyped-def]
    x, packed, out, height, width, columns, threshold, RADIUS: tl.constexpr, ACROSS: tl.constexpr, BLOCK: tl.constexpr
):
    """One block of one channel, blurred along a row (ACROSS) or a column, with reflected borders; then solarized."""
    channel = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < height * width
    plane = channel * height * width
    row = packed + channel // 3 * columns
    middle = tl.load(x + plane + index, inside, 0.0)
    if tl.load(row + _SIGMA) > 0:
        line = index // width
        column = index - line * width
        blurred = middle * tl.load(row + _TAPS)
        for tap in tl.static_range(1, RADIUS + 1):
            if ACROSS:
                before = line * width + tl.abs(column - tap)
                after = line * width + width - 1 - tl.abs(width - 1 - column - tap)
            else:
                before = tl.abs(line - tap) * width + column
                after = (height - 1 - tl.abs(height - 1 - line - tap)) * width + column
            pair = tl.load(x + plane + before, inside, 0.0) + tl.load(x + plane + after, inside, 0.0)
            blurred += tl.load(row + _TAPS + tap) * pair
        middle = blurred
    if not ACROSS:
        if tl.load(row + _SOLARIZE) > 0:
            middle = tl.where(middle >= threshold, 1.0 - middle, middle)
    tl.store(out + plane + index, middle, inside)
