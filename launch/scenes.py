"""The demo's pictures: real handwritten digits composed into colored, textured scenes, made on the spot.

The digits are scikit-learn's bundled copy of the UCI optical-recognition test set (`load_digits`): 1,797 real
scans of 8x8 pixels with 17 gray levels. Everything around them is drawn here. One scene is made like this:

1. a scan of the wanted class is enlarged smoothly (bicubic), turned into coverage by a soft threshold whose
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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits

Range = tuple[float, float]
Floats = NDArray[np.float32]

CLASSES = ("background", *(f"digit {d}" for d in range(10)))
"""Names of the 11 mask values."""

BACKGROUNDS = {"noise": 0.25, "even": 0.05, "grating": 0.25, "gradient": 0.15, "blobs": 0.15, "checks": 0.15}
"""Kinds of background and how often each is drawn."""

_CHUNK = 250  # scenes composed at a time: bounds the memory, and is part of what a seed means
_UPSCALE = 6  # a scan of 8x8 becomes 48x48 (60x60 with its margin of one cell): about the size it is drawn at


class Scenes(NamedTuple):
    """`images` uint8 (n, size, size, 3) RGB; `labels` int64 (n,), the digit; `masks` uint8 (n, size, size):
    digit + 1 on the digit's pixels, 0 elsewhere (11 classes)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    masks: NDArray[np.uint8]


