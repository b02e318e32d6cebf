"""The losses of the student, and the centering of the teacher (docs/methods.md section 5)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.ssl.parallel import distributed
from nearfar.ssl.parallel.distributed import PendingSum


class _PairwiseCrossEntropy(torch.autograd.Function):
    """`dino_loss`, view by view: no (V, B, K) array besides the logits and their gradient is ever allocated.

    Summed over the teacher's views g, the cross-entropies of student view v are mass * logsumexp(s) - target . s with
    target = the sum of the teacher's probabilities on the other views, and their gradient mass * softmax(s) - target.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.temperature = temperature
        everyone, loss = teacher.sum(0), student.new_zeros(())
        for v in range(len(student)):
            target = everyone - teacher[v] if v < len(teacher) else everyone
            logits = student[v] / temperature
            loss += (target.sum(-1) * logits.logsumexp(-1) - torch.linalg.vecdot(target, logits)).sum()
        return loss / _terms(student, teacher)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        student, teacher = ctx.saved_tensors
        everyone, out = teacher.sum(0), torch.empty_like(student)
        scale = grad / (ctx.temperature * _terms(student, teacher))
        for v in range(len(student)):
            target = everyone - teacher[v] if v < len(teacher) else everyone
            softmax = torch.softmax(student[v] / ctx.temperature, -1).mul_(target.sum(-1, keepdim=True))
            torch.mul(softmax.sub_(target), scale, out=out[v])
        return out, None, None


def _terms(student: Tensor, teacher: Tensor) -> int:
    """Cross-entropies in the mean: pairs that do not show the same view, times images."""
    return (len(teacher) * len(student) - len(teacher)) * student.shape[1]


