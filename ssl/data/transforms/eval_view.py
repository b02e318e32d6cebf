"""The one view of an image that evaluation uses."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_BICUBIC = Image.Resampling.BICUBIC


class Window(NamedTuple):
    """An image resized to new_height x new_width pixels, and the part of that which is kept."""

    new_height: int
    new_width: int
    top: int
    left: int
    height: int
    width: int


def center_window(height: int, width: int, size: int, resize: int | None = None) -> Window:
    """What `eval_view` takes of an image of height x width pixels."""
    if resize is None:
        resize = size if (height, width) == (size, size) else round(size * 8 / 7)
    if resize < size:
        raise ValueError(f"resize = {resize} is below the crop's size = {size}")
    short = min(width, height)
    height, width = int(resize * height / short), int(resize * width / short)
    return Window(height, width, round((height - size) / 2), round((width - size) / 2), size, size)


def eval_view(image: Image.Image, size: int, resize: int | None = None) -> Tensor:
    """The view for evaluation: shorter side to `resize` (antialiased bicubic), central crop -> uint8 (3, size, size).

    `resize` defaults to round(size * 8 / 7), as 256 for 224, except that an image of size x size is taken as it is.
    Agrees with torchvision's Resize and CenterCrop.
    """
    window = center_window(image.height, image.width, size, resize)
    view = image.resize((window.new_width, window.new_height), _BICUBIC)
    view = view.crop((window.left, window.top, window.left + size, window.top + size))
    return torch.from_numpy(np.asarray(view).transpose(2, 0, 1).copy())
