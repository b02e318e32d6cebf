"""The color half of a view, on a batch, on its device: jitter, gray, blur, solarize (docs/methods.md section 5).

Each operation equals torchvision.transforms.functional on float images, with one factor per sample, but the blur, which
has the taps of Pillow's. Samples are grouped
by what they need: an operation costs nothing where it is not in the plan. On a GPU, which would wait for that and for
every launch, Triton's kernels do the same (triton_colors.py) where Triton works: it comes with torch for CUDA, and
needs a C compiler.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nearfar.ssl.data.loaders.base import Batch
from nearfar.ssl.data.views import ViewPlan

log = logging.getLogger(__name__)
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, the digits torchvision uses
_CACHE = 2**21  # bytes of images worked on at a time on a CPU: some forty passes that should stay in its cache


@dataclass(frozen=True)
class Color:
    """Color parameters of N images: the fields of ViewPlan of the same name, as tensors on the CPU."""

    jitter: Tensor  # bool (N,)
    factors: Tensor  # float32 (N, 4)
    order: Tensor  # uint8 (N, 4)
    gray: Tensor  # bool (N,)
    sigma: Tensor  # float32 (N,)
    solarize: Tensor  # bool (N,)
    solarize_threshold: int = 128

    def __getitem__(self, part: slice) -> "Color":
        parts: dict[str, Any] = {name: x[part] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **parts)


def color_of(plan: ViewPlan, views: slice) -> Color:
    """The parameters of some views, view by view, as in `batch.groups[g].flatten(0, 1)`."""

    def flat(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array[:, views].swapaxes(0, 1))).flatten(0, 1)

    return Color(
        flat(plan.jitter),
        flat(plan.factors),
        flat(plan.order),
        flat(plan.gray),
        flat(plan.sigma),
        flat(plan.solarize),
        plan.solarize_threshold,
    )


def color_views(batch: Batch, device: torch.device) -> list[Tensor]:
    """The color half of every view, on `device`: uint8 groups -> float (G, B, 3, s, s) within [0, 1]."""
    groups = [group.to(device, non_blocking=True) for group in batch.groups]
    if batch.colored:
        return [group / 255 for group in groups]
    by_kernels = device.type == "cuda" and not kernels_missing(device)
    colored, first = [], 0
    for group in groups:
        plan = color_of(batch.plan, slice(first, first + len(group)))
        images = group.flatten(0, 1)
        colored.append((color_by_kernels if by_kernels else color)(images, plan).unflatten(0, group.shape[:2]))
        first += len(group)
    return colored


def pack(plan: Color, radius: int) -> Tensor:
    """The color parameters of N images as one float32 array, which triton_colors.py reads.

    Its 13 + radius columns are the factors, the order, jitter, gray, sigma, solarize, and the taps of the blur.
    """
    flags = [plan.jitter, plan.gray, plan.sigma, plan.solarize]
    columns = [plan.factors, plan.order, *(flag[:, None] for flag in flags), blur_taps(plan.sigma, radius)]
    return torch.cat([column.float() for column in columns], 1)


def color_by_kernels(images: Tensor, plan: Color) -> Tensor:
    """As `color`, by Triton's kernels on a GPU. The host waits for nothing: the plan is copied in one piece."""
    from nearfar.ssl.data.transforms.triton_colors import color_batch

    packed = pack(plan, min(blur_reach(plan.sigma), min(images.shape[-2:]) - 1))
    if images.is_cuda:
        packed = packed.pin_memory().to(images.device, non_blocking=True)
    return color_batch(images.contiguous(), packed, plan.solarize_threshold)


@lru_cache(maxsize=8)
def kernels_missing(device: torch.device) -> str:
    """Why Triton's kernels cannot change colors on this GPU, "" if they can: tried once, with one small image."""
    one = torch.ones(1)
    plan = Color(one.bool(), one.expand(1, 4), torch.arange(4)[None], one.bool(), one, one.bool(), 128)
    try:
        color_by_kernels(torch.zeros(1, 3, 4, 4, dtype=torch.uint8, device=device), plan).sum().item()
    except Exception as error:  # no Triton, no C compiler, a GPU that is too old: each its own exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        log.warning("colors are changed operation by operation, slower: Triton does not work here (%s)", reason)
        return reason
    return ""


