"""Anchors: patches keep the similarities, and images the features, that an earlier network gave them (docs/methods.md
sections 5 and 8).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gram_loss(student: Tensor, anchor: Tensor) -> Tensor:
    """Mean squared difference between the cosines of each image's patches (DINOv3, section 4.2): scalar.

    Args:
        student: patch tokens (B, N, D).
        anchor: patch tokens (B, N, D') of the same views from the frozen earlier teacher, without gradient.
    """
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = (
            F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1) for x in (student, anchor)
        )
        return F.mse_loss(ours @ ours.mT, theirs @ theirs.mT)


def anchor_loss(student: Tensor, anchor: Tensor) -> Tensor:
    """Mean of 1 - cosine between the features of the same views: scalar, 0 where all point the same way.

    Args:
        student: (B, D).
        anchor: (B, D), of the frozen network, without gradient.
    """
    with torch.autocast(student.device.type, enabled=False):
        precise = torch.promote_types(student.dtype, torch.float32)
        return 1 - F.cosine_similarity(student.to(precise), anchor.to(precise), dim=-1).mean()
