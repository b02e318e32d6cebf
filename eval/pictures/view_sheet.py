"""The contact sheet of a run: what its network sees in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nearfar.ssl.disk import files

_GAP = 4  # pixels between pictures
_PAPER = (255, 255, 255)
_INK = (90, 98, 110)


def contact_sheet(images: Sequence[Tensor], rows: int = 6, side: int = 120) -> Image.Image:
    """All views of the first `rows` samples, one row a sample: what the network is really trained on.

    Args:
        images: the groups of a batch after color, each (G, B, 3, s, s) float in [0, 1], the global views first.
        side: pixels of a global view on the sheet; local views keep their true size beside it.
    """
    rows = min(rows, images[0].shape[1])
    views = [view[:rows] for group in images for view in group]
    largest = max(view.shape[-1] for view in views)
    sides = [max(1, round(side * view.shape[-1] / largest)) for view in views]
    globals_ = len(images[0])
    top = 20
    width = sum(sides) + _GAP * (len(sides) - 1)
    sheet = Image.new("RGB", (width, top + rows * (side + _GAP) - _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    x = 0
    for v, (view, s) in enumerate(zip(views, sides, strict=True)):
        name = f"global {v + 1}" if v < globals_ else f"local {v - globals_ + 1}"
        draw.text((x, 4), name if s >= 46 else name[-1], _INK, font)
        for row, pixels in enumerate(_to_bytes(view)):
            sheet.paste(Image.fromarray(pixels).resize((s, s)), (x, top + row * (side + _GAP)))
        x += s + _GAP
    return sheet


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all. Raises OSError as `files.atomic`."""
    with files.atomic(path) as partial:
        picture.save(partial, "PNG")


def _to_bytes(images: Tensor) -> NDArray[np.uint8]:
    """(n, 3, H, W) in [0, 1] -> uint8 (n, H, W, 3)."""
    return (images.detach().float().clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
