"""The colors of the scenes: luminances of background and ink that never meet, and hues that leave these as they are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nearfar.launch.scenes.coordinates import Floats
from nearfar.launch.scenes.style import Style


class Luminances(NamedTuple):
    """Mean luminance and half range of the textures of background and ink, each (n,)."""

    background: Floats
    background_half: Floats
    ink: Floats
    ink_half: Floats


def luminances(rng: np.random.Generator, n: int, style: Style) -> Luminances:
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
    return Luminances(*(a.astype(np.float32) for a in (ground, ground_half, ink, ink_half)))


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


def colorize(rng: np.random.Generator, field: Floats, mean: Floats, half: Floats, color: float) -> Floats:
    """A field (n, s, s) in [-1, 1] as RGB (n, s, s, 3) between two hues, at luminance mean +- half."""
    first, second = (_chroma(rng, len(field), color)[:, None, None] for _ in range(2))
    luminance = mean[:, None, None] + half[:, None, None] * field
    return _in_gamut(luminance, first + (0.5 + 0.5 * field[..., None]) * (second - first))


def clutter_color(rng: np.random.Generator, paint: Luminances, color: float) -> Floats:
    """(n, 3): clutter is at most 45 % of the way from the background's luminance to the ink's."""
    n = len(paint.ink)
    towards = rng.uniform(-0.2, 0.45, n).astype(np.float32)
    luminance = np.clip(paint.background + towards * (paint.ink - paint.background), 0.02, 0.98)
    return _in_gamut(luminance, _chroma(rng, n, color))
