"""Patch tokens as colors: principal components over a batch of images, with the background taken away."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nearfar.eval.attention_maps import evaluating
from nearfar.ssl.backbones import Backbone


class TokenColors(NamedTuple):
    """colors: (n, h, w, 3) in [0, 1]. shown: (n, h, w), the patches that are no background."""

    colors: NDArray[np.float64]
    shown: NDArray[np.bool_]


def patch_tokens(backbone: Backbone, images: Tensor) -> NDArray[np.float32]:
    """The patch tokens (n, h, w, D) that the network puts out, after its final norm and PRR where that is on.

    Args:
        images: (n, 3, H, W), ImageNet-normalized.
    """
    with evaluating(backbone):
        tokens = backbone(images)
    return np.asarray(tokens.patches.float().unflatten(1, tokens.grid).cpu().numpy(), np.float32)


def token_colors(tokens: NDArray[np.floating[Any]]) -> TokenColors:
    """One principal component analysis over all patches (n, h, w, D) of a batch, in two steps, as DINOv2 shows them
    (Oquab et al. 2024, section 7.6).

    The first component parts the foreground from the background; then the components of the foreground alone become
    red, green and blue. What all images have alike at a place of the grid, such as the mark of a border, is no content:
    with at least four images, its mean over them is taken away first.
    """
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    if len(tokens) >= 4:
        flat = (tokens - tokens.mean(0, keepdims=True, dtype=np.float64)).reshape(flat.shape)
    shown = foreground(first_component(flat).reshape(tokens.shape[:3]))
    colors = np.full((len(flat), 3), 0.5)
    inside = shown.reshape(-1)
    if inside.any():
        colors[inside] = principal_colors(flat[inside])
    return TokenColors(colors.reshape(*tokens.shape[:3], 3), shown)


def first_component(tokens: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """(m, D) -> (m,): the projection on the first principal component, of either sign."""
    centered = tokens.astype(np.float64) - tokens.mean(0, dtype=np.float64)
    _, directions = np.linalg.eigh(centered.T @ centered)  # the largest is the last
    return np.asarray(centered @ directions[:, -1])


def foreground(values: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """The patches (n, h, w) on one side of Otsu's threshold: the side that is rarer along the borders of the images."""
    above = values > otsu(values)
    border = np.ones(values.shape[1:], bool)
    border[1:-1, 1:-1] = False
    if border.all():
        return np.ones(values.shape, bool)
    inner = above[:, ~border].mean() - above[:, border].mean()
    return np.asarray(above if inner > 0 else ~above)


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


def similarity(tokens: NDArray[np.floating[Any]], place: tuple[int, int]) -> NDArray[np.float64]:
    """Cosine of every patch of one image (h, w, D) to the patch at `place` (row, column): (h, w).

    The mean token of the image is taken away first: what all patches share says nothing about places.
    """
    centered = tokens.astype(np.float64) - tokens.mean((0, 1), dtype=np.float64)
    unit = centered / np.maximum(np.linalg.norm(centered, axis=-1, keepdims=True), 1e-12)
    return np.asarray(unit @ unit[place])
