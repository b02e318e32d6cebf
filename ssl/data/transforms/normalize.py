"""Pixels -> the input of backbones: ImageNet's mean 0 and standard deviation 1 in each channel."""

from functools import cache

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalize(images: Tensor) -> Tensor:
    """(..., 3, H, W) in [0, 1] -> ImageNet's mean 0 and standard deviation 1 in each channel."""
    mean, std = _moments(images.dtype, images.device)
    return (images - mean) / std


@cache  # on a GPU the copy is synchronous: once, not every step
def _moments(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        mean, std = (torch.tensor(each, dtype=dtype, device=device)[:, None, None] for each in (MEAN, STD))
    return mean, std


def normalize_pixels(images: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) -> float32, normalized."""
    return normalize(images.float() / 255)
