"""iBOT: the student predicts the teacher's output for the patches that are hidden from it (docs/methods.md section 5).

Rows are hidden patches, of any number of images; those of weight 0 only fill the list and count for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfar.ssl.learning.losses import BalancedLoss
from nearfar.ssl.parallel.distributed import PendingSum


def patch_loss(student: Tensor, teacher: Tensor, weights: Tensor, views: int, temperature: float) -> Tensor:
    """Mean over the views of all images of the mean cross-entropy over their hidden patches (iBOT, section 3).

    A view without hidden patches counts with 0, as in the published code of iBOT and DINOv2.

    Args:
        student: logits (M, K).
        teacher: probabilities (M, K), without gradient.
        weights: (M,), 1 / (hidden patches of the view that the row is from), or 0.
        views: number of views that the rows are from, with and without hidden patches.
        temperature: of the student's softmax.
    """
    logits = student / temperature
    cross_entropy = teacher.sum(-1) * logits.logsumexp(-1) - torch.linalg.vecdot(teacher, logits)
    return torch.linalg.vecdot(cross_entropy, weights.to(logits.dtype)) / views


class PatchLoss(BalancedLoss):
    """`patch_loss` on logits; what is noted (K + 1,) are the sum of a pass's logits, and their number."""

    @torch.no_grad()
    def teacher_probabilities(self, logits: Tensor, weights: Tensor, temperature: float) -> Tensor:
        """Balanced and sharpened teacher: logits (M, K) -> probabilities, in float32 or wider."""
        return self._balanced(logits, temperature, counts=weights > 0)

    def forward(self, student_logits: Tensor, teacher_probabilities: Tensor, weights: Tensor, views: int) -> Tensor:
        """Logits (M, K) of the student against probabilities (M, K) of the teacher -> scalar."""
        with torch.autocast(student_logits.device.type, enabled=False):
            logits = student_logits.to(self.center.dtype)
            return patch_loss(logits, teacher_probabilities, weights, views, self.student_temp)

    @torch.no_grad()
    def note_teacher(self, logits: Tensor, weights: Tensor) -> None:
        """Remember the teacher's logits (M, K) of a forward pass for the next `update_center`, and send them off."""
        if self.sinkhorn:
            return
        counts = (weights > 0).to(self.center.dtype)
        total = (counts.unsqueeze(1) * logits.to(self.center.dtype)).sum(0)  # autocast would round a product
        self._noted.append(PendingSum(torch.cat([total, counts.sum()[None]])))

    @torch.no_grad()
    def update_center(self, not_finite: Tensor | None = None) -> None:
        """Move the center towards the mean, over all ranks, of the logits of hidden patches noted since the last call.

        not_finite: scalar on the center's device; where it is 1, the center stays.
        """
        if not self._noted:
            return
        noted = self._sum()
        mean, number = noted[:-1] / noted[-1].clamp_min(1), noted[-1]
        moved = torch.where(number > 0, self.center.lerp(mean, 1 - self.center_momentum), self.center)
        self._move_center(moved, not_finite)
