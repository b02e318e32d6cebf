"""Pixels -> what backbones are given: ImageNet's mean 0 and standard deviation 1 in each channel."""

from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalize(images: Tensor) -> Tensor:
    """(..., 3, H, W) in [0, 1] -> ImageNet's mean 0 and standard deviation 1 in each channel."""
    mean, std = images.new_tensor(MEAN), images.new_tensor(STD)
    return (images - mean[:, None, None]) / std[:, None, None]


def normalize_pixels(images: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) -> float32, normalized."""
    return normalize(images.float() / 255)
