"""timm's interface for a model of one width: a sequence of tokens through `blocks`, then `norm`, then `head`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import FeatureInfo, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nearfar.ssl.backbones.tokens import without_autocast
from nearfar.ssl.errors import UserError

Grid = tuple[int, int]


class TokenModel(nn.Module):
    """What our models share. A subclass sets the attributes below and writes `run` and `forward_features`."""

    blocks: nn.ModuleList
    norm: nn.Module
    mask_token: nn.Parameter | None
    embed_dim: int
    patch_size: int
    grid_size: Grid
    num_prefix_tokens: int
    feature_info: list[dict[str, Any]]
    grad_checkpointing = False
    compiled: Callable[..., Tensor] | None = None  # what a block computes, compiled by `nearfar.ssl.learning.compiled`

    def run(
        self, images: Tensor, keep: Sequence[int] = (), masks: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Grid]:
        """Tokens (B, prefix + h*w, D), prefix first, after the last block and after those in `keep`; and the grid.

        No norm and no PRR. `masks`: see `hide`.
        """
        raise NotImplementedError

    def through(self, block: nn.Module, *inputs: Any) -> Tensor:
        """One block; in training mode compiled and computed again in the backward pass, where these are switched on.

        What scores and pictures read is never compiled: their images come in other numbers and sizes.
        """
        run = partial(block, compiled=self.compiled) if self.compiled and self.training else block
        if self.grad_checkpointing and self.training:
            y: Tensor = checkpoint(run, *inputs, use_reentrant=False)  # drop-path draws the same numbers again
            return y
        out: Tensor = run(*inputs)
        return out

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images to tokens (B, prefix + h*w, D), prefix first, after the final norm and after PRR when it is on."""
        raise NotImplementedError

    def hide(self, patches: Tensor, masks: Tensor | None) -> Tensor:
        """Embedded patches (B, h*w, D), before any position, with the mask token where `masks` (B, h*w) is true."""
        if masks is None:
            return patches
        if self.mask_token is None:
            raise ValueError("patches cannot be hidden: the network was made without mask_token=True")
        return torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's interface: which parameters belong to the stem, to each block and to what follows the last one."""
        stem = r"^(?:cls_token|reg_token|mask_token|pos_embed|patch_embed)"
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(1)
        elif self.global_pool == "all":
            x = (x[:, 0] + x[:, self.num_prefix_tokens :].sum(1)) / (x.shape[1] - self.num_prefix_tokens + 1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's interface: outputs of the last n blocks (int), of all (None), or of those listed. PRR never applies.

        `stop_early` is accepted for timm's sake and changes nothing in the result.
        """
        depth = len(self.blocks)
        if isinstance(indices, int):
            indices = range(depth - indices, depth)
        keep = range(depth) if indices is None else [index % depth for index in indices]
        last, kept, grid = self.run(x, keep)
        kept = [self.norm(y) for y in kept] if norm else kept
        split = self.num_prefix_tokens
        patches = [y[:, split:] for y in kept]
        if output_fmt == "NCHW":
            patches = [y.transpose(1, 2).unflatten(2, grid) for y in patches]
        out: Any = patches
        if return_prefix_tokens:
            out = list(zip(patches, [y[:, :split] for y in kept], strict=True))
        return out if intermediates_only else (self.norm(last), out)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's interface: drop the blocks after the last of `indices`, and the head; returns `indices` from 0."""
        depth = len(self.blocks)
        selected = range(depth - indices, depth) if isinstance(indices, int) else indices
        keep = [index % depth for index in selected]
        self.blocks = self.blocks[: max(keep) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return keep

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes` (0: none, features come out); "" as pooling keeps all tokens."""
        if global_pool is not None:
            if global_pool not in ("", "token", "avg", "all"):
                raise UserError(f"There is no pooling {global_pool!r}; choose token, avg or all.")
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = head = nn.Linear(self.embed_dim, num_classes)
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """timm's interface: what `decays` leaves out and, as in timm's own ViTs, learned tokens and positions."""
        tokens = {"pos_embed", "cls_token", "reg_token", "mask_token"}
        return {name for name, p in self.named_parameters() if name in tokens or not decays(name, p)}


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter, by DINO's rule: to matrices and kernels, tokens and positions.

    Not to biases and other tensors of at most one dimension, nor to the decay rates of a state-space model (`A_log`).
    """
    return parameter.ndim > 1 and not name.endswith((".bias", "_log"))


def drawn_scale(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """What timm's DropPath multiplies a branch of `x` (B, ...) by, (B, 1, ..): the same draws in the same type.

    0 for the samples that skip the branch, 1 / keep for the others; None where no sample does. Drawn by itself it is an
    input of the block, whose probability a compiled graph would otherwise hold as a constant: one graph a block.
    """
    if not (isinstance(drop_path, DropPath) and drop_path.training and drop_path.drop_prob):
        return None
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    keep = 1 - drop_path.drop_prob
    scale = torch.empty((x.shape[0],) + (1,) * (x.ndim - 1), dtype=dtype, device=x.device).bernoulli_(keep)
    return scale.div_(keep)


def add_scaled(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    return x + (branch if scale is None else branch * scale)


class FeatureMaps(nn.Module):
    """timm's `features_only`: images to the feature maps of blocks, [(B, D, h, w), ...]; `feature_info` says which.

    Args:
        out_indices: the last n blocks (int), or those listed.
        output_fmt: "NCHW" or "NHWC".
        norm: apply the final norm to each.
    """

    def __init__(
        self, model: TokenModel, out_indices: int | Sequence[int], output_fmt: str = "NCHW", norm: bool = False
    ) -> None:
        super().__init__()
        keep = model.prune_intermediate_layers(out_indices, prune_norm=not norm)
        self.model = model
        self.feature_info = FeatureInfo(model.feature_info, tuple(keep))
        self.output_fmt, self.norm = output_fmt, norm

    def forward(self, images: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.model.forward_intermediates(
            images, self.feature_info.out_indices, norm=self.norm, output_fmt=self.output_fmt, intermediates_only=True
        )
        return maps


def resize_positions(positions: Tensor, made_for: Grid, grid: Grid, antialias: bool = False) -> Tensor:
    """Position embeddings of patches (1, h*w, D), from the grid they were made for to another, bicubic.

    By default as DINO and DINOv2 do it: no antialiasing, and each side scaled by (n + .1) / n0, whose .1 was added
    against rounding and moves every sampling point. `antialias`: as timm, and DINOv2 with registers, do it, exactly to
    the size. In a graph that is exported for every size both happen in it, where the size is the table's own or not.
    """
    known = all(isinstance(side, int) for side in grid)  # and no symbols of such a graph
    if known and grid == made_for:
        return positions
    # Two products: bicubic's own backward does not compile for sizes that vary (torch 2.13).
    make = _antialiased if antialias else _bicubic
    with without_autocast(positions.device.type):
        down, across = (make(*sides, positions) for sides in zip(made_for, grid, strict=True))
        if not known:
            down, across = _unchanged_at(made_for, grid, down, across)
        return torch.einsum("yh,xw,bhwd->byxd", down, across, positions.unflatten(1, made_for)).flatten(1, 2)


def _unchanged_at(made_for: Grid, grid: Grid, down: Tensor, across: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices of a resampling, or those that change nothing where both sides are what the table was made for."""
    sides = list(zip(made_for, grid, strict=True))
    same = torch.stack([torch.scalar_tensor(new, dtype=torch.int64) == old for old, new in sides]).all()
    identities = [(torch.arange(new)[:, None] == torch.arange(old)).to(down) for old, new in sides]
    return torch.where(same, identities[0], down), torch.where(same, identities[1], across)


SHARPNESS = -0.75  # of Keys' cubic convolution (1981), in torch as in OpenCV


@torch.no_grad()
def _bicubic(old: int, new: int, like: Tensor) -> Tensor:
    """Plain bicubic sampling at DINO's points, as a (new, old) matrix; beyond the border the last value is repeated."""
    points = torch.arange(new, device=like.device, dtype=torch.float64)
    points = (points + 0.5) * (old / (new + 0.1)) - 0.5
    left = points.floor()
    matrix = points.new_zeros(new, old)
    for tap in (-1, 0, 1, 2):
        index = left + tap
        far = (points - index).abs()
        inner = ((SHARPNESS + 2) * far - (SHARPNESS + 3)) * far * far + 1
        outer = ((far - 5) * far + 8) * far * SHARPNESS - 4 * SHARPNESS
        weight = torch.where(far <= 1, inner, outer)
        matrix = matrix.scatter_add(1, index.long().clamp(0, old - 1)[:, None], weight[:, None])
    return matrix.to(like.dtype)


@torch.no_grad()
def _antialiased(old: int, new: int, like: Tensor) -> Tensor:
    """Antialiased bicubic resampling to the size, as a (new, old) matrix."""
    # Two columns, since torch 2.13 resamples images one pixel wide wrongly.
    identity = torch.eye(old, device=like.device).view(1, old, old, 1).repeat(1, 1, 1, 2)
    signals = F.interpolate(identity, size=(new, 2), mode="bicubic", antialias=True)
    return signals[0, :, :, 0].T.to(like.dtype)


def register(name: str, build: Callable[..., TokenModel]) -> None:
    """Make `timm.create_model(name, ...)` call `build(...)`, and handle timm's own keywords."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise UserError(f"{name} has no published weights; create it without pretrained and train it.")
        for timms_own in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            kwargs.pop(timms_own, None)
        features_only = kwargs.pop("features_only", False)
        feature_options = {key: kwargs.pop(key) for key in ("out_indices", "output_fmt", "norm") if key in kwargs}
        model = build(**kwargs)
        model.pretrained_cfg = model.default_cfg = {  # type: ignore[assignment]
            "architecture": name,
            "input_size": (3, *(patches * model.patch_size for patches in model.grid_size)),
            "num_classes": model.num_classes,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        if features_only:
            return FeatureMaps(model, **{"out_indices": 3, **feature_options})
        if feature_options:
            raise UserError(f"{name} takes {', '.join(feature_options)} together with features_only only.")
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = name
    fn: Callable[..., nn.Module] = entrypoint
    register_model(fn)
