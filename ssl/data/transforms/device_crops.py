"""Crop, resize and flip on any device: the views of images that are already there, all of one size.

Resizing is linear, so a view is two matrix products, `down @ image @ across`, with Pillow's weights in the matrices and
zeros outside the crop; between them values are rounded to 8 bits, as Pillow does. Sums are in float32, so that a value
near the middle between two gray levels may be rounded to the other.
"""

import numpy as np
import torch
from torch import Tensor

from nearfar.ssl.data.transforms.crops import VERTICAL_MAY_BE_FIRST
from nearfar.ssl.data.views import ViewPlan

_PART = 2**26  # elements of a weight matrix made at a time


def render_on_device(images: Tensor, plan: ViewPlan, size: int) -> Tensor:
    """As `crops.render`: uint8 images (n, 3, H, W) on any device, a plan of V views -> uint8 (V, n, 3, size, size)."""
    n, count = plan.flip.shape
    height, width = images.shape[-2:]
    out = torch.empty(count, n, 3, size, size, dtype=torch.uint8, device=images.device)
    step = max(1, _PART // (size * max(height, width)))
    for v in range(count):
        for begin in range(0, n, step):
            part = slice(begin, begin + step)
            out[v, part] = _render(images[part], plan.box[part, v], plan.flip[part, v], size)
    return out


def _render(images: Tensor, box: np.ndarray, flip: np.ndarray, size: int) -> Tensor:
    height, width = images.shape[-2:]
    top, left, h, w = copied_to_device(box.astype(np.int64), images.device).unbind(1)
    across = weights(left, w, size, width)  # (n, size, W)
    mirrored = copied_to_device(flip, images.device)
    across = torch.where(mirrored[:, None, None], across.flip(1), across)[:, None].transpose(2, 3)  # (n, 1, W, size)
    down = weights(top, h, size, height)[:, None]  # (n, 1, size, H)
    tall = (box[:, 2] - size > 2 * (box[:, 3] - size).clip(min=0)) & VERTICAL_MAY_BE_FIRST
    out = torch.empty(len(images), 3, size, size, dtype=torch.uint8, device=images.device)
    for vertical_first in (False, True):
        places = np.flatnonzero(tall == vertical_first)  # on the host, which waits for nothing
        if len(places):
            which = copied_to_device(places, images.device)
            x = images[which].float()
            if vertical_first:
                x = _rounded(down[which] @ x) @ across[which]
            else:
                x = down[which] @ _rounded(x @ across[which])
            out[which] = _rounded(x).to(torch.uint8)
    return out


def copied_to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on a device, which a GPU makes when it gets to it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _rounded(x: Tensor) -> Tensor:
    """To 8 bits, halves upwards."""
    return x.add_(0.5).floor_().clamp_(0, 255)


def weights(begin: Tensor, length: Tensor, size: int, whole: int) -> Tensor:
    """Pillow's bicubic weights of n crops begin:begin+length (n,) of `whole` pixels -> float32 (n, size, whole)."""
    scale = length.double()[:, None] / size  # (n, 1)
    wide = scale.clamp(min=1)
    center = (torch.arange(size, device=begin.device) + 0.5) * scale  # (n, size)
    low = (center - 2 * wide + 0.5).trunc().clamp(min=0)
    high = torch.minimum((center + 2 * wide + 0.5).trunc(), length[:, None].double())
    index = torch.arange(whole, device=begin.device) - begin[:, None, None]  # (n, 1, whole), within the crop
    x = ((index - center.float()[..., None] + 0.5) / wide.float()[..., None]).abs()
    near = ((1.5 * x - 2.5) * x).mul_(x).add_(1)
    far = ((x - 5) * x).add_(8).mul_(x).sub_(4).mul_(-0.5)
    value = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    value *= (index >= low[..., None]) & (index < high[..., None])
    return value.div_(value.sum(-1, keepdim=True))
