"""Patch features -> per-pixel class scores, for frozen backbones (docs/methods.md section 3)."""

import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.ssl.errors import UserError


class SegmentationHead(nn.Module):
    """(B, D, h, w) patch features -> (B, classes, H, W) logits, bilinear between patches (half-pixel centers).

    kind "linear": one 1x1 convolution. "mlp": Conv1x1(D -> hidden), GroupNorm(1), GELU, Conv1x1(-> classes),
    the head of LocAt's segmentation protocol.
    """

    def __init__(self, dim: int, classes: int, kind: str = "linear", hidden: int = 512) -> None:
        super().__init__()
        if kind == "linear":
            self.layers = nn.Sequential(nn.Conv2d(dim, classes, 1))
        elif kind == "mlp":
            self.layers = nn.Sequential(
                nn.Conv2d(dim, hidden, 1), nn.GroupNorm(1, hidden), nn.GELU(), nn.Conv2d(hidden, classes, 1)
            )
        else:
            raise UserError(f'Unknown segmentation head "{kind}": use "linear" or "mlp".')

    def forward(self, features: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """size: (H, W) of the logits; None leaves them on the patch grid."""
        logits: Tensor = self.layers(features)
        return logits if size is None else F.interpolate(logits, size, mode="bilinear", align_corners=False)
