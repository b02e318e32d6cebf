"""Student and teacher: what is trained, what follows it, and what is exported."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from nearfar.ssl.backbones import Backbone, Tokens
from nearfar.ssl.heads.dino import DINOHead
from nearfar.ssl.losses import DINOLoss, koleo


class Step(NamedTuple):
    """One forward pass. Shapes: B images, G = 2 global views, K prototypes, D features."""

    loss: Tensor  # scalar, with gradient
    teacher_logits: Tensor  # (G, B, K), before centering
    teacher_probabilities: Tensor  # (G, B, K)
    teacher_features: Tensor  # (G, B, D)
    parts: dict[str, Tensor]  # what else the loss holds, unweighted


class Network(nn.Module):
    """A backbone and its projection head, which reads CLS or the mean over the patches."""

    def __init__(self, backbone: Backbone, head: DINOHead, pooling: Literal["cls", "mean"] = "cls") -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.pooling = pooling

    def forward(self, groups: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Groups of equally sized views [(G, B, 3, s, s), ...] -> logits (V, B, K), features (V, B, D).

        One backbone pass per size, one head pass for all.
        """
        tokens: list[Tokens] = [self.backbone(group.flatten(0, 1)) for group in groups]
        features = torch.cat([each.cls if self.pooling == "cls" else each.mean for each in tokens])
        batch = groups[0].shape[1]
        return self.head(features).unflatten(0, (-1, batch)), features.unflatten(0, (-1, batch))


class Learner(nn.Module):
    """DINO: a student that matches, on every view, what its own moving average says of the global views.

    Both networks run in training mode, as in the reference: batch norm (of a head or of a convolutional backbone)
    uses the statistics of the step in each. The teacher must be built without drop-path.
    """

    def __init__(self, student: Network, teacher: Network, loss: DINOLoss, koleo_weight: float = 0.0) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.loss = loss
        self.koleo_weight = koleo_weight
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

    @torch.no_grad()
    def do_teacher(self, globals_: Tensor) -> tuple[Tensor, Tensor]:
        """Global views (G, B, 3, s, s) -> logits (G, B, K), features (G, B, D)."""
        logits, features = self.teacher([globals_])
        return logits, features

    def do_student(self, groups: list[Tensor]) -> tuple[Tensor, Tensor]:
        """All views, grouped by size -> logits (V, B, K), features (V, B, D)."""
        logits, features = self.student(groups)
        return logits, features

    def forward(self, groups: list[Tensor], teacher_temp: float) -> Step:
        """Normalized views, the global group first -> the loss and what the monitors look at."""
        teacher_logits, teacher_features = self.do_teacher(groups[0])
        probabilities = self.loss.teacher_probabilities(teacher_logits, teacher_temp)
        student_logits, student_features = self.do_student(groups)
        loss, parts = self.loss(student_logits, probabilities), {}
        if self.koleo_weight:
            apart = koleo(student_features[: len(groups[0])])
            loss, parts = loss + self.koleo_weight * apart, {"koleo": apart.detach()}
        return Step(loss, teacher_logits, probabilities, teacher_features, parts)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """theta_teacher <- momentum * theta_teacher + (1 - momentum) * theta_student, after the optimizer's step."""
        teacher: list[Tensor] = list(self.teacher.parameters())
        student: list[Tensor] = list(self.student.parameters())
        torch._foreach_lerp_(teacher, student, weight=1 - momentum)


def parameter_groups(student: nn.Module) -> list[dict[str, object]]:
    """AdamW's two groups: matrices and kernels decay; biases, other tensors of at most one dimension and the decay
    rates of a state-space model (`A_log`) do not.
    """
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (rest if parameter.ndim <= 1 or name.endswith((".bias", "_log")) else decay).append(parameter)
    return [{"params": decay, "decays": True}, {"params": rest, "decays": False, "weight_decay": 0.0}]


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale each tensor's gradient to at most `limit` (DINO clips per tensor; 0 = off).

    Returns:
        The norm of the whole gradient before clipping: not finite as soon as one of its numbers is not.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if limit > 0:
        scales = (limit / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(scales.unbind()))
    return norms.norm()


def share_batch_norm(learner: Learner) -> None:
    """Batch norm of the backbones over all ranks' images, on GPUs. On a CPU each rank's slice has its own statistics.

    The head's is shared everywhere (heads/batch_norm.py).
    """
    if next(learner.parameters()).device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        for network in (learner.student, learner.teacher):
            network.backbone = convert_sync_batchnorm(network.backbone)
