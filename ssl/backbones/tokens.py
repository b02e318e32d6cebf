"""The contract between backbones and everything above them: images in, tokens out."""

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.ssl.errors import UserError
from nearfar.ssl.patches import whole_patches

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)  # timm's derive from these

log = logging.getLogger(__name__)


class Tokens(NamedTuple):
    """The output of a backbone for a batch of images.

    `prefix` (B, R, D) holds CLS and then registers (R may be 0), `patches` (B, h*w, D) the patch tokens row by row,
    and `grid` is (h, w).
    """

    prefix: Tensor
    patches: Tensor
    grid: tuple[int, int]

    @property
    def cls(self) -> Tensor:
        """(B, D): the first prefix token, or the mean over patches where there is none."""
        return self.prefix[:, 0] if self.prefix.shape[1] else self.mean

    @property
    def mean(self) -> Tensor:
        """(B, D): the mean over patch tokens."""
        return self.patches.mean(1)

    def pooled(self, pooling: Literal["cls", "mean"]) -> Tensor:
        """(B, D): one of the two, by its name."""
        return self.cls if pooling == "cls" else self.mean

    def map(self) -> Tensor:
        """(B, D, h, w): the patch tokens as a feature map."""
        return self.patches.transpose(1, 2).unflatten(2, self.grid)


class Backbone(nn.Module):
    """Images (B, 3, H, W), ImageNet-normalized, to `Tokens`; any H and W.

    Sides that are not multiples of `patch_size` are padded on the right and at the bottom with zeros (the mean
    color), and the log says so once for each size. `patch_size` is the side in pixels of what one patch token
    stands for (the total stride of a convolutional network). `create(**arch)` builds the same architecture.
    """

    embed_dim: int
    patch_size: int
    num_heads: int
    arch: dict[str, Any]
    keeps_statistics = False

    def keep_statistics(self) -> None:
        """From now on batch norms use the running statistics that they have, in training too, and leave them alone."""
        self.keeps_statistics = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.keeps_statistics:
            for module in self.modules():
                if isinstance(module, BATCH_NORMS):
                    module.eval()
        return self

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tokens:
        """Tokens of the whole network: after its final norm, and after PRR when that is on.

        masks: (B, h*w) bool; where true, the mask token takes the place of the embedded patch (with LGP: of the fused
            token) before any position is added. Only a network made with `mask_token=True` takes them.
        """
        raise NotImplementedError

    # `blocks` is a method here, so the network itself lives one attribute below (`model`), where its ViT
    # blocks can keep the name every published weight file uses.
    def blocks(self, images: Tensor, n: int, norm: bool = False) -> list[Tokens]:
        """Tokens after each of the last `n` blocks (stages, where a network has stages), the last one last.

        PRR is never applied; `norm=True` applies the final norm to each.
        """
        raise NotImplementedError

    def layers_behind(self) -> dict[str, int]:
        """For every parameter's name how many layers are behind it: 0 for the final norm, 1 for the last block ...

        Raises UserError for a network of timm's that does not say.
        """
        raise NotImplementedError

    def attention(self, images: Tensor) -> Tensor:
        """(B, heads, R+N, R+N): softmax attention of the last block, GAug included, PRR not.

        Raises UserError for a network that has no global attention.
        """
        raise NotImplementedError


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Within it autocast is off on a type of device. Nothing at all while torch.export traces, where it is off anyway:
    archives cannot hold a region with autocast around sizes that vary (torch 2.13)."""
    return nullcontext() if torch.compiler.is_exporting() else torch.autocast(device, enabled=False)


def check_size(images: Tensor, patch_size: int) -> None:
    """Raise UserError for images (B, C, H, W) that do not hold one patch."""
    height, width = images.shape[-2:]
    if min(height, width) < patch_size:
        raise UserError(
            f"Images of {height}x{width} pixels (height x width) are smaller than one patch of "
            f"{patch_size}x{patch_size}; use larger images or a smaller patch_size."
        )


def check_divides(height: int, width: int, patch_size: int) -> None:
    """Raise UserError for sides in pixels that are not multiples of the patch size, with the nearest that are."""
    if height % patch_size or width % patch_size:
        near = [whole_patches(side, patch_size) for side in (height, width)]
        raise UserError(
            f"Images of {height}x{width} pixels (height x width) cannot be cut into patches of "
            f"{patch_size}x{patch_size}: both sides must be multiples of the patch size. Try {near[0]}x{near[1]}."
        )


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) with zeros on the right and at the bottom until H and W are multiples of `multiple`."""
    height, width = images.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    if not (bottom or right):
        return images
    _warn_of_padding(height, width, height + bottom, width + right, multiple)
    return F.pad(images, (0, right, 0, bottom))


@lru_cache(maxsize=256)  # once for each size
def _warn_of_padding(height: int, width: int, padded_height: int, padded_width: int, multiple: int) -> None:
    log.warning(
        "images of %dx%d (height x width) are padded to %dx%d, the next multiple of the patch size %d",
        height, width, padded_height, padded_width, multiple,
    )  # fmt: skip


def one_line(text: str, max_length: int) -> str:
    """Text from a file for a message: one line, cut at `max_length` characters, with ? for what is not printable."""
    line = "".join(c if c.isprintable() else "?" for c in text[: max_length + 1])
    return line if len(line) <= max_length else line[:max_length] + "..."
