"""Gram anchoring: the patches of an image keep the similarities that an earlier network gave them (docs/methods.md
section 5).
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
