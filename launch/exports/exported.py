"""What is exported, what it is compared with afterwards, and where it may be written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nearfar.ssl import checkpoint
from nearfar.ssl.backbones import Backbone, VisionTransformer
from nearfar.ssl.errors import UserError
from nearfar.ssl.given_weights import folder_of, load_given
from nearfar.ssl.run import kept

TOLERANCE = 1e-4  # largest difference of a feature, relative to the largest feature where that is above 1


@dataclass(frozen=True)
class ExportedBackbone:
    """A backbone in evaluation mode, what its file says of it, and the file of its scores."""

    backbone: Backbone
    about: dict[str, Any]
    results: Path
    license: str = "unknown"

    @property
    def arch(self) -> dict[str, Any]:
        return self.backbone.arch

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels that the network is made for: those of its table of positions, if it has one."""
        patch = self.backbone.patch_size
        model = self.backbone.model
        if isinstance(model, VisionTransformer) and model.pos_embed is not None:
            return model.pos_grid[0] * patch, model.pos_grid[1] * patch
        side = -(-int(self.arch.get("img_size", 224)) // patch) * patch
        return side, side

    @property
    def ideas(self) -> list[str]:
        """Which of our own parts the network has, by name."""
        names = {"lgp": "LGP", "gaug": "GAug", "prr": "PRR", "rope": "rotary positions"}
        names |= {"no_positions": "no positions"}
        return [name for key, name in names.items() if self.arch.get(key)]

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """All tokens (B, R + h*w, D) of normalized images, prefix first, as `forward` gives them."""
        tokens = self.backbone(images)
        return torch.cat([tokens.prefix, tokens.patches], 1)


def to_export(model: Path, which: str | None = None, license_id: str = "unknown") -> ExportedBackbone:
    """From a run folder, a checkpoint folder, an exported file, a public file of weights or timm/NAME.

    which: of a run, the checkpoint of this step, or the `best`; None: its last weights.

    Raises:
        UserError: nothing there, no checkpoint of that step, or weights that do not fit what they describe.
    """
    if which is not None:
        model = kept.checkpoint_of(model, which)
    folder = folder_of(model)
    if (folder / checkpoint.TENSORS).is_file():  # a checkpoint, whose run has the scores
        folder = folder.parent.parent
    return ExportedBackbone(*load_given(model), folder / "results.json", license_id)


def require_free(out: Path) -> None:
    """Raises UserError for a file, or a folder that is not empty: nothing is written over it."""
    try:
        if out.is_dir() and not any(os.scandir(out)):
            return
        taken = out.exists() or out.is_symlink()
    except OSError as error:
        raise UserError(f"{out} cannot be looked at: {error.strerror}.") from None
    if taken:
        kind = "a folder with something in it" if out.is_dir() else "a file"
        raise UserError(f"{out} is {kind}, and an export never overwrites anything. Name another place, or remove it.")
    if not out.parent.is_dir():
        raise UserError(f"There is no folder {out.parent} to write {out.name} to. Make it first.")


def example(size: tuple[int, int], batch: int = 2) -> Tensor:
    """Images (batch, 3, H, W) of seeded noise, as if normalized."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def difference(found: Sequence[Tensor], expected: Sequence[Tensor], by: str) -> float:
    """The largest difference between features; raises UserError where they are not the same within `TOLERANCE`."""
    shapes = [tuple(each.shape) for each in found], [tuple(each.shape) for each in expected]
    if shapes[0] != shapes[1]:
        raise UserError(f"{by} gives features of shape {shapes[0]} instead of {shapes[1]}, so nothing was written.")
    largest = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    scale = max(1.0, *(float(each.abs().max()) for each in expected))
    if not largest <= TOLERANCE * scale:
        raise UserError(
            f"{by} gives other features than the network itself (largest difference {largest:.2g}), so nothing was "
            "written. Weights that are not finite do that; otherwise please report it."
        )
    return largest
