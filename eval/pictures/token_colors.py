"""Patch tokens as colors: principal components over a batch of images, with the background taken away."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nearfar.eval.pictures.attention_maps import evaluating, mirrored
from nearfar.ssl.backbones import Backbone


class TokenColors(NamedTuple):
    """colors: (n, h, w, 3) in [0, 1]. shown: (n, h, w), the patches that are no background."""

    colors: NDArray[np.float64]
    shown: NDArray[np.bool_]


def patch_tokens(backbone: Backbone, images: Tensor) -> NDArray[np.float32]:
    """The patch tokens (n, h, w, D) of the last block, after the final norm, without PRR.

    Images are `mirrored`, and the tokens of the margin are left out.

    Args:
        images: (n, 3, H, W), ImageNet-normalized, H and W multiples of the patch size.
    """
    padded, inner = mirrored(images, backbone.patch_size)
    with evaluating(backbone):
        tokens = backbone.blocks(padded, 1, norm=True)[-1]
    found = tokens.patches.float().unflatten(1, tokens.grid).cpu().numpy()
    return np.asarray(found[:, inner, inner], np.float32)


def token_colors(tokens: NDArray[np.floating[Any]]) -> TokenColors:
    """The foreground's first three principal components over all patches (n, h, w, D) of a batch as red, green and
    blue, so that alike colors are alike tokens across its images (after DINOv2, Oquab et al. 2024, section 7.6)."""
    shown = foreground(tokens)
    colors = np.full((shown.size, 3), 0.5)
    inside = shown.reshape(-1)
    if inside.any():
        colors[inside] = principal_colors(tokens.reshape(-1, tokens.shape[-1])[inside])
    return TokenColors(colors.reshape(*tokens.shape[:3], 3), shown)


def foreground(tokens: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """The patches (n, h, w) that are unlike those along the borders of their own image; of tokens (n, h, w, D).

    Otsu's threshold of the distance to the mean of the border's tokens, one threshold for the batch. DINOv2 thresholds
    the first principal component by hand. On the demo's masks that component parts left from right edges, not digits
    from background (IoU .17 to .20, against .27 to .36 for the distance).
    """
    border = np.ones(tokens.shape[1:3], bool)
    border[1:-1, 1:-1] = False
    if border.all():
        return np.ones(tokens.shape[:3], bool)
    outside = tokens[:, border].mean(1, dtype=np.float64)[:, None, None]
    distance = np.linalg.norm(tokens - outside, axis=-1)
    return np.asarray(distance > otsu(distance))


def otsu(values: NDArray[np.floating[Any]], bins: int = 128) -> float:
    """The threshold between two classes of numbers with the largest variance between them (Otsu 1979)."""
    count, edges = np.histogram(values, bins)
    centers = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(count)
    total, sums = below[-1], np.cumsum(count * centers)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (sums[-1] * below / total - sums) ** 2 / (below * (total - below))
    return float(edges[1:][np.nan_to_num(between, posinf=0.0).argmax()])


def principal_colors(tokens: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """(m, D) -> (m, 3) in [0, 1]: the first three principal components, 1st to 99th percentile each.

    A component's sign is arbitrary; its entry of largest size is made positive, so that a picture stays the same.
    Components beyond the rank are a flat .5.
    """
    centered = tokens.astype(np.float64) - tokens.mean(0, dtype=np.float64)
    _, strength, directions = np.linalg.svd(centered, full_matrices=False)
    colors = np.full((len(tokens), 3), 0.5)
    for c in range(min(3, len(directions))):
        if strength[c] <= 1e-9 * max(1.0, float(strength[0])):
            break
        direction = directions[c] * np.sign(directions[c][np.abs(directions[c]).argmax()])
        values = centered @ direction
        low, high = np.percentile(values, [1, 99])
        colors[:, c] = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return colors


def painted(colors: NDArray[Any], shown: NDArray[np.bool_], size: tuple[int, int]) -> Image.Image:
    """Colors (h, w, 3) as a picture of `size` (width, height), patch by patch, transparent where nothing is shown."""
    alpha = np.where(shown, 255, 0).astype(np.uint8)[..., None]
    pixels = np.concatenate([(colors * 255 + 0.5).astype(np.uint8), alpha], 2)
    return Image.fromarray(pixels, "RGBA").resize(size, Image.Resampling.NEAREST)


def similarity(tokens: NDArray[np.floating[Any]], position: tuple[int, int]) -> NDArray[np.float64]:
    """Cosine of every patch of one image (h, w, D) to the patch at `position` (row, column): (h, w).

    The mean token of the image is taken away first: what all patches share says nothing about places.
    """
    centered = tokens.astype(np.float64) - tokens.mean((0, 1), dtype=np.float64)
    unit = centered / np.maximum(np.linalg.norm(centered, axis=-1, keepdims=True), 1e-12)
    return np.asarray(unit @ unit[position])