def dino_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy over all pairs (teacher's global view, another view of the student) (DINO, eq. 3).

    Args:
        student: logits (V, B, K), views in order, the G global ones first.
        teacher: probabilities (G, B, K), without gradient.
        temperature: of the student's softmax.

    Returns:
        Scalar: the mean over the G*V - G pairs that do not show the same view, and over the batch; once
        differentiable by the student.
    """
    loss: Tensor = _PairwiseCrossEntropy.apply(student, teacher, temperature)
    return loss


def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3, counts: Tensor | None = None) -> Tensor:
    """Teacher probabilities that use all prototypes alike over the rows of all ranks: logits (..., K) -> (..., K).

    Alternately scales exp(logits / temperature) to equal mass a prototype and mass 1 a row (SwAV, section 3.1;
    DINOv2, section 4), in logarithms, so that no temperature overflows.

    counts: (...,) bool; rows where it is False are left out, and 0 in what is returned. None: all rows count.
    """
    rows = logits.flatten(0, -2) / temperature
    left_out = None if counts is None else ~counts.flatten().unsqueeze(1)
    for _ in range(iterations):
        counted = rows if left_out is None else rows.masked_fill(left_out, -torch.inf)
        rows = rows - distributed.all_logsumexp(counted)
        rows = rows - rows.logsumexp(1, keepdim=True)
    found = rows.exp() if left_out is None else rows.exp().masked_fill(left_out, 0)
    return found.view_as(logits)


def koleo(features: Tensor) -> Tensor:
    """Keeps the features of a view's images apart: features (V, B, D), before the head -> scalar.

    Summed over the views, -mean log of the distance of each unit feature to its nearest neighbor among the images of
    all ranks (Kozachenko-Leonenko's entropy; Sablayrolles et al. 2019, section 3.2; DINOv2, section 4).
    """
    with torch.autocast(features.device.type, enabled=False):
        precise = features.to(torch.promote_types(features.dtype, torch.float32))
        here = F.normalize(precise, dim=-1, eps=1e-8).transpose(0, 1)  # (B, V, D), to be joined along the images
        everyone, first = distributed.concatenated(here)
        with torch.no_grad():
            similarity = torch.einsum("bvd,nvd->vbn", here, everyone)
            similarity.diagonal(first, 1, 2).fill_(-torch.inf)  # no image is its own neighbor
            nearest = similarity.argmax(2).T  # (B, V)
        neighbors = everyone[nearest, torch.arange(here.shape[1], device=here.device)]
        distance = F.pairwise_distance(here, neighbors, eps=1e-8)
        return -(distance + 1e-8).log().mean(0).sum()


def coding_rate(features: Tensor, precision: float = 0.5) -> Tensor:
    """How many directions features (V, B, D), before the head, use alike: -> scalar, highest when all D are.

    logdet(I + D / precision^2 M) / (2 D) with M the mean of f f^T over the unit features f of all views, images and
    ranks: the coding rate of SimDINO (Wu et al. 2025, section 3), for one dimension. The mean is not subtracted, as the
    cosine of a k-NN does not subtract it.
    """
    with torch.autocast(features.device.type, enabled=False):
        precise = features.flatten(0, 1).to(torch.promote_types(features.dtype, torch.float32))
        rows = F.normalize(precise, dim=-1, eps=1e-8)
        width = rows.shape[1]
        scale = width / precision**2 / (len(rows) * distributed.count())
        spread = torch.eye(width, dtype=rows.dtype, device=rows.device) + distributed.all_sum(scale * rows.T @ rows)
        # cholesky_ex neither waits for a GPU nor raises: of features that are not finite the rate is NaN, as the loss
        return torch.linalg.cholesky_ex(spread).L.diagonal().log().mean()


class BalancedLoss(nn.Module):
    """A loss on logits whose teacher is balanced by a running center of its own or by Sinkhorn-Knopp."""

    center: Tensor

    def __init__(
        self, prototypes: int, student_temp: float = 0.1, center_momentum: float = 0.9, sinkhorn: bool = False
    ) -> None:
        super().__init__()
        self.sinkhorn = sinkhorn
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(prototypes))
        self._noted: list[PendingSum] = []  # of the teacher's logits, for each pass since the last update of the center

    def _balanced(self, logits: Tensor, temperature: float, counts: Tensor | None = None) -> Tensor:
        """Teacher logits (..., K) -> probabilities, in float32 or wider. counts: as in `sinkhorn_knopp`."""
        logits = logits.to(self.center.dtype)
        if self.sinkhorn:
            return sinkhorn_knopp(logits, temperature, counts=counts)
        return F.softmax((logits - self.center) / temperature, dim=-1)

    def _move_center(self, moved: Tensor, not_finite: Tensor | None) -> None:
        """not_finite: scalar on the center's device; where it is 1, the center stays."""
        self.center.copy_(moved if not_finite is None else torch.where(not_finite > 0, self.center, moved))
        self._noted = []

    def forget(self) -> None:
        """Leave what was noted out of the center: its passes were no training."""
        for noted in self._noted:
            noted.wait()
        self._noted = []

    def _sum(self) -> Tensor:
        """What was noted, over all passes and ranks."""
        first, *others = (noted.wait() for noted in self._noted)
        return sum(others, first)


class DINOLoss(BalancedLoss):
    """`dino_loss` on logits, with temperatures; what is noted are a pass's mean logits (K,)."""

    @torch.no_grad()
    def teacher_probabilities(self, logits: Tensor, temperature: float) -> Tensor:
        """Balanced and sharpened teacher: logits (G, B, K) -> probabilities, in float32 or wider."""
        return self._balanced(logits, temperature)

    def forward(self, student_logits: Tensor, teacher_probabilities: Tensor) -> Tensor:
        """Logits (V, B, K) of the student against probabilities (G, B, K) of the teacher -> scalar."""
        # Near uniform output the gradient is a small difference of probabilities: bf16 would leave only its rounding.
        with torch.autocast(student_logits.device.type, enabled=False):
            return dino_loss(student_logits.to(self.center.dtype), teacher_probabilities, self.student_temp)

    @torch.no_grad()
    def note_teacher(self, logits: Tensor) -> None:
        """Remember the teacher's logits (G, B, K) of a forward pass for the next `update_center`, and send them to the
        other ranks, which takes as long as it likes meanwhile.

        Sinkhorn-Knopp has no use for a center: then it stays 0.
        """
        if not self.sinkhorn:
            self._noted.append(PendingSum(logits.to(self.center.dtype).mean(dim=(0, 1))))

    @torch.no_grad()
    def update_center(self, not_finite: Tensor | None = None) -> None:
        """Move the center towards the mean, over all ranks, of the logits noted since the last call; after the loss.

        not_finite: scalar on the center's device; where it is 1, the center stays.
        """
        if self._noted:
            mean = self._sum() / (distributed.count() * len(self._noted))
            self._move_center(self.center.lerp(mean, 1 - self.center_momentum), not_finite)


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows (..., D) of 1 - cosine, which is half the squared distance of the normalized rows: scalar, 0 where
    all point the same way. No gradient is wanted of the teacher's.

    AM-RADIO (Ranzinger et al. 2024, section 3.3) found it the best loss on summary tokens.
    """
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (student, teacher))
        return 1 - F.cosine_similarity(ours, theirs, dim=-1).mean()
