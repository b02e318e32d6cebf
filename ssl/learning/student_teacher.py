"""A network that learns, and a copy of it that follows: what the step, checkpoints and sharding need of a learner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.ssl.backbones import Backbone
from nearfar.ssl.learning.loss_scale import LossScale
from nearfar.ssl.parallel.sharding import local


class StudentTeacher(nn.Module):
    """Two equal networks, each with a `backbone` and a `head`: the student learns, the teacher follows it."""

    notes: Sequence[str] = ()  # lines for the start of the run's log

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        # Any: each kind of learner names the networks that it has.
        self.student: Any = student
        self.teacher: Any = teacher
        self.loss_scale: LossScale | None = None  # under fp16
        self._paused: list[nn.Parameter] = []  # of the student's backbone
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

    @property
    def frozen(self) -> Sequence[Backbone]:
        """Networks that a pass runs through and that neither learn nor follow the student."""
        return ()

    def description(self) -> dict[str, Any]:
        """What checkpoints and exported weights record about how it learned, besides the settings."""
        return {}

    def check_continues(self, state: Mapping[str, Any]) -> None:
        """Raises UserError where a checkpoint's description says that it learned from something else."""

    def freeze_prototypes(self, frozen: bool) -> None:
        """To be called before the forward pass; a head without prototypes has nothing to freeze."""

    def freeze_backbone(self, frozen: bool) -> None:
        """To be called before the forward pass: the heads learn alone, and no gradient goes through the backbone."""
        if frozen and not self._paused:
            self._paused = [p for p in self.student.backbone.parameters() if p.requires_grad]
        for parameter in self._paused:
            parameter.requires_grad_(not frozen)
        if not frozen:
            self._paused = []

    def after_step(self, momentum: float, not_finite: Tensor | None = None) -> None:
        """To be called after the optimizer's step: the teacher follows the student.

        not_finite: float32 scalar on the learner's device; where it is 1, nothing changes.
        """
        self.update_teacher(momentum, not_finite)

    @torch.no_grad()
    def update_teacher(self, momentum: float, not_finite: Tensor | None = None) -> None:
        """theta_teacher <- momentum * theta_teacher + (1 - momentum) * theta_student, unless `not_finite` is 1."""
        teacher = [local(p) for p in self.teacher.parameters()]
        student = [local(p) for p in self.student.parameters()]
        # A step of gradient descent on |teacher - student|^2 / 2 from decay (teacher) and gradient (-student): the one
        # kernel of torch that takes all tensors in a few launches and is cancelled by a flag on the device.
        torch._fused_sgd_(
            teacher, student, [], weight_decay=1.0, momentum=0.0, lr=1 - momentum, dampening=0.0, nesterov=False,
            maximize=True, is_first_step=False, grad_scale=None, found_inf=not_finite,
        )  # fmt: skip
