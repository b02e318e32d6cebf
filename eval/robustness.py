"""Perturbations of test images and of what a network makes of them.

Those of LGP (docs/methods.md section 1): patch shuffle, token shuffle, band shuffle. Image functions take and return
batches (B, C, H, W) of any range; random numbers come from a generator on the CPU.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.ssl.backbones.lgp import LGPPatchEmbed, bands_permuted
from nearfar.ssl.backbones.tokens import check_divides
from nearfar.ssl.errors import UserError


def shuffle_patches(images: Tensor, patch_size: int, generator: torch.Generator) -> Tensor:
    """The images with their patches in another order, each image in its own. Sides are multiples of patch_size."""
    height, width = images.shape[-2:]
    check_divides(height, width, patch_size)
    patches = F.unfold(images, patch_size, stride=patch_size)
    order = _orders(len(images), patches.shape[2], generator).to(images.device)
    shuffled = patches.gather(2, order[:, None].expand_as(patches))
    return F.fold(shuffled, (height, width), patch_size, stride=patch_size)


@contextmanager
def tokens_shuffled(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Within this context the patch embedding's tokens reach the network in another order, each image's in its own.

    Positions that are added afterwards stay where they are, as for a patch at a wrong place. Raises UserError for
    a network whose patch embedding does not make a sequence of tokens.
    """
    embeds = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "patch_embed"]
    if len(embeds) != 1:
        raise UserError(f"Token shuffle needs a network with one patch embedding; this one has {len(embeds)}.")

    def shuffle(_: nn.Module, __: Any, tokens: Tensor) -> Tensor:
        if tokens.ndim != 3:
            raise UserError("Token shuffle needs a patch embedding that makes a sequence of tokens, not a feature map.")
        order = _orders(tokens.shape[0], tokens.shape[1], generator).to(tokens.device)
        return tokens.gather(1, order[..., None].expand_as(tokens))

    handle = embeds[0].register_forward_hook(shuffle)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def bands_shuffled(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Within this context LGP's wavelet sub-bands reach their projection in another order, the same for all images."""
    embeds = [module for module in model.modules() if isinstance(module, LGPPatchEmbed)]
    bands = 4 ** embeds[0].levels if embeds else 1
    with bands_permuted(model, torch.randperm(bands, generator=generator)):
        yield


def at_resolution(images: Tensor, side: int) -> Tensor:
    """Square images resized to `side` (bicubic, antialiased): what a network sees that runs at another size."""
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True, align_corners=False)


def coarsened(images: Tensor, factor: float) -> Tensor:
    """Images shrunk by `factor` and enlarged again to their size: they lose detail and keep their size."""
    size = images.shape[-2:]
    small = [max(1, round(side / factor)) for side in size]
    reduced = F.interpolate(images, size=small, mode="bicubic", antialias=True, align_corners=False)
    return F.interpolate(reduced, size=size, mode="bicubic", antialias=True, align_corners=False)


def flipped(images: Tensor, *, vertical: bool = False) -> Tensor:
    """Left and right exchanged, or top and bottom."""
    return images.flip(-2 if vertical else -1)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `sigma` pixels, cut at 3 sigma, edges repeated."""
    if not sigma > 0:
        raise UserError(f"The width of a blur must be positive, not {sigma}.")
    radius = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=images.device) / sigma) ** 2)
    kernel = (taps / taps.sum()).to(images.dtype)
    planes = F.pad(images.flatten(0, 1)[:, None], [radius] * 4, mode="replicate")
    planes = F.conv2d(F.conv2d(planes, kernel[None, None, None]), kernel[None, None, :, None])
    return planes.view_as(images)


def _orders(images: int, tokens: int, generator: torch.Generator) -> Tensor:
    """(images, tokens): a random order for each image."""
    return torch.rand(images, tokens, generator=generator).argsort(dim=1)