def color(images: Tensor, plan: Color) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 in [0, 1]: jittered in the planned order, grayed, blurred, solarized."""
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    step = max(1, _CACHE // (4 * images[0].numel())) if images.device.type == "cpu" and len(images) else len(images)
    for begin in range(0, len(images), step or 1):
        part = slice(begin, begin + step)
        _color(torch.div(images[part], 255, out=out[part]), plan[part])
    return out


def _color(x: Tensor, plan: Color) -> None:
    for position in range(4):
        for op, adjust in enumerate((_brightness, _contrast, _saturation, shift_hue)):
            chosen = plan.jitter & (plan.order[:, position] == op)
            _update(x, chosen, adjust, plan.factors[:, op])
    _update(x, plan.gray, lambda part: gray(part).expand_as(part))
    _update(x, plan.sigma > 0, blur, plan.sigma)
    _update(x, plan.solarize, lambda part: torch.where(part >= plan.solarize_threshold / 255, 1 - part, part))


def _update(x: Tensor, chosen: Tensor, change: Callable[..., Tensor], *values: Tensor) -> None:
    """Change the chosen samples of x in place; `change` owns the copy it gets, beside the chosen of the values."""
    which = chosen.nonzero()[:, 0]
    if len(which):
        there = which.to(x.device)
        x.index_copy_(0, there, change(x.index_select(0, there), *(value[which].to(x.device) for value in values)))


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor[:, None, None, None]).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = gray(x).flatten(1).mean(1) * (1 - factor)
    return x.mul_(factor[:, None, None, None]).add_(mean[:, None, None, None]).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    factor = factor[:, None, None, None]
    other = gray(x).mul_(1 - factor)
    return x.mul_(factor).add_(other).clamp_(0, 1)


def gray(x: Tensor) -> Tensor:
    """(N, 3, H, W) -> luma (N, 1, H, W)."""
    return (x[:, :1] * _LUMA[0]).add_(x[:, 1:2], alpha=_LUMA[1]).add_(x[:, 2:], alpha=_LUMA[2])


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of (N, 3, H, W) by (N,) turns within +-0.5, through HSV but without its divisions.

    With value V, chroma C and hue H in sixths of a turn, a channel is V - C * clip(|d - 3| - 1, 0, 1), where d is the
    distance of H + shift from 0 and the shift holds the rotation and the channel's offset (5, 3, 1; minus 2). All of
    it times C needs neither H = .../C nor a special case for gray.
    """
    red, green, blue = x.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - low
    from_green = (blue - red).add_(chroma, alpha=2)
    from_blue = (red - green).add_(chroma, alpha=4)
    hue = torch.where(red == value, green - blue, torch.where(green == value, from_green, from_blue))  # C * H
    offset = torch.tensor([3.0, 1.0, -1.0], device=x.device)
    shift = torch.remainder(turns[:, None] * 6 + offset + 5, 6) - 5  # with H in [-1, 5]: within a turn of 0
    distance = torch.addcmul(hue[:, None], chroma[:, None], shift[:, :, None, None]).abs_()
    out = distance.sub_(chroma[:, None], alpha=3).abs_()
    torch.sub((value + chroma)[:, None], out, out=out)
    return torch.minimum(torch.maximum(out, low[:, None], out=out), value[:, None], out=out)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Pillow's `GaussianBlur` of (N, 3, H, W) with one sigma (N,) a sample, not rounded to 8 bits; borders reflected.

    Separable, one addition for each pair of taps: on CPUs faster than grouped convolutions and band matrices.
    """
    radius = min(blur_reach(sigma), min(x.shape[-2:]) - 1)  # reflection cannot reach farther
    weight = blur_taps(sigma, radius).to(x.dtype)[:, :, None, None, None]
    for axis, pad in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        size = x.shape[axis]
        wide = F.pad(x, pad, mode="reflect")
        x = wide.narrow(axis, radius, size) * weight[:, 0]
        for r in range(1, radius + 1):
            x.addcmul_(wide.narrow(axis, radius - r, size) + wide.narrow(axis, radius + r, size), weight[:, r])
    return x


def blur_reach(sigma: Tensor) -> int:
    """The largest distance, in pixels, from which any of these blurs takes something: 3 for a sigma below 1.41."""
    whole, _ = _extended_box(sigma.max() if len(sigma) else sigma.new_zeros(()))
    return 3 * (int(whole) + 1)


def blur_taps(sigma: Tensor, radius: int) -> Tensor:
    """Weights of the pixels 0 ... radius away, (N, radius + 1) in float64, for sigmas (N,); 0 leaves the image as is.

    As Pillow's GaussianBlur: three times a box of length 2 (l + a) + 1 whose end pixels count a, of the variance
    sigma^2 / 3 (Gwosdek et al., *Theoretical Foundations of Gaussian Convolution by Extended Box Filtering*, 2011). A
    Gaussian sampled at the pixels, as torchvision's, has lost most of that variance at a sigma of .3.
    """
    whole, part = (value[:, None] for value in _extended_box(sigma))
    side = blur_reach(sigma) // 3
    distance = torch.arange(-side, side + 1, device=sigma.device).abs()
    box = (distance <= whole).double() + part * (distance == whole + 1)
    once = F.pad(box, (2 * side, 2 * side))  # (N, 6 side + 1), the middle at 3 side
    for _ in range(2):
        shifted = F.pad(once, (side, side)).unfold(1, 2 * side + 1, 1)
        once = (shifted * box[:, None]).sum(2)
    taps = F.pad(once[:, 3 * side :], (0, max(0, radius - 3 * side)))[:, : radius + 1]
    return taps / (2 * taps.sum(1, keepdim=True) - taps[:, :1])  # the middle tap counts once


def _extended_box(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """l and a of `blur_taps`, in float64."""
    variance = sigma.double() ** 2 / 3
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    rest = whole + 1
    return whole, (2 * whole + 1) * (whole * rest - 3 * variance) / (6 * (variance - rest**2))
