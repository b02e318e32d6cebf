"""One step of training: forward, backward, optimizer, center, teacher. The loop and the dry run share it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nearfar.ssl import distributed
from nearfar.ssl.learner import Learner, Outputs
from nearfar.ssl.optim import clip_gradients, set_rates


class NotFiniteError(Exception):
    """The loss or the gradient of a step is NaN or infinite. No weight was changed."""

    def __init__(self, loss: float, grad_norm: float) -> None:
        super().__init__(f"loss {loss}, norm of the gradient {grad_norm}")
        self.loss, self.grad_norm = loss, grad_norm


class StepResult(NamedTuple):
    """What one step says of itself."""

    loss: float  # mean over all ranks, before the update
    grad_norm: float  # before clipping
    outputs: Outputs  # of this rank


def train_step(
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    views: list[Tensor],
    values: dict[str, float],
    *,
    clip_grad: float,
    freeze_last_layer: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> StepResult:
    """One step of training on all ranks: forward, backward, optimizer, center, teacher.

    Args:
        optimizer: as `optim.adamw` makes it for the student.
        views: normalized, grouped by size, the global group first: [(G, B, 3, s, s), ...].
        values: lr, weight_decay, teacher_momentum and teacher_temp, as `Schedule.at` gives them.
        clip_grad: largest norm of a tensor's gradient; 0 = off.
        freeze_last_layer: leave the prototypes as they are.

    Raises:
        NotFiniteError: on every rank, before anything reaches the weights.
    """
    with autocast():
        outputs = learner(views, values["teacher_temp"])
    outputs.loss.backward()
    learner.after_backward(freeze_last_layer)
    parameters = list(learner.student.parameters())
    distributed.average_gradients(parameters)
    grad_norm = float(clip_gradients(parameters, clip_grad))
    (loss,) = distributed.all_mean_(torch.tensor([float(outputs.loss.detach())], dtype=torch.float64)).tolist()
    if not math.isfinite(loss + grad_norm):
        raise NotFiniteError(loss, grad_norm)
    set_rates(optimizer, values["lr"], values["weight_decay"])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    learner.after_step(values["teacher_momentum"])
    return StepResult(loss, grad_norm, outputs)
