"""Pictures of what a run sees and what its network makes of it: views, attention, patch tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nearfar.ssl import files
from nearfar.ssl.backbones import Backbone
from nearfar.ssl.data.loaders.base import Batch
from nearfar.ssl.data.transforms.normalize import MEAN, STD

_GAP = 4  # pixels between pictures
_PAPER = (255, 255, 255)
_INK = (90, 98, 110)


def contact_sheet(batch: Batch, images: Sequence[Tensor], rows: int = 6, side: int = 96) -> Image.Image:
    """All views of the first `rows` samples, one row a sample: what the network is really trained on.

    Args:
        batch: names the samples (its `index`).
        images: its groups after color, each (G, B, 3, s, s) float in [0, 1], the global views first.
        side: pixels of a global view on the sheet; local views keep their true size beside it.
    """
    rows = min(rows, images[0].shape[1])
    views = [view[:rows] for group in images for view in group]
    largest = max(view.shape[-1] for view in views)
    sides = [max(1, round(side * view.shape[-1] / largest)) for view in views]
    globals_ = len(images[0])
    left, top = 52, 20
    width = left + sum(sides) + _GAP * len(sides)
    sheet = Image.new("RGB", (width, top + rows * (side + _GAP)), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    x = left
    for v, (view, s) in enumerate(zip(views, sides, strict=True)):
        name = f"global {v}" if v < globals_ else f"local {v}"
        draw.text((x, 4), name if s >= 46 else str(v), _INK, font)
        for row, pixels in enumerate(_to_bytes(view)):
            sheet.paste(Image.fromarray(pixels).resize((s, s)), (x, top + row * (side + _GAP)))
        x += s + _GAP
    for row in range(rows):
        draw.text((2, top + row * (side + _GAP) + side // 2 - 6), f"#{int(batch.index[row])}", _INK, font)
    return sheet


def attention_maps(backbone: Backbone, images: Tensor, heads: int = 3, side: int = 128) -> list[Image.Image]:
    """Where the last block looks: one strip an image of the image, the mean over heads, and the first `heads` heads.

    Shows the attention of CLS to the patches (the mean over patch queries where a network has no CLS), bicubically
    enlarged and stretched for each map by itself: brightness compares places, not maps.

    Args:
        images: (n, 3, H, W), ImageNet-normalized.

    Raises:
        UserError: the network has no global attention to show.
    """
    with _evaluating(backbone), torch.no_grad():
        attention = backbone.attention(images).float()
        h, w = backbone.blocks(images, 1)[-1].grid
    prefix = attention.shape[-1] - h * w
    queries = attention[:, :, :1] if prefix else attention
    maps = queries.mean(2)[:, :, prefix:].unflatten(2, (h, w)).cpu().numpy()
    height, width = _fitted(images, side)
    strips = []
    for picture, by_head in zip(_pictures(images), maps, strict=True):
        shown = [by_head.mean(0), *by_head[:heads]] if by_head.shape[0] > 1 else [by_head[0]]
        heat = [Image.fromarray(_heat(values)).resize((width, height), Image.Resampling.BICUBIC) for values in shown]
        strips.append(tile([picture.resize((width, height)), *heat], columns=1 + len(heat)))
    return strips


def token_pca(backbone: Backbone, images: Tensor, side: int = 128) -> list[Image.Image]:
    """Patch tokens (last block, final norm, without PRR) as colors: one pair of image and map for each image.

    Red, green and blue are the first three principal components over the patches of *all* the images, so that alike
    tokens have alike colors across the pictures. Patches are drawn as they are, not smoothed.

    Args:
        images: (n, 3, H, W), ImageNet-normalized.
    """
    with _evaluating(backbone), torch.no_grad():
        tokens = backbone.blocks(images, 1, norm=True)[-1]
    colors = principal_colors(tokens.patches.float().flatten(0, 1).cpu().numpy())
    maps = (colors.reshape(len(images), *tokens.grid, 3) * 255 + 0.5).astype(np.uint8)
    height, width = _fitted(images, side)
    return [
        tile([picture.resize((width, height)), Image.fromarray(m).resize((width, height), Image.Resampling.NEAREST)])
        for picture, m in zip(_pictures(images), maps, strict=True)
    ]


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


def tile(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size side by side (`columns` to a row; default: one row), on white."""
    columns = min(columns or len(pictures), len(pictures))
    rows = -(-len(pictures) // columns)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), _PAPER)
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + _GAP), i // columns * (height + _GAP)))
    return sheet


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all. Raises OSError as `files.atomic`."""
    with files.atomic(path) as partial:
        picture.save(partial, "PNG")


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode within this context; the model's own mode afterwards."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def _to_bytes(images: Tensor) -> NDArray[np.uint8]:
    """(n, 3, H, W) in [0, 1] -> uint8 (n, H, W, 3)."""
    return (images.detach().float().clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _pictures(normalized: Tensor) -> list[Image.Image]:
    mean = torch.tensor(MEAN, device=normalized.device).view(3, 1, 1)
    std = torch.tensor(STD, device=normalized.device).view(3, 1, 1)
    return [Image.fromarray(pixels) for pixels in _to_bytes(normalized * std + mean)]


def _fitted(images: Tensor, side: int) -> tuple[int, int]:
    """Height and width of the picture: the shorter side becomes `side`."""
    height, width = images.shape[-2:]
    scale = side / min(height, width)
    return round(height * scale), round(width * scale)


def _heat(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    low, high = float(values.min()), float(values.max())
    stretched = (values - low) / max(high - low, 1e-12)
    return (colormaps["inferno"](stretched)[..., :3] * 255 + 0.5).astype(np.uint8)
