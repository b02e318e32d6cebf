"""What a step pretrains, whatever the loss: a student, a teacher that follows it, and what is read of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nearfar.ssl.backbones import Backbone
from nearfar.ssl.learning.masks import Masks
from nearfar.ssl.learning.student_teacher import StudentTeacher


class Outputs(NamedTuple):
    """One forward pass of B images, each in G = 2 global views."""

    loss: Tensor  # scalar, with gradient
    monitored: tuple[Tensor, ...]  # (G, B, ...) each: what the learner itself reads again, for its `health`
    parts: dict[str, Tensor]  # what else the loss holds, unweighted

    @staticmethod
    def joined(parts: list[Outputs]) -> Outputs:
        """The outputs of all parts of a step as those of one batch: means, and the images in order."""
        return Outputs(
            loss=torch.stack([part.loss for part in parts]).mean(),
            monitored=tuple(torch.cat(tensors, 1) for tensors in zip(*(part.monitored for part in parts), strict=True)),
            parts={name: torch.stack([part.parts[name] for part in parts]).mean() for name in parts[0].parts},
        )


class HeadedBackbone(nn.Module):
    """A backbone and what a loss reads it through. Called with groups of views, the global one first."""

    backbone: Backbone
    head: nn.Module
    outputs: int  # how many outputs the head has for a view
    head_title: str  # the same in words


class Learner(StudentTeacher, ABC):
    """What a `Stepper` pretrains, whatever the loss: `teacher`, the student's moving average, is exported.

    Which one a run has is decided in ssl/training/choose_learner.py.
    """

    remedy: str | None = None  # what to try where little was learned, if that is not what DINO needs

    @abstractmethod
    def forward(
        self, groups: list[Tensor], teacher_temp: float, masks: Masks | None = None, gram_weight: float = 0.0
    ) -> Outputs:
        """Normalized views, the global group first -> the loss and the values that are monitored."""

    @abstractmethod
    def health(self, outputs: Outputs) -> dict[str, float]:
        """Numbers that show a collapse, the most telling one first."""

    def take_anchor(self) -> None:
        """Where Gram anchoring is on: from now on keep what the teacher's patches are like now."""


def share_batch_norm(learner: StudentTeacher) -> None:
    """Batch norm of the backbones over all ranks' images, on GPUs. On a CPU each rank's slice has its own statistics.

    The head's is shared everywhere (heads/batch_norm.py).
    """
    if next(learner.parameters()).device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        for network in (learner.student, learner.teacher):
            network.backbone = convert_sync_batchnorm(network.backbone)
