"""Distillation: a student learns to match the features of a frozen teacher (docs/methods.md section 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.ssl.backbones import Backbone, Tokens
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.health import feature_std, rankme
from nearfar.ssl.learning.learner import HeadedBackbone, Learner, Outputs
from nearfar.ssl.learning.losses import cosine_loss
from nearfar.ssl.learning.masks import Masks

Pooling = Literal["cls", "mean"]


def patch_cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """`cosine_loss` of maps of tokens (B, D, h, w) and (B, D, h', w'), each resized to the smaller grid: scalar.

    Bilinear, and antialiased: every patch of a grid that is made smaller counts.
    """
    height, width = (min(sides) for sides in zip(student.shape[-2:], teacher.shape[-2:], strict=True))
    with torch.autocast(student.device.type, enabled=False):
        maps = [resized(x.to(torch.promote_types(x.dtype, torch.float32)), height, width) for x in (student, teacher)]
        ours, theirs = (x.flatten(2).mT for x in maps)
        return cosine_loss(ours, theirs)


def resized(maps: Tensor, height: int, width: int) -> Tensor:
    """(B, D, h, w) -> (B, D, height, width), bilinear with antialiasing; the same tensor where that is its size."""
    if maps.shape[-2:] == (height, width):
        return maps
    return F.interpolate(maps, (height, width), mode="bilinear", antialias=True, align_corners=False)


class FrozenTeacher(NamedTuple):
    """A network that is learned from, and how it looks at views."""

    backbone: Backbone
    title: str  # what distill.teacher names
    digest: str  # of its weights, buffers included
    pooling: Pooling = "cls"
    zoom: float = 1.0  # side at which it sees a view, over the view's own

    @torch.no_grad()
    def tokens(self, views: Tensor) -> Tokens:
        """What it says of views (B, 3, H, W), which are resized to multiples of its patches by its zoom."""
        patch = self.backbone.patch_size
        height, width = (max(patch, round(side * self.zoom / patch) * patch) for side in views.shape[-2:])
        seen: Tokens = self.backbone(resized(views, height, width))
        return seen


class ProjectedFeatures(NamedTuple):
    """What a student says of views of one size. Shapes: V views of B images, D' the teacher's width."""

    features: Tensor  # (V * B, D): its own, before the projection
    summary: Tensor  # (V * B, D')
    patches: Tensor  # (V * B, D', h, w)


class Projections(nn.Module):
    """From the student's width to the teacher's: a linear layer for the summary, and one for the patches."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        self.summary = nn.Linear(width, teacher_width)
        self.patches = nn.Linear(width, teacher_width)
        for layer in (self.summary, self.patches):
            nn.init.trunc_normal_(layer.weight, std=width**-0.5)
            nn.init.zeros_(layer.bias)


class ProjectedStudent(HeadedBackbone):
    """A backbone whose CLS (or mean over patches) and patch tokens are projected to a teacher's width."""

    head: Projections

    def __init__(self, backbone: Backbone, teacher_width: int, pooling: Pooling = "cls") -> None:
        super().__init__()
        self.backbone = backbone
        self.head = Projections(backbone.embed_dim, teacher_width)
        self.pooling = pooling
        self.outputs = teacher_width
        self.head_title = f"projections from {backbone.embed_dim} to {teacher_width} numbers"

    def forward(self, groups: list[Tensor]) -> list[ProjectedFeatures]:
        """Groups of equally sized views [(V, B, 3, s, s), ...] -> what it says of each group."""
        outputs = []
        for group in groups:
            tokens = self.backbone(group.flatten(0, 1))
            features = tokens.pooled(self.pooling)
            patches = self.head.patches(tokens.patches).mT.unflatten(2, tokens.grid)
            outputs.append(ProjectedFeatures(features, self.head.summary(features), patches))
        return outputs