@dataclass(frozen=True)
class Style:
    """How scenes look.

    Attributes:
        digit_height: height of the digit before rotation, as a share of the frame.
        aspect: factor on the digit's width (log-uniform).
        rotation: largest rotation either way, in degrees.
        shear: largest horizontal shear either way, in widths per height.
        shift: share of the room around the digit that its place uses; 0 = always centered, 1 = anywhere.
        polarity: share of scenes with light ink on a dark background.
        contrast: difference between the mean luminances of ink and background, of 1.
        texture: strength of the textures of background and ink; 0 = flat colors, 1 = half ranges of up to
            45 % and 20 % of the contrast.
        color: saturation; 0 = gray scenes, 1 = as saturated as the luminance allows.
        clutter: most pieces of clutter in a scene (the number is uniform in 0..clutter).
        noise: standard deviation of the pixel noise, of 1.
        backgrounds: kinds of BACKGROUNDS to draw from.

    Raises:
        ValueError: an unknown background, or a range out of bounds.
    """

    digit_height: Range = (0.55, 0.8)
    aspect: Range = (0.8, 1.2)
    rotation: float = 15.0
    shear: float = 0.2
    shift: float = 0.75
    polarity: float = 0.5
    contrast: Range = (0.4, 0.75)
    texture: float = 1.0
    color: float = 1.0
    clutter: int = 4
    noise: float = 0.02
    backgrounds: Sequence[str] = tuple(BACKGROUNDS)

    def __post_init__(self) -> None:
        for name, limit in (("digit_height", 1.0), ("contrast", 0.8)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= limit:
                raise ValueError(f"{name} is (low, high) with 0 < low <= high <= {limit}, not {(low, high)}")
        if not (0 <= self.polarity <= 1 and 0 <= self.texture <= 1):
            raise ValueError(f"polarity and texture lie in 0..1, not {self.polarity} and {self.texture}")
        if not self.backgrounds or not set(self.backgrounds) <= BACKGROUNDS.keys():
            raise ValueError(f"backgrounds are some of {', '.join(BACKGROUNDS)}, not {self.backgrounds}")


def make_scenes(
    n: int, seed: int, split: Literal["train", "val"] = "train", size: int = 64, style: Style = Style()
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
    rng: np.random.Generator, wanted: NDArray[np.int64], split: str, size: int, style: Style
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images and masks of scenes with the wanted digits."""
    n, color = len(wanted), style.color
    cover = _digits(rng, wanted, split, size, style)
    paint = _luminances(rng, n, style)
    field = _background(rng, n, size, style.backgrounds)
    scene = _colorize(rng, field, paint.background, paint.background_half, color)
    for _ in range(style.clutter):
        shape = _piece(rng, n, size) * (rng.random(n) < 0.5)[:, None, None]
        scene += shape[..., None] * (_piece_color(rng, paint, color)[:, None, None] - scene)
    ink = _colorize(rng, _even_noise(rng, n, size), paint.ink, paint.ink_half, color)
    scene += cover[..., None] * (ink - scene)
    scene += style.noise * rng.standard_normal(scene.shape, np.float32)
    image = np.clip(scene * 255 + 0.5, 0, 255).astype(np.uint8)
    return image, ((cover > 0.5) * (wanted[:, None, None] + 1)).astype(np.uint8)


# --- the digit --------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _scans() -> tuple[Floats, NDArray[np.int64], NDArray[np.bool_], Floats]:
    """All scans enlarged, (1797, s, s) in about [0, 1]; their labels; which are val's; and the box of the ink
    of each, as (center x, center y, height) in the [-1, 1] coordinates of the enlarged scan."""
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    cells = np.pad(digits.images.astype(np.float32) / 16, ((0, 0), (1, 1), (1, 1)))
    side = cells.shape[1] * _UPSCALE
    large = F.interpolate(torch.from_numpy(cells)[:, None], size=(side, side), mode="bicubic", align_corners=False)
    scans = F.avg_pool2d(large, 3, stride=1, padding=1)[:, 0].numpy()  # rounds off the bicubic's ripples

    val = np.zeros(len(labels), bool)
    for digit in range(10):  # within a class: the file repeats 0..9, so a plain every-fifth would hold two classes only
        val[np.flatnonzero(labels == digit)[::5]] = True

    inked = scans > 0.4
    boxes = np.empty((len(labels), 3), np.float32)
    for i, (rows, columns) in enumerate(zip(np.any(inked, 2), np.any(inked, 1), strict=True)):
        top, bottom = np.flatnonzero(rows)[[0, -1]]
        left, right = np.flatnonzero(columns)[[0, -1]]
        boxes[i] = (left + right + 1) / side - 1, (top + bottom + 1) / side - 1, 2 * (bottom + 1 - top) / side
    return scans, labels, val, boxes


def _digits(rng: np.random.Generator, wanted: NDArray[np.int64], split: str, size: int, style: Style) -> Floats:
    """Coverage (n, size, size) in [0, 1] of one digit of each wanted class, placed at random, not cut off."""
    scans, labels, val, boxes = _scans()
    n = len(wanted)
    pick = rng.random(n)
    chosen = np.empty(n, np.int64)
    for digit in range(10):
        pool = np.flatnonzero((labels == digit) & (val == (split == "val")))
        here = wanted == digit
        chosen[here] = pool[(pick[here] * len(pool)).astype(int)]

    # Forward map of a scan's point s (in [-1, 1]) to the frame: f = A (s - center of the ink) + place.
    height = rng.uniform(*style.digit_height, n)
    angle = np.deg2rad(rng.uniform(-style.rotation, style.rotation, n))
    scale_y = 2 * height / boxes[chosen, 2]
    scale_x = scale_y * np.exp(rng.uniform(np.log(style.aspect[0]), np.log(style.aspect[1]), n))
    lean = rng.uniform(-style.shear, style.shear, n)
    rotation = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1).reshape(n, 2, 2)
    form = np.stack([scale_x, lean * scale_y, np.zeros(n), scale_y], 1).reshape(n, 2, 2)
    matrix = rotation @ form

    # The room left on each side: measured on the placed outline of the ink, so that no digit is cut off.
    inverse = np.linalg.inv(matrix)
    centered = _sample(scans[chosen], inverse, boxes[chosen, :2], size * 2, zoom=2.0) > 0.4
    x_low, x_high = _extent(np.any(centered, 1))
    y_low, y_high = _extent(np.any(centered, 2))
    margin = 2 / size
    low = np.stack([-1 + margin - x_low, -1 + margin - y_low], 1)
    high = np.stack([1 - margin - x_high, 1 - margin - y_high], 1)
    low, high = np.minimum(low, (low + high) / 2), np.maximum(high, (low + high) / 2)
    place = (low + high) / 2 + style.shift * (rng.random((n, 2)) - 0.5) * (high - low)

    center = boxes[chosen, :2] - np.einsum("nij,nj->ni", inverse, place)
    level = rng.uniform(0.36, 0.54, n).astype(np.float32)[:, None, None]
    ink = _sample(scans[chosen], inverse, center, size)
    return np.clip((ink - level) / 0.2 + 0.5, 0, 1)


def _sample(scans: Floats, inverse: NDArray, center: NDArray, size: int, zoom: float = 1.0) -> Floats:
    """Scans seen through the map frame -> scan, `inverse` (n, 2, 2) f + `center` (n, 2), for f in +-zoom."""
    x, y = _axes(size)
    grid = np.stack(
        [
            _column(inverse[:, i, 0] * zoom) * x + _column(inverse[:, i, 1] * zoom) * y + _column(center[:, i])
            for i in (0, 1)
        ],
        axis=-1,
    )
    sampled = F.grid_sample(torch.from_numpy(scans)[:, None], torch.from_numpy(grid), align_corners=False)
    return sampled[:, 0].numpy()


def _extent(any_ink: NDArray[np.bool_]) -> tuple[NDArray, NDArray]:
    """First and last inked coordinate of each row of (n, m) profiles that span +-2."""
    m = any_ink.shape[1]
    first = any_ink.argmax(1)
    last = m - any_ink[:, ::-1].argmax(1)
    return first / m * 4 - 2, last / m * 4 - 2


# --- colors ----------------------------------------------------------------------------------------------


class _Paint(NamedTuple):
    """Mean luminance and half range of the textures of background and ink, each (n,)."""

    background: Floats
    background_half: Floats
    ink: Floats
    ink_half: Floats


def _luminances(rng: np.random.Generator, n: int, style: Style) -> _Paint:
    """Two luminance ranges that never meet: the gap is at least a third of the contrast drawn."""
    apart = rng.uniform(*style.contrast, n)
    ground_half = style.texture * apart * rng.uniform(0.05, 0.45, n)
    ink_half = style.texture * apart * rng.uniform(0.0, 0.2, n)
    # Both ranges must fit into [.03, .97] with the means `apart` from each other.
    fit = np.minimum(1, (0.94 - apart) / np.maximum(ground_half + ink_half, 1e-6))
    ground_half, ink_half = ground_half * fit, ink_half * fit
    light_ink = rng.random(n) < style.polarity
    dark_half = np.where(light_ink, ground_half, ink_half)
    light_half = np.where(light_ink, ink_half, ground_half)
    dark = rng.uniform(0.03 + dark_half, np.maximum(0.97 - light_half - apart, 0.03 + dark_half))
    ground = np.where(light_ink, dark, dark + apart)
    ink = np.where(light_ink, dark + apart, dark)
    return _Paint(*(a.astype(np.float32) for a in (ground, ground_half, ink, ink_half)))


def _chroma(rng: np.random.Generator, n: int, color: float) -> Floats:
    """(n, 3) random hues: offsets from gray that leave the luminance (.299, .587, .114) as it is."""
    hue = rng.uniform(0, 2 * np.pi, n)
    strength = color * rng.uniform(0.1, 0.5, n)
    blue, red = strength * np.cos(hue), strength * np.sin(hue)
    return np.stack([1.402 * red, -0.344136 * blue - 0.714136 * red, 1.772 * blue], 1).astype(np.float32)


def _in_gamut(luminance: Floats, chroma: Floats) -> Floats:
    """luminance (...,) + chroma (..., 3), the chroma shrunk where a channel would leave [0, 1]: clipping
    would shift the luminance, and with it the contrast."""
    share = np.ones_like(chroma[..., 0])
    for c in np.moveaxis(chroma, -1, 0):  # a reduction over an axis of three is several times slower
        np.minimum(share, np.where(c > 0, 1 - luminance, luminance) / np.maximum(np.abs(c), 1e-6), out=share)
    return luminance[..., None] + chroma * share[..., None]


def _colorize(rng: np.random.Generator, field: Floats, mean: Floats, half: Floats, color: float) -> Floats:
    """A field (n, s, s) in [-1, 1] as RGB (n, s, s, 3) between two hues, at luminance mean +- half."""
    first, second = (_chroma(rng, len(field), color)[:, None, None] for _ in range(2))
    luminance = mean[:, None, None] + half[:, None, None] * field
    return _in_gamut(luminance, first + (0.5 + 0.5 * field[..., None]) * (second - first))


def _piece_color(rng: np.random.Generator, paint: _Paint, color: float) -> Floats:
    """(n, 3): clutter is at most 45 % of the way from the background's luminance to the ink's."""
    n = len(paint.ink)
    towards = rng.uniform(-0.2, 0.45, n).astype(np.float32)
    luminance = np.clip(paint.background + towards * (paint.ink - paint.background), 0.02, 0.98)
    return _in_gamut(luminance, _chroma(rng, n, color))


# --- backgrounds and clutter ------------------------------------------------------------------------------


def _axes(size: int) -> tuple[Floats, Floats]:
    """Pixel centers in [-1, 1]: x (1, 1, size), y (1, size, 1)."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1).astype(np.float32)
    return line[None, None, :], line[None, :, None]


def _column(values: NDArray) -> Floats:
    return values.astype(np.float32)[:, None, None]


def _stretch(field: Floats) -> Floats:
    """Each field of (n, s, s) to exactly [-1, 1]."""
    low, high = field.min((1, 2), keepdims=True), field.max((1, 2), keepdims=True)
    return (field - low) * (2 / np.maximum(high - low, 1e-6)) - 1


def _background(rng: np.random.Generator, n: int, size: int, kinds: Sequence[str]) -> Floats:
    """Fields (n, size, size) in [-1, 1], each of one of the kinds, drawn at random."""
    draw = {
        "noise": _noise_field,
        "even": _even_noise,
        "grating": _grating,
        "gradient": _gradient,
        "blobs": _blobs,
        "checks": _checks,
    }
    weight = np.array([BACKGROUNDS[kind] for kind in kinds])
    kind = rng.choice(len(kinds), n, p=weight / weight.sum())
    field = np.empty((n, size, size), np.float32)
    for k, name in enumerate(kinds):
        here = np.flatnonzero(kind == k)
        if len(here):
            field[here] = draw[name](rng, len(here), size)
    return field


def _noise_field(rng: np.random.Generator, n: int, size: int) -> Floats:
    """Band-limited noise: grids of 3 to 24 random cells a side, enlarged smoothly, in random shares."""
    shares = rng.dirichlet([0.6] * 4, n)
    total = np.zeros((n, size, size), np.float32)
    for octave, cells in enumerate((3, 6, 12, 24)):
        total += _column(np.sqrt(shares[:, octave])) * _smooth_grid(rng, n, cells, size)
    return _stretch(total)


def _even_noise(rng: np.random.Generator, n: int, size: int) -> Floats:
    """Noise of one spectrum in all scenes (grids of 6, 12 and 24 cells alike): a texture that tells no two apart."""
    total = np.zeros((n, size, size), np.float32)
    for cells in (6, 12, 24):
        total += _smooth_grid(rng, n, cells, size)
    return _stretch(total)


def _smooth_grid(rng: np.random.Generator, n: int, cells: int, size: int) -> Floats:
    grid = torch.from_numpy(rng.standard_normal((n, 1, cells, cells), np.float32))
    return F.interpolate(grid, size=(size, size), mode="bicubic", align_corners=False)[:, 0].numpy()


def _grating(rng: np.random.Generator, n: int, size: int) -> Floats:
    """Sine waves of 2 to 11 periods a frame, soft to nearly square; half are crossed by a second (plaid)."""
    x, y = _axes(size)
    total = np.zeros((n, size, size), np.float32)
    for wave in range(2):
        angle, periods = rng.uniform(0, np.pi, n), np.exp(rng.uniform(np.log(2), np.log(11), n))
        along = _column(np.cos(angle)) * x + _column(np.sin(angle)) * y
        phase = _column(rng.uniform(0, 2 * np.pi, n))
        swing = np.sin(_column(np.pi * periods) * along + phase)
        hard = np.tanh(_column(rng.uniform(0.3, 4, n)) * swing)
        total += hard if wave == 0 else _column((rng.random(n) < 0.5) * rng.uniform(0.4, 1, n)) * hard
    return _stretch(total)


def _gradient(rng: np.random.Generator, n: int, size: int) -> Floats:
    """Linear or radial ramps."""
    x, y = _axes(size)
    angle = rng.uniform(0, 2 * np.pi, n)
    linear = _column(np.cos(angle)) * x + _column(np.sin(angle)) * y
    radial = np.hypot(x - _column(rng.uniform(-1, 1, n)), y - _column(rng.uniform(-1, 1, n)))
    return _stretch(np.where(_column(rng.random(n)) < 0.5, linear, radial))


def _blobs(rng: np.random.Generator, n: int, size: int) -> Floats:
    """Eight soft round spots, some light and some dark."""
    x, y = _axes(size)
    total = np.zeros((n, size, size), np.float32)
    for _ in range(8):
        width = _column(rng.uniform(0.1, 0.35, n))
        across = np.exp(-(((x - _column(rng.uniform(-1, 1, n))) / width) ** 2))
        down = np.exp(-(((y - _column(rng.uniform(-1, 1, n))) / width) ** 2))
        total += _column(rng.choice([-1.0, 1.0], n)) * across * down
    return _stretch(total)


def _checks(rng: np.random.Generator, n: int, size: int) -> Floats:
    """Turned checkerboards with every tile of its own brightness."""
    x, y = _axes(size)
    angle, tiles = rng.uniform(0, np.pi / 2, n), rng.uniform(3, 8, n)
    u = _column(np.cos(angle)) * x + _column(np.sin(angle)) * y
    v = _column(-np.sin(angle)) * x + _column(np.cos(angle)) * y
    # The frame turned by 45 degrees reaches sqrt 2, 5.7 of at most 8 tiles from the center: 16 a side do.
    row = np.clip(np.floor(_column(tiles / 2) * u).astype(int) + 8, 0, 15)
    column = np.clip(np.floor(_column(tiles / 2) * v).astype(int) + 8, 0, 15)
    table = rng.uniform(-1, 1, (n, 16, 16)).astype(np.float32)
    parity = ((row + column) % 2).astype(np.float32)
    return _stretch(table[np.arange(n)[:, None, None], row, column] + 1.5 * parity)


def _piece(rng: np.random.Generator, n: int, size: int) -> Floats:
    """Coverage (n, size, size) of one stroke or disc a scene, at most a third of the frame long."""
    x, y = _axes(size)
    x0, y0, angle = rng.uniform(-1, 1, n), rng.uniform(-1, 1, n), rng.uniform(0, np.pi, n)
    disc = rng.random(n) < 0.4
    half_length = np.where(disc, 0.0, rng.uniform(0.08, 0.26, n))
    radius = np.where(disc, rng.uniform(0.06, 0.16, n), rng.uniform(0.03, 0.06, n))
    u = _column(np.cos(angle)) * (x - _column(x0)) + _column(np.sin(angle)) * (y - _column(y0))
    v = _column(np.cos(angle)) * (y - _column(y0)) - _column(np.sin(angle)) * (x - _column(x0))
    beyond = np.maximum(np.abs(u) - _column(half_length), 0)
    return np.clip((_column(radius) - np.hypot(beyond, v)) * (size / 2) + 0.5, 0, 1)
