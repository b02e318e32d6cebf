"""Pixels as features: the baseline that every backbone has to beat.

They are normalized exactly as a backbone's input. Without that all colors are positive, all cosines nearly 1, and
k-NN some 7 points lower on CIFAR-10: too easy a baseline.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nearfar.eval.features.extraction import Features, ReadRows, Size
from nearfar.eval.features.images import fitting_mask
from nearfar.ssl.backbones.tokens import check_divides
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.transforms.normalize import normalize_pixels
from nearfar.ssl.errors import BadImage


def pixel_features(source: Source, side: int = 16) -> Features:
    """Thumbnails of side x side pixels (box-averaged, whole image), normalized: (n, side*side*3)."""

    def thumbnail(image: Image.Image) -> np.ndarray:
        return _pixels(image.resize((side, side), Image.Resampling.BOX)).reshape(-1)

    return _of_pixels(source, thumbnail, {"features": "pixels", "side": side}, masks=False)


def pixel_grid(source: Source, size: Size, patch: int) -> Features:
    """Pixels of the patches of the image resized to `size`, normalized: (n, h, w, patch*patch*3)."""
    height, width = (size, size) if isinstance(size, int) else size
    check_divides(height, width, patch)

    def patches(image: Image.Image) -> np.ndarray:
        x = _pixels(image.resize((width, height), Image.Resampling.BICUBIC))
        x = x.reshape(height // patch, patch, width // patch, patch, 3).swapaxes(1, 2)
        return x.reshape(height // patch, width // patch, -1)

    return _of_pixels(source, patches, {"features": "pixels", "size": [height, width], "patch": patch}, masks=True)


def pixel_map(images: Tensor, patch: int) -> Tensor:
    """Normalized images (B, 3, H, W) -> the pixels of each patch, in `pixel_grid`'s order: (B, patch*patch*3, h, w)."""
    (n, _, height, width), p = images.shape, patch
    x = images.view(n, 3, height // p, p, width // p, p).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, p * p * 3, height // p, width // p)


def _of_pixels(
    source: Source, read_pixels: Callable[[Image.Image], np.ndarray], what: dict[str, Any], masks: bool
) -> Features:
    rows, x = ReadRows(), []
    for i in range(len(source)):
        try:
            image = source.read(i)
            mask, rescaled = fitting_mask(source, i, (image.height, image.width)) if masks else (None, None)
        except BadImage as error:
            rows.bad[error.name] = error.why
            continue
        x.append(read_pixels(image))
        rows.index.append(i)
        rows.masks.append(mask)
        rows.rescaled += [rescaled] if rescaled else []
    return rows.features(np.stack(x) if x else np.empty(0), source, {**what, "dataset": source.fingerprint})


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return normalize_pixels(pixels).permute(1, 2, 0).numpy()
