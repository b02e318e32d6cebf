"""The digits of the scenes: real handwriting, enlarged and placed by an affine map."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from nearfar.launch.scenes.coordinates import Floats, per_image, pixel_centers
from nearfar.launch.scenes.style import Style

_UPSCALE = 6  # a scan of 8x8 becomes 48x48 (60x60 with its margin of one cell): about the size it is drawn at


@lru_cache(maxsize=1)
def scans_of_digits() -> tuple[Floats, NDArray[np.int64], NDArray[np.bool_], Floats]:
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


def digit_coverage(rng: np.random.Generator, labels: NDArray[np.int64], split: str, size: int, style: Style) -> Floats:
    """Coverage (n, size, size) in [0, 1] of one digit of each label's class, placed at random, not cut off."""
    scans, classes, val, boxes = scans_of_digits()
    n = len(labels)
    pick = rng.random(n)
    chosen = np.empty(n, np.int64)
    for digit in range(10):
        pool = np.flatnonzero((classes == digit) & (val == (split == "val")))
        here = labels == digit
        chosen[here] = pool[(pick[here] * len(pool)).astype(int)]

    # Forward map of a scan's point s (in [-1, 1]) to the frame: f = A (s - center of the ink) + offset.
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
    offset = (low + high) / 2 + style.shift * (rng.random((n, 2)) - 0.5) * (high - low)

    center = boxes[chosen, :2] - np.einsum("nij,nj->ni", inverse, offset)
    level = rng.uniform(0.36, 0.54, n).astype(np.float32)[:, None, None]
    ink = _sample(scans[chosen], inverse, center, size)
    return np.clip((ink - level) / 0.2 + 0.5, 0, 1)


def _sample(scans: Floats, inverse: NDArray, center: NDArray, size: int, zoom: float = 1.0) -> Floats:
    """Scans seen through the map frame -> scan, `inverse` (n, 2, 2) f + `center` (n, 2), for f in +-zoom."""
    x, y = pixel_centers(size)
    grid = np.stack(
        [
            per_image(inverse[:, i, 0] * zoom) * x + per_image(inverse[:, i, 1] * zoom) * y + per_image(center[:, i])
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
