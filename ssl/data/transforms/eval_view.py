"""The one view of an image that evaluation sees."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_BICUBIC = Image.Resampling.BICUBIC


def eval_view(image: Image.Image, size: int, resize: int | None = None) -> Tensor:
    """The view for evaluation: shorter side to `resize` (antialiased bicubic), central crop -> uint8 (3, size, size).

    `resize` defaults to round(size * 8 / 7), as 256 for 224, except that an image of size x size is taken as it is.
    Agrees with torchvision's Resize and CenterCrop.
    """
    if resize is None:
        resize = size if image.size == (size, size) else round(size * 8 / 7)
    if resize < size:
        raise ValueError(f"resize = {resize} is below the crop's size = {size}")
    width, height = image.size
    short = min(width, height)
    width, height = int(resize * width / short), int(resize * height / short)
    top, left = round((height - size) / 2), round((width - size) / 2)
    view = image.resize((width, height), _BICUBIC).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.asarray(view).transpose(2, 0, 1).copy())
