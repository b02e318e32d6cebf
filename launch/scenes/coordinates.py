"""Pixel coordinates of a batch of frames."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def pixel_centers(size: int) -> tuple[Floats, Floats]:
    """Pixel centers in [-1, 1]: x (1, 1, size), y (1, size, 1)."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1).astype(np.float32)
    return line[None, None, :], line[None, :, None]


def per_image(values: NDArray) -> Floats:
    """One number for each image (n,) as (n, 1, 1), to broadcast over its pixels."""
    return values.astype(np.float32)[:, None, None]