class Distiller(Learner):
    """A student that matches, through a linear projection, what a frozen teacher says of the same views.

    The loss is the cosine distance of the summaries plus `patch_weight` times that of the patch tokens, means over all
    views. As in DINOv2 (Oquab et al. 2023, section 5) the student's moving average (`teacher`, as in every learner) is
    what is scored and exported. The frozen teacher is always in evaluation mode and is no part of a checkpoint, which
    holds the digest of its weights.
    """

    student: ProjectedStudent
    teacher: ProjectedStudent
    remedy = "or a teacher whose own features are better on these images"

    def __init__(
        self, student: ProjectedStudent, teacher: ProjectedStudent, source: FrozenTeacher, patch_weight: float = 1.0
    ) -> None:
        """
        Args:
            teacher: like the student; follows it.
            source: what is learned from.
        """
        super().__init__(student, teacher)
        self.source = source._replace(backbone=source.backbone.eval().requires_grad_(False))  # a tuple: not registered
        self.patch_weight = patch_weight

    @property
    def frozen(self) -> Sequence[Backbone]:
        return (self.source.backbone,)

    @property
    def notes(self) -> Sequence[str]:  # type: ignore[override]
        backbone = self.source.backbone
        count = sum(p.numel() for p in backbone.parameters())
        return [
            f"Distilled from {self.source.title}: {backbone.arch['name']}, {count / 1e6:.2f} M parameters, width "
            f"{backbone.embed_dim}, patches of {backbone.patch_size} pixels, frozen; digest {self.source.digest[:16]}."
        ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """To another device or type: the frozen teacher too, though it is no part of the state."""
        self.source.backbone._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def forward(
        self, groups: list[Tensor], teacher_temp: float = 0.0, masks: Masks | None = None, gram_weight: float = 0.0
    ) -> Outputs:
        """Normalized views, the global group first -> the loss and the values that are monitored.

        The other arguments are those of other learners.
        """
        outputs: list[ProjectedFeatures] = self.student(groups)
        views = sum(len(group) for group in groups)
        summary, patches = [], []
        for group, ours in zip(groups, outputs, strict=True):
            theirs = self.source.tokens(group.flatten(0, 1))
            share = len(group) / views
            whole = theirs.pooled(self.source.pooling)
            summary.append(share * cosine_loss(ours.summary, whole))
            patches.append(share * patch_cosine_loss(ours.patches, theirs.map()))
        parts = {"summary_loss": torch.stack(summary).sum(), "patch_loss": torch.stack(patches).sum()}
        loss = parts["summary_loss"] + self.patch_weight * parts["patch_loss"]
        features = outputs[0].features.detach().unflatten(0, groups[0].shape[:2])
        return Outputs(loss, (features,), {name: part.detach() for name, part in parts.items()})

    def health(self, outputs: Outputs) -> dict[str, float]:
        """Of the student's features. A teacher that does not collapse leaves a student little room for it."""
        features = outputs.monitored[0].cpu()
        return {"rankme": rankme(features), "feature_std": feature_std(features)}

    @torch.no_grad()
    def after_step(self, momentum: float, not_finite: Tensor | None = None) -> None:
        """The moving average follows, with the student's running statistics, as it never sees a batch itself."""
        super().after_step(momentum, not_finite)
        for average, own in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
            average.copy_(own)

    def description(self) -> dict[str, Any]:
        return {"distilled_from": {"teacher": self.source.title, "digest": self.source.digest}}

    def check_continues(self, state: Mapping[str, Any]) -> None:
        before = state.get("distilled_from")
        if before is None:
            raise UserError(
                f"The run was begun without a teacher to distill, and distill.teacher is {self.source.title} now. "
                "Continue it without, or choose another name=."
            )
        if before["digest"] != self.source.digest:
            raise UserError(
                f"The teacher file has changed: the run was begun with weights of digest {before['digest'][:16]} "
                f"({before['teacher']}), and {self.source.title} holds those of {self.source.digest[:16]} now. Give "
                "the weights it was begun with as distill.teacher, or choose another name=."
            )
