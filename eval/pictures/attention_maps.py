"""Where a network looks: attention on the picture itself, thresholded to mass, and how far each layer looks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import nearfar.ssl.backbones  # noqa: F401  # isort: skip  (its repair of torchvision comes before timm)
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image
from timm.layers import Attention as TimmAttention
from timm.layers import AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from nearfar.ssl.backbones import Backbone, GaugBias
from nearfar.ssl.backbones.timm_grafts import attention_weights, split_heads
from nearfar.ssl.backbones.vit import Attention
from nearfar.ssl.errors import UserError

MARGIN = 2  # patches
OFFSET_LOCAL = 0.3  # of the attention between patches, at one fixed offset, makes a head offset-local
MASS = 0.6  # of the attention, inside the marked region: DINO, Caron et al. 2021, Figures 1 and 10
_PLAIN = (Attention, TimmAttention, AttentionRope, EvaAttention)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients within this context; the model's own mode afterwards."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


def mirrored(images: Tensor, patch_size: int) -> tuple[Tensor, slice]:
    """Images continued by their mirror image for `MARGIN` patches on each side, and the rows (and columns) of patches
    that are inside: what a convolution makes of the nothing beyond a border outshines what is in the picture.

    Images too small to be mirrored stay as they are.
    """
    margin = MARGIN * patch_size
    if min(images.shape[-2:]) <= margin:
        return images, slice(None)
    return F.pad(images, (margin,) * 4, mode="reflect"), slice(MARGIN, -MARGIN)


def attention_maps(backbone: Backbone, images: Tensor) -> NDArray[np.float32]:
    """What CLS attends to in the last block, the mean over its heads: (n, h, w), each map with sum 1.

    The mean over the patches as queries where a network has no CLS. Images are `mirrored`, and the margin left out.

    Args:
        images: (n, 3, H, W), ImageNet-normalized.

    Raises:
        UserError: the network has no global attention to show.
    """
    padded, inner = mirrored(images, backbone.patch_size)
    with evaluating(backbone):
        attention = backbone.attention(padded).float().mean(1)
        h, w = backbone.blocks(padded[:1], 1)[-1].grid
    prefix = attention.shape[-1] - h * w
    queries = attention[:, :1] if prefix else attention
    maps = queries.mean(1)[:, prefix:].unflatten(1, (h, w))[:, inner, inner]
    maps = maps / maps.sum((1, 2), keepdim=True)
    return np.asarray(maps.cpu().numpy(), np.float32)


def holding(values: NDArray[Any], mass: float = MASS) -> NDArray[np.bool_]:
    """The fewest places that hold this share of the sum of all values (any shape, not negative)."""
    order = np.argsort(-values, axis=None, kind="stable")
    sums = np.cumsum(values.reshape(-1)[order], dtype=np.float64)
    count = int(np.searchsorted(sums, mass * sums[-1] * (1 - 1e-12))) + 1
    kept = np.zeros(values.size, bool)
    kept[order[:count]] = True
    return kept.reshape(values.shape)


def spotlight(picture: Image.Image, values: NDArray[Any], mass: float = MASS) -> Image.Image:
    """The picture in color where the values (h, w) hold this share of their sum, gray and dim elsewhere, with an edge.

    Values are enlarged bilinearly to the size of the picture before they are thresholded.
    """
    size = picture.size
    large = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    inside = holding(large.clip(0), mass)
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    gray = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    dim = np.repeat((0.38 * gray + 14)[..., None], 3, 2)
    shown = np.where(inside[..., None], pixels, dim)
    shown[_edge(inside, max(1, min(size) // 200))] = (255, 170, 40)
    return Image.fromarray(shown.clip(0, 255).astype(np.uint8))


def heated(picture: Image.Image, values: NDArray[Any]) -> Image.Image:
    """The picture, gray and dim, under a glow where values (h, w) exceed an even share."""
    excess = (values / values.mean() - 1).clip(0)
    large = np.asarray(Image.fromarray(excess.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC))
    strength = (large / max(float(np.percentile(large, 99.5)), 1e-12)).clip(0, 1)[..., None]
    gray = np.asarray(picture.convert("L"), np.float32)[..., None]
    shown = (1 - strength) * (0.55 * gray + 10) + strength * 255 * colormaps["inferno"](0.35 + 0.6 * strength[..., 0])[
        ..., :3
    ]
    return Image.fromarray(shown.clip(0, 255).astype(np.uint8))


def _edge(inside: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """The places outside within `width` of the inside (along rows and columns)."""
    grown = inside.copy()
    for _ in range(width):
        wide = grown.copy()
        wide[1:] |= grown[:-1]
        wide[:-1] |= grown[1:]
        wide[:, 1:] |= grown[:, :-1]
        wide[:, :-1] |= grown[:, 1:]
        grown = wide
    return grown & ~inside


# --- layer by layer --------------------------------------------------------------------------------------------


class LayerLook(NamedTuple):
    """How one layer looks, a number for each head.

    distance: mean distance in pixels from a patch to the patches it attends to. offset_share: the largest share of the
    attention between patches that goes to one fixed offset. offset: that one, rows and columns. std, strength: of
    GAug's windows, the learned standard deviation in patches (down, across) and the bias at the query itself, each the
    mean over queries and heads; None without GAug.
    """

    distance: list[float]
    offset_share: list[float]
    offset: list[tuple[int, int]]
    std: tuple[float, float] | None
    strength: float | None


def looks(backbone: Backbone, images: Tensor) -> list[LayerLook]:
    """How far each layer looks (Raghu et al. 2021, Figure 3), its offset-local heads, and what GAug has learned.

    Args:
        images: (n, 3, H, W), ImageNet-normalized; a few dozen give steady means.

    Raises:
        UserError: no block of the network has plain global attention.
    """
    modules = [module for module in backbone.modules() if isinstance(module, _PLAIN)]
    if not modules:
        raise UserError(
            f"{backbone.arch['name']} has no plain global attention, so there are no distances and no heads to show."
        )
    found: dict[nn.Module, LayerLook] = {}
    grid: tuple[int, int]

    def look(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        found[module] = _look(module, args, options, grid, backbone.patch_size)

    with evaluating(backbone):
        grid = backbone.blocks(images[:1], 1)[-1].grid
        hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in modules]
        try:
            backbone.blocks(images, 1)
        finally:
            for hook in hooks:
                hook.remove()
    return [found[module] for module in modules if module in found]


def _look(
    module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], grid: tuple[int, int], patch_size: int
) -> LayerLook:
    x = args[0]
    if isinstance(module, Attention):
        weights, queries = module.weights(*args, **options), module.queries(x)
    else:
        rope = options.get("rope", args[1] if len(args) > 1 else None)
        weights, queries = attention_weights(module, x, rope), split_heads(module, x, rope)[0]
    patches = grid[0] * grid[1]
    between = weights[:, :, -patches:, -patches:].mean(0)  # (heads, h*w, h*w): the mean over images
    between = between / between.sum(-1, keepdim=True)
    apart = _distances(grid).to(between)
    distance = (between * apart).sum(-1).mean(-1) * patch_size
    share, offset = _best_offset(between, grid)
    std, strength = None, None
    if isinstance(gaug := getattr(module, "gaug", None), GaugBias):
        variance, alpha = gaug.windows(queries[:, :, -patches:], grid)
        down, across = variance.sqrt().mean((0, 1, 2)).tolist()
        std, strength = (down, across), float(alpha.mean())
    return LayerLook(distance.tolist(), share, offset, std, strength)


def _distances(grid: tuple[int, int]) -> Tensor:
    """Euclidean distances between the patches of a grid, in patches: (h*w, h*w)."""
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grid), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], 1)
    return torch.cdist(places, places)


def _best_offset(between: Tensor, grid: tuple[int, int]) -> tuple[list[float], list[tuple[int, int]]]:
    """For each head of (heads, h*w, h*w) the offset that gets the largest share of a query's attention, over the
    queries for which it lies on the grid: at least half of them, so that no corner decides."""
    h, w = grid
    table = between.view(-1, h, w, h, w)
    best = [(-math.inf, (0, 0))] * len(table)
    for down in range(-(h // 2), h // 2 + 1):
        for across in range(-(w // 2), w // 2 + 1):
            rows, columns = (
                torch.arange(max(0, -down), min(h, h - down)),
                torch.arange(max(0, -across), min(w, w - across)),
            )
            if 2 * len(rows) * len(columns) < h * w:
                continue
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            share = table[:, y, x, y + down, x + across].mean((1, 2)).tolist()
            best = [max(old, (new, (down, across))) for old, new in zip(best, share, strict=True)]
    return [share for share, _ in best], [offset for _, offset in best]
