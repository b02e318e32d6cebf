"""Segmentation of images of any size: a window slides over the image, and logits are averaged where windows overlap.

Rows of windows are finished from top to bottom, so that logits are held for one row of windows only: memory grows
with the width of an image, not with its height, and never with the number of windows.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nearfar.ssl.errors import UserError

Logits = Callable[[Tensor], Tensor]
"""Normalized images (B, 3, H, W), sides in whole patches -> class scores (B, classes, H, W)."""


class Windows(NamedTuple):
    """side: of the square windows in pixels, 0 = the whole image as one. stride: from one window to the next, at most
    the side. patch: of the network; sides are cut or padded to whole patches. batch: windows computed at once."""

    side: int
    stride: int
    patch: int
    batch: int = 8

    @staticmethod
    def of(side: int, stride: int | None, patch: int) -> "Windows":
        """stride: None = two thirds of the side. Raises UserError for what cannot cover an image."""
        if side < 0 or side % patch:
            raise UserError(
                f"--window {side} cannot be cut into patches of {patch}: name a multiple of {patch}, or 0 for the "
                "whole image."
            )
        stride = max(1, round(side * 2 / 3)) if stride is None else stride
        if side and not 1 <= stride <= side:
            raise UserError(f"--stride {stride} would leave pixels out: it must lie between 1 and {side}, the window.")
        return Windows(side, stride, patch)

    def along(self, length: int) -> tuple[int, list[int]]:
        """The window's extent along a side of so many pixels, and where the windows begin; the last ends with it."""
        whole = -(-length // self.patch) * self.patch
        if not self.side or whole <= self.side:
            return whole, [0]
        last = length - self.side
        return self.side, [*range(0, last, self.stride), last]


def averaged_logits(image: Tensor, logits_of: Logits, windows: Windows) -> Iterator[Tensor]:
    """Mean logits (classes, rows, W) of consecutive rows of an image (3, H, W), top to bottom, H rows in all.

    An image smaller than a window, or without whole patches, is padded with zeros (the mean color) on the right and at
    the bottom; what falls on the padding is dropped.
    """
    height, width = image.shape[1:]
    (tall, tops), (wide, lefts) = windows.along(height), windows.along(width)
    padded = F.pad(image, (0, max(0, wide - width), 0, max(0, tall - height)))
    total, count = torch.empty(0), torch.empty(0)
    for top, following in zip(tops, [*tops[1:], None], strict=True):
        for first in range(0, len(lefts), windows.batch):
            some = lefts[first : first + windows.batch]
            parts = torch.stack([padded[:, top : top + tall, left : left + wide] for left in some])
            logits = logits_of(parts).float()
            if not len(total):
                total = logits.new_zeros(logits.shape[1], tall, padded.shape[2])
                count = logits.new_zeros(tall, padded.shape[2])
            for left, part in zip(some, logits, strict=True):
                total[:, :, left : left + wide] += part
                count[:, left : left + wide] += 1
        done = tall if following is None else following - top
        yield (total[:, :done] / count[:done])[:, : height - top, :width]
        total = F.pad(total[:, done:], (0, 0, 0, done))
        count = F.pad(count[done:], (0, 0, 0, done))


@torch.inference_mode()
def predicted_classes(image: Tensor, logits_of: Logits, windows: Windows) -> np.ndarray:
    """The class of every pixel of a normalized image (3, H, W), uint8 (H, W). Raises UserError for NaN."""
    rows = []
    for logits in averaged_logits(image, logits_of, windows):
        if not bool(torch.isfinite(logits).all()):
            raise UserError(
                "The class scores of a test image are not finite (NaN or infinite); the backbone, or the head on it, "
                "has most likely diverged."
            )
        rows.append(logits.max(0).indices.to("cpu", torch.uint8))
    return torch.cat(rows).numpy()
