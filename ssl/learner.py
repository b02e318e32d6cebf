"""Student and teacher: what is trained, what follows it, and what is exported."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from nearfar.ssl.backbones import Backbone, Tokens, create
from nearfar.ssl.defaults import ResolvedRun
from nearfar.ssl.heads.dino import DINOHead
from nearfar.ssl.losses import DINOLoss, koleo
from nearfar.ssl.student_teacher import StudentTeacher


class Outputs(NamedTuple):
    """One forward pass. Shapes: B images, G = 2 global views, K prototypes, D features."""

    loss: Tensor  # scalar, with gradient
    teacher_probabilities: Tensor  # (G, B, K)
    teacher_features: Tensor  # (G, B, D)
    parts: dict[str, Tensor]  # what else the loss holds, unweighted

    @staticmethod
    def joined(parts: list[Outputs]) -> Outputs:
        """The outputs of all parts of a step as those of one batch: means, and the images in order."""
        return Outputs(
            loss=torch.stack([part.loss for part in parts]).mean(),
            teacher_probabilities=torch.cat([part.teacher_probabilities for part in parts], 1),
            teacher_features=torch.cat([part.teacher_features for part in parts], 1),
            parts={name: torch.stack([part.parts[name] for part in parts]).mean() for name in parts[0].parts},
        )


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


class Learner(StudentTeacher):
    """DINO: a student that matches, on every view, what its own moving average says of the global views.

    Both networks run in training mode, as in the reference: batch norm (of a head or of a convolutional backbone)
    uses the statistics of the step in each. The teacher must be built without drop-path.
    """

    def __init__(self, student: Network, teacher: Network, loss: DINOLoss, koleo_weight: float = 0.0) -> None:
        super().__init__(student, teacher)
        self.loss = loss
        self.koleo_weight = koleo_weight

    @torch.no_grad()
    def teacher_outputs(self, global_views: Tensor) -> tuple[Tensor, Tensor]:
        """Global views (G, B, 3, s, s) -> logits (G, B, K), features (G, B, D)."""
        logits, features = self.teacher([global_views])
        return logits, features

    def student_outputs(self, groups: list[Tensor]) -> tuple[Tensor, Tensor]:
        """All views, grouped by size -> logits (V, B, K), features (V, B, D)."""
        logits, features = self.student(groups)
        return logits, features

    def forward(self, groups: list[Tensor], teacher_temp: float) -> Outputs:
        """Normalized views, the global group first -> the loss and the values that are monitored."""
        teacher_logits, teacher_features = self.teacher_outputs(groups[0])
        probabilities = self.loss.teacher_probabilities(teacher_logits, teacher_temp)
        student_logits, student_features = self.student_outputs(groups)
        loss, parts = self.loss(student_logits, probabilities), {}
        self.loss.note_teacher(teacher_logits)
        if self.koleo_weight:
            spread = koleo(student_features[: len(groups[0])])
            loss, parts = loss + self.koleo_weight * spread, {"koleo": spread.detach()}
        return Outputs(loss, probabilities, teacher_features, parts)

    def freeze_prototypes(self, frozen: bool) -> None:
        """To be called before the forward pass: in the first epochs the prototypes stay as they are (DINO, appendix A)
        and no gradient is computed for them.
        """
        self.student.head.prototypes.requires_grad_(not frozen)

    def after_step(self, momentum: float, not_finite: Tensor | None = None) -> None:
        """To be called after the optimizer's step: center and teacher follow the passes before it.

        not_finite: float32 scalar on the learner's device; where it is 1, nothing changes.
        """
        self.loss.update_center(not_finite)
        self.update_teacher(momentum, not_finite)


def build_learner(run: ResolvedRun, weights: bool = True) -> Learner:
    """Student and teacher as the settings say, seeded: the same weights on every machine and every start.

    weights: read backbone.weights, if set; a run that continues from a checkpoint does not need that file any more.
    """
    torch.manual_seed(run.train.seed)
    backbone, head, loss = run.backbone, run.head, run.loss
    settings = backbone.model_dump(exclude={"drop_path", "weights"})
    size = run.views.global_crops_size

    def network(drop_path: float, file: str | None = None) -> Network:
        built = create(img_size=size, drop_path=drop_path, weights=file, **settings)
        projection = DINOHead(built.embed_dim, head.prototypes, head.hidden_dim, head.bottleneck_dim, head.batch_norm)
        return Network(built, projection, head.pooling)

    student, teacher = network(backbone.drop_path, backbone.weights if weights else None), network(0.0)
    dino = DINOLoss(head.prototypes, loss.student_temp, loss.center_momentum, loss.centering == "sinkhorn_knopp")
    return Learner(student, teacher, dino, loss.koleo_weight).train()


def share_batch_norm(learner: StudentTeacher) -> None:
    """Batch norm of the backbones over all ranks' images, on GPUs. On a CPU each rank's slice has its own statistics.

    The head's is shared everywhere (heads/batch_norm.py).
    """
    if next(learner.parameters()).device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        for network in (learner.student, learner.teacher):
            network.backbone = convert_sync_batchnorm(network.backbone)
