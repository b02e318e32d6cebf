"""A classifier: backbone and linear head, the loss on soft targets, and what trains them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from nearfar.ssl.backbones import Backbone, create
from nearfar.ssl.learning.student_teacher import StudentTeacher
from nearfar.ssl.settings.finetune_settings import ResolvedFinetune


class Classifier(nn.Module):
    """A backbone and a linear head, which reads CLS or the mean over the patches. `classes`: their names, in order."""

    def __init__(self, backbone: Backbone, classes: list[str], pooling: Literal["cls", "mean"] = "cls") -> None:
        super().__init__()
        self.backbone, self.classes, self.pooling = backbone, list(classes), pooling
        self.head = nn.Linear(backbone.embed_dim, len(classes))
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @property
    def head_title(self) -> str:
        """What the head tells apart, in words."""
        some = ", ".join(self.classes[:5]) + (" and others" if len(self.classes) > 5 else "")
        return f"linear, {len(self.classes)} classes: {some}"

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (B, 3, H, W) -> logits (B, classes)."""
        tokens = self.backbone(images)
        logits: Tensor = self.head(tokens.pooled(self.pooling))
        return logits


class ClassifierOutputs(NamedTuple):
    """One forward pass of B images."""

    loss: Tensor  # scalar, with gradient
    right: Tensor  # share of the images whose likeliest class is that of the largest target, scalar

    @staticmethod
    def joined(parts: list[ClassifierOutputs]) -> ClassifierOutputs:
        """Those of equal parts of a batch as those of the whole."""
        loss, right = (torch.stack([getattr(part, name) for part in parts]).mean() for name in ("loss", "right"))
        return ClassifierOutputs(loss, right)


class ClassifierLearner(StudentTeacher):
    """Supervised training. The teacher is the average of the weights that is scored and saved, or the weights as they
    are (momentum 0); it sees no image in training."""

    def forward(self, images: Tensor, targets: Tensor) -> ClassifierOutputs:
        """Normalized images (B, 3, s, s) and targets (B, C), each a distribution over the classes -> their answers."""
        logits = self.student(images)
        right = (logits.detach().argmax(-1) == targets.argmax(-1)).to(targets.dtype).mean()
        return ClassifierOutputs(soft_cross_entropy(logits, targets), right)

    @torch.no_grad()
    def after_step(self, momentum: float, not_finite: Tensor | None = None) -> None:
        if momentum:
            self.update_teacher(momentum, not_finite)
        else:  # a step that was not finite has left the student as it was
            torch._foreach_copy_(list(self.teacher.parameters()), list(self.student.parameters()))
        for mine, its in zip(self.teacher.buffers(), self.student.buffers(), strict=True):  # of batch norm
            mine.copy_(its)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the images of -sum_c targets_c log softmax(logits)_c, at least in float32; both (B, C)."""
    logits = logits if logits.dtype is torch.float64 else logits.float()
    return -(targets.to(logits.dtype) * logits.log_softmax(-1)).sum(-1).mean()


def build_classifier_learner(run: ResolvedFinetune, classes: list[str], weights: bool = True) -> ClassifierLearner:
    """Student and its follower as the settings say, seeded: the same weights on every machine and every start.

    weights: read backbone.weights, if set; a run that continues from a checkpoint does not need that file any more.
    """
    torch.manual_seed(run.train.seed)
    settings = run.backbone.model_dump(exclude={"drop_path", "weights", "pretrained", "img_size"})

    def network(drop_path: float, started: bool) -> Classifier:
        file = run.backbone.weights if started and weights else None
        published = started and weights and run.backbone.pretrained
        backbone = create(
            img_size=run.backbone.img_size or run.augment.size,
            drop_path=drop_path,
            weights=file,
            pretrained=published,
            **settings,
        )
        return Classifier(backbone, classes, run.classifier.pooling)

    return ClassifierLearner(network(run.backbone.drop_path, True), network(0.0, False)).train()
