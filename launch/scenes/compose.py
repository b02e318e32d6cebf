"""The demo's pictures: real handwritten digits composed into colored, textured scenes, made on the spot.

The digits are scikit-learn's bundled copy of the UCI optical-recognition test set (`load_digits`): 1,797 real
scans of 8x8 pixels with 17 gray levels. Everything around them is drawn here. One scene is made like this:

1. a scan of the label's class is enlarged smoothly (bicubic), turned into coverage by a soft threshold whose
   level, and so the stroke width, varies, and placed by an affine map: height, aspect, rotation, shear and
   position vary;
2. a background of one of five kinds is drawn (band-limited noise, grating or plaid, linear or radial
   gradient, soft blobs, checks), running between two random colors;
3. a little clutter (short strokes and discs, each much smaller than the digit) is laid over the background,
   *behind* the digit; its luminance moves at most part of the way towards the ink's;
4. the digit is filled with its own two-color texture, light on dark or dark on light, and a trace of pixel
   noise is added.

Colors are drawn as luminance plus chroma. Luminance is what keeps a scene readable: the background's whole
range and the ink's are kept apart by construction, whatever the hues. Color, texture, polarity and place are
independent of the label, so that nearest neighbors in pixel space mostly find alike *backgrounds*.

Train and val scenes never share a scan: within each class, every fifth scan belongs to val. The scans come
from 13 people and the file does not say whose each is, so one hand may be seen in both splits.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearfar.launch.scenes.colors import clutter_color, colorize, luminances
from nearfar.launch.scenes.digits import digit_coverage
from nearfar.launch.scenes.style import DEFAULT, Style
from nearfar.launch.scenes.textures import backgrounds, clutter_piece, even_noise

CLASSES = ("background", *(f"digit {d}" for d in range(10)))
"""Names of the 11 mask values."""

_CHUNK = 250  # scenes composed at a time: bounds the memory, and is part of what a seed means


class Scenes(NamedTuple):
    """`images` uint8 (n, size, size, 3) RGB; `labels` int64 (n,), the digit; `masks` uint8 (n, size, size):
    digit + 1 on the digit's pixels, 0 elsewhere (11 classes)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    masks: NDArray[np.uint8]


def make_scenes(
    n: int, seed: int, split: Literal["train", "val"] = "train", size: int = 64, style: Style = DEFAULT
) -> Scenes:
    """Draw `n` scenes, the ten digits in equal numbers, in random order; a pure function of the arguments.

    Raises:
        ValueError: `n` or `size` too small, or an unknown split.
    """
    if n < 1 or size < 16:
        raise ValueError(f"make_scenes needs n >= 1 and size >= 16, not n={n}, size={size}")
    if split not in ("train", "val"):
        raise ValueError(f"split is 'train' or 'val', not {split!r}")
    rng = np.random.default_rng([seed, ("train", "val").index(split)])
    labels = rng.permutation(np.arange(n) % 10).astype(np.int64)
    images = np.empty((n, size, size, 3), np.uint8)
    masks = np.empty((n, size, size), np.uint8)
    for start in range(0, n, _CHUNK):
        part = slice(start, min(start + _CHUNK, n))
        images[part], masks[part] = _compose(rng, labels[part], split, size, style)
    return Scenes(images, labels, masks)


def _compose(
    rng: np.random.Generator, labels: NDArray[np.int64], split: str, size: int, style: Style
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images and masks of scenes with these digits."""
    n, color = len(labels), style.color
    cover = digit_coverage(rng, labels, split, size, style)
    paint = luminances(rng, n, style)
    field = backgrounds(rng, n, size, style.backgrounds)
    scene = colorize(rng, field, paint.background, paint.background_half, color)
    for _ in range(style.clutter):
        shape = clutter_piece(rng, n, size) * (rng.random(n) < 0.5)[:, None, None]
        scene += shape[..., None] * (clutter_color(rng, paint, color)[:, None, None] - scene)
    ink = colorize(rng, even_noise(rng, n, size), paint.ink, paint.ink_half, color)
    scene += cover[..., None] * (ink - scene)
    scene += style.noise * rng.standard_normal(scene.shape, np.float32)
    image = np.clip(scene * 255 + 0.5, 0, 255).astype(np.uint8)
    return image, ((cover > 0.5) * (labels[:, None, None] + 1)).astype(np.uint8)
