"""The colour half of a view, on a batch, on its device: jitter, grey, blur, solarise (METHODS section 5).

Each operation equals torchvision.transforms.functional on float images, with one factor per sample. Samples are grouped
by what they need, so that an operation costs nothing where it is not due.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nearfar.ssl.views import ViewPlan

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, the digits torchvision uses
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)  # the numbering of ViewPlan.factors and .order


@dataclass(frozen=True)
class Colour:
    """Colour parameters of N images: the fields of ViewPlan of the same name, as tensors on the CPU."""

    jitter: Tensor  # bool (N,)
    factors: Tensor  # float32 (N, 4)
    order: Tensor  # uint8 (N, 4)
    grey: Tensor  # bool (N,)
    sigma: Tensor  # float32 (N,)
    solarise: Tensor  # bool (N,)


def colour_of(plan: ViewPlan, views: slice) -> Colour:
    """The parameters of some views, view by view, as in `batch.groups[g].flatten(0, 1)`."""

    def flat(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array[:, views].swapaxes(0, 1))).flatten(0, 1)

    return Colour(*(flat(x) for x in (plan.jitter, plan.factors, plan.order, plan.grey, plan.sigma, plan.solarise)))


def normalise(images: Tensor) -> Tensor:
    """(..., 3, H, W) in [0, 1] -> ImageNet's mean 0 and standard deviation 1 in each channel."""
    mean, std = images.new_tensor(MEAN), images.new_tensor(STD)
    return (images - mean[:, None, None]) / std[:, None, None]


def colour(images: Tensor, plan: Colour, threshold: int = 128) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 (N, 3, H, W) in [0, 1], jittered in the planned order, greyed, blurred, solarised.

    threshold: the grey level (0..255) from which solarising inverts.
    """
    x = images.to(torch.float32).mul_(1 / 255)
    for place in range(4):
        for op in range(4):
            chosen = plan.jitter & (plan.order[:, place] == op)
            _update(
                x,
                chosen,
                lambda part, which, op=op: _adjust(part, op, plan.factors[which, op].to(part.device)),
            )
    _update(x, plan.grey, lambda part, _: grey(part).expand_as(part))
    _update(x, plan.sigma > 0, lambda part, which: blur(part, plan.sigma[which].to(part.device)))
    _update(x, plan.solarise, lambda part, _: torch.where(part >= threshold / 255, 1 - part, part))
    return x


def _update(x, chosen, change):
    which = chosen.nonzero()[:, 0]
    if len(which):
        there = which.to(x.device)
        x[there] = change(x[there], which)


def _adjust(x: Tensor, op: int, factor: Tensor) -> Tensor:
    if op == _HUE:
        return shift_hue(x, factor)
    factor = factor[:, None, None, None]
    if op == _BRIGHTNESS:
        return (x * factor).clamp_(0, 1)
    other = grey(x)
    if op == _CONTRAST:
        other = other.mean((1, 2, 3), keepdim=True)
    return torch.lerp(other.expand_as(x), x, factor).clamp_(0, 1)


def grey(x: Tensor) -> Tensor:
    """(N, 3, H, W) -> luma (N, 1, H, W)."""
    return (x[:, :1] * _LUMA[0]).add_(x[:, 1:2], alpha=_LUMA[1]).add_(x[:, 2:], alpha=_LUMA[2])


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of (N, 3, H, W) by (N,) turns within +-0.5, through HSV but without its divisions.

    With value V, chroma C and hue H in sixths of a turn, a channel is V - C * clip(|d - 3| - 1, 0, 1), where d is the
    distance of H + shift from 0 and the shift holds the rotation and the channel's own place (5, 3, 1; minus 2). All of
    it times C needs neither H = .../C nor a special case for grey.
    """
    red, green, blue = x.unbind(1)
    value, index = x.max(1)
    chroma = value - x.amin(1)
    hue = torch.where(
        index == 0, green - blue, torch.where(index == 1, blue - red + 2 * chroma, red - green + 4 * chroma)
    )
    place = torch.tensor([3.0, 1.0, -1.0], device=x.device)
    shift = torch.remainder(turns[:, None] * 6 + place + 5, 6) - 5  # with H in [-1, 5]: within a turn of 0
    chroma, value = chroma[:, None], value[:, None]
    distance = (hue[:, None] + chroma * shift[:, :, None, None]).abs_()
    fall = distance.sub_(chroma, alpha=3).abs_().sub_(chroma)
    return value - torch.minimum(fall.clamp_(min=0), chroma)


def blur(x: Tensor, sigma: Tensor, reach: float = 3.0) -> Tensor:
    """Gaussian blur of (N, 3, H, W) with one sigma a sample, cut at `reach` times the largest, borders reflected."""
    radius = min(math.ceil(reach * float(sigma.max())), min(x.shape[-2:]) - 1)
    taps = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    weight = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    weight = weight / weight.sum(1, keepdim=True)
    rows, columns = _band(weight, x.shape[-2]), _band(weight, x.shape[-1])
    return rows[:, None] @ x @ columns[:, None].mT


def _band(weight: Tensor, n: int) -> Tensor:
    """(N, 2r+1) taps -> (N, n, n) matrices that convolve n pixels with reflected borders."""
    radius = weight.shape[1] // 2
    source = (torch.arange(n)[:, None] + torch.arange(-radius, radius + 1)).abs()
    source = torch.where(source >= n, 2 * (n - 1) - source, source)
    select = F.one_hot(source, n).to(weight).transpose(0, 1).flatten(1)  # (2r+1, n*n)
    return (weight @ select).unflatten(1, (n, n))
