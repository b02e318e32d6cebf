"""The textures of the scenes: fields of noise, gratings, ramps, blobs and checks, and the shapes of clutter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from nearfar.launch.scenes.coordinates import Floats, per_image, pixel_centers
from nearfar.launch.scenes.style import BACKGROUNDS


def backgrounds(rng: np.random.Generator, n: int, size: int, kinds: Sequence[str]) -> Floats:
    """Fields (n, size, size) in [-1, 1], each of one of the kinds, drawn at random."""
    draw = {
        "noise": _noise_field,
        "even": even_noise,
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
        total += per_image(np.sqrt(shares[:, octave])) * _smooth_grid(rng, n, cells, size)
    return _stretch(total)


def even_noise(rng: np.random.Generator, n: int, size: int) -> Floats:
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
    x, y = pixel_centers(size)
    total = np.zeros((n, size, size), np.float32)
    for wave in range(2):
        angle, periods = rng.uniform(0, np.pi, n), np.exp(rng.uniform(np.log(2), np.log(11), n))
        along = per_image(np.cos(angle)) * x + per_image(np.sin(angle)) * y
        phase = per_image(rng.uniform(0, 2 * np.pi, n))
        swing = np.sin(per_image(np.pi * periods) * along + phase)
        hard = np.tanh(per_image(rng.uniform(0.3, 4, n)) * swing)
        total += hard if wave == 0 else per_image((rng.random(n) < 0.5) * rng.uniform(0.4, 1, n)) * hard
    return _stretch(total)


def _gradient(rng: np.random.Generator, n: int, size: int) -> Floats:
    """Linear or radial ramps."""
    x, y = pixel_centers(size)
    angle = rng.uniform(0, 2 * np.pi, n)
    linear = per_image(np.cos(angle)) * x + per_image(np.sin(angle)) * y
    radial = np.hypot(x - per_image(rng.uniform(-1, 1, n)), y - per_image(rng.uniform(-1, 1, n)))
    return _stretch(np.where(per_image(rng.random(n)) < 0.5, linear, radial))


def _blobs(rng: np.random.Generator, n: int, size: int) -> Floats:
    """Eight soft round spots, some light and some dark."""
    x, y = pixel_centers(size)
    total = np.zeros((n, size, size), np.float32)
    for _ in range(8):
        width = per_image(rng.uniform(0.1, 0.35, n))
        across = np.exp(-(((x - per_image(rng.uniform(-1, 1, n))) / width) ** 2))
        down = np.exp(-(((y - per_image(rng.uniform(-1, 1, n))) / width) ** 2))
        total += per_image(rng.choice([-1.0, 1.0], n)) * across * down
    return _stretch(total)


def _checks(rng: np.random.Generator, n: int, size: int) -> Floats:
    """Turned checkerboards with every tile of its own brightness."""
    x, y = pixel_centers(size)
    angle, tiles = rng.uniform(0, np.pi / 2, n), rng.uniform(3, 8, n)
    u = per_image(np.cos(angle)) * x + per_image(np.sin(angle)) * y
    v = per_image(-np.sin(angle)) * x + per_image(np.cos(angle)) * y
    # The frame turned by 45 degrees reaches sqrt 2, 5.7 of at most 8 tiles from the center: 16 a side do.
    row = np.clip(np.floor(per_image(tiles / 2) * u).astype(int) + 8, 0, 15)
    column = np.clip(np.floor(per_image(tiles / 2) * v).astype(int) + 8, 0, 15)
    table = rng.uniform(-1, 1, (n, 16, 16)).astype(np.float32)
    parity = ((row + column) % 2).astype(np.float32)
    return _stretch(table[np.arange(n)[:, None, None], row, column] + 1.5 * parity)


def clutter_piece(rng: np.random.Generator, n: int, size: int) -> Floats:
    """Coverage (n, size, size) of one stroke or disc a scene, at most a third of the frame long."""
    x, y = pixel_centers(size)
    x0, y0, angle = rng.uniform(-1, 1, n), rng.uniform(-1, 1, n), rng.uniform(0, np.pi, n)
    disc = rng.random(n) < 0.4
    half_length = np.where(disc, 0.0, rng.uniform(0.08, 0.26, n))
    radius = np.where(disc, rng.uniform(0.06, 0.16, n), rng.uniform(0.03, 0.06, n))
    u = per_image(np.cos(angle)) * (x - per_image(x0)) + per_image(np.sin(angle)) * (y - per_image(y0))
    v = per_image(np.cos(angle)) * (y - per_image(y0)) - per_image(np.sin(angle)) * (x - per_image(x0))
    beyond = np.maximum(np.abs(u) - per_image(half_length), 0)
    return np.clip((per_image(radius) - np.hypot(beyond, v)) * (size / 2) + 0.5, 0, 1)


def _stretch(field: Floats) -> Floats:
    """Each field of (n, s, s) to exactly [-1, 1]."""
    low, high = field.min((1, 2), keepdims=True), field.max((1, 2), keepdims=True)
    return (field - low) * (2 / np.maximum(high - low, 1e-6)) - 1
