"""One step of training on all ranks, which the host starts and does not wait for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nearfar.ssl.learning.masks import Masks
from nearfar.ssl.learning.optim import clip_gradients, set_rates
from nearfar.ssl.learning.student_teacher import StudentTeacher
from nearfar.ssl.parallel.gradients import GradientMean
from nearfar.ssl.parallel.sharding import is_sharded


class Numbers(NamedTuple):
    """The numbers of a step, the same on every rank."""

    loss: float  # mean over all ranks, before the update
    grad_norm: float  # before clipping
    finite: bool  # False: this step, or one before it, was not finite and changed nothing
    votes: tuple[float, ...]  # each the mean over the ranks
    skipped: bool = False  # under fp16: the scaled gradient overflowed, so the step changed the scale alone
    loss_scale: float = 0.0  # under fp16: what the next loss is multiplied by

    def metrics(self) -> dict[str, float]:
        """What a line of metrics holds of them; a skipped step has no norm."""
        scale = {"loss_scale": self.loss_scale} if self.loss_scale else {}
        return {"loss": self.loss, **({} if self.skipped else {"grad_norm": self.grad_norm}), **scale}


class Report:
    """A step's numbers on their way to the host. Reading them waits for that step, and for none after it."""

    def __init__(self, numbers: Tensor) -> None:
        """`numbers`: loss, norm of the gradient, 1 where not finite, 1 where skipped, scale, and the votes."""
        self._numbers, self._arrived = numbers, None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> Numbers:
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, grad_norm, not_finite, skipped, scale, *votes = self._numbers.tolist()
        # Compared with 0, and the numbers checked again, since a flag that is itself NaN must not pass.
        finite = not_finite == 0 and (skipped == 1 or math.isfinite(loss + grad_norm))
        return Numbers(loss, grad_norm, finite, tuple(votes), skipped == 1, scale)


class StepResult(NamedTuple):
    """What one step returns."""

    report: Report
    outputs: Any  # what the learner's forward pass returned, on this rank: `Outputs` in pretraining


class Stepper:
    """A call is one step: forward, backward, optimizer, center, teacher.

    A step whose loss or gradient is not finite is found on the device and leaves weights, moments, teacher and center
    as they are; so do all steps after it, because the host learns of it only when it reads the report. (Running
    statistics of batch norm are written by the forward pass and not taken back: a run ends there and saves nothing.)
    Under fp16 a step whose scaled gradient overflows leaves them as they are too, and the next one goes on.
    """

    def __init__(
        self,
        learner: StudentTeacher,
        optimizer: torch.optim.Optimizer,
        clip_grad: float,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        accumulate_steps: int = 1,
    ) -> None:
        """
        Args:
            optimizer: as `optim.optimizer_of` makes it for the student.
            clip_grad: largest norm of a tensor's gradient; 0 = off.
            accumulate_steps: parts in which the images of a step pass, one after the other. Loss, gradient and
                center are those of the whole; batch norm, Sinkhorn-Knopp, KoLeo and the coding rate see one part (of
                all ranks) at a time.
        """
        self.learner, self.optimizer, self.clip_grad, self.autocast = learner, optimizer, clip_grad, autocast
        self.accumulate_steps = accumulate_steps
        self.parameters = list(learner.student.parameters())
        # A sharded gradient is the mean over all ranks when the backward pass ends (sharding.py).
        self.gradients = GradientMean(p for p in self.parameters if not is_sharded(p))
        self.not_finite = torch.zeros(
            (), dtype=torch.float32, device=self.parameters[0].device
        )  # 1 from the first such step on
        self._zero = torch.zeros_like(self.not_finite)

    def __call__(
        self,
        views: list[Tensor],
        values: dict[str, float],
        *,
        masks: Sequence[Masks] = (),
        freeze_last_layer: bool = False,
        freeze_backbone: bool = False,
        votes: Callable[[], Sequence[float]] = tuple,
    ) -> StepResult:
        """
        Args:
            views: normalized, grouped by size, the global group first: [(G, B, 3, s, s), ...].
            values: lr, weight_decay, teacher_momentum and teacher_temp (with Gram anchoring gram_weight too), as
                `Schedule.at` gives them.
            masks: for iBOT, those of the global views, for each part of the step.
            freeze_last_layer: leave the prototypes as they are.
            freeze_backbone: leave the backbone as it is.
            votes: numbers to average over the ranks, asked for after the backward pass; equally many on every rank.
        """
        learner = self.learner
        learner.freeze_prototypes(freeze_last_layer)
        learner.freeze_backbone(freeze_backbone)
        outputs = self._passes(views, values, masks)
        loss = outputs.loss.to(self.parameters[0].dtype)
        means = self.gradients.finish(torch.stack([loss, *(torch.full_like(loss, vote) for vote in votes())]))
        scaling = learner.loss_scale
        if scaling is not None:
            scaling.unscale(self.parameters)
        grad_norm = clip_gradients(self.parameters, self.clip_grad)
        bad = 1 - torch.isfinite(means[0] + grad_norm).float()
        skipped = self._zero if scaling is None else scaling.overflowed(means[0], bad)
        self.not_finite = torch.maximum(self.not_finite, bad - skipped)
        unchanged = torch.maximum(self.not_finite, skipped)
        set_rates(self.optimizer, values["lr"], values["weight_decay"])
        self.optimizer.found_inf = unchanged  # type: ignore[attr-defined]  # as torch's GradScaler hands it over
        with self.autocast() if scaling is None else nullcontext():  # Muon's products, too small for float16
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        learner.after_step(values["teacher_momentum"], unchanged)
        if scaling is not None:
            scaling.update(skipped, self.not_finite)
        scalars = (means[0], grad_norm, self.not_finite, skipped, self._zero if scaling is None else scaling.scale)
        numbers = torch.cat([torch.stack([each.to(means.dtype) for each in scalars]), means[1:]])
        return StepResult(Report(numbers), outputs)

    def forward(self, views: list[Tensor], values: dict[str, float], masks: Masks | None) -> Any:
        """The learner's forward pass on (a part of) the step's views: its loss, and what is monitored."""
        return self.learner(views, values["teacher_temp"], masks, values.get("gram_weight", 0.0))

    def _passes(self, views: list[Tensor], values: dict[str, float], masks: Sequence[Masks]) -> Any:
        """Forward and backward, part by part; the gradients are sent during the last backward pass."""
        parts = list(zip(*(group.chunk(self.accumulate_steps, 1) for group in views), strict=True))
        done = []
        of_parts: Sequence[Masks | None] = masks or [None] * len(parts)
        for number, (part, hidden) in enumerate(zip(parts, of_parts, strict=True), 1):
            with self.autocast():
                outputs = self.forward(list(part), values, hidden)
            if number == len(parts):
                self.gradients.begin()
            loss = outputs.loss / len(parts) if len(parts) > 1 else outputs.loss
            (loss if self.learner.loss_scale is None else self.learner.loss_scale.scaled(loss)).backward()
            done.append(outputs._replace(loss=outputs.loss.detach()))
        return done[0].joined(done) if len(done) > 1 else done[0]
