"""The values that change from step to step: learning rate, weight decay, EMA momentum, teacher temperature.

As in facebookresearch/dino for whole epochs (docs/methods.md section 5). Of a fractional number of epochs, the learning
rate's warm-up and the frozen prototypes take the nearest number of whole steps, and the teacher's temperature, which is
constant within an epoch, warms up over the next larger number of whole epochs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nearfar.ssl.settings.defaults import ResolvedRun


@dataclass(frozen=True)
class Schedule:
    """The values of one step, from the run's settings and the step alone: nothing to save, nothing to drift."""

    run: ResolvedRun
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        return self.run.train.epochs * self.steps_per_epoch

    def at(self, step: int) -> dict[str, float]:
        optim, loss, steps = self.run.optim, self.run.loss, self.steps
        warmup = round(optim.warmup_epochs * self.steps_per_epoch)
        temp_epochs = math.ceil(loss.warmup_teacher_temp_epochs)
        start = min(loss.warmup_teacher_temp, loss.teacher_temp)
        gram = {"gram_weight": loss.gram_weight if step >= self._gram_start else 0.0} if loss.gram_weight else {}
        return gram | {
            "lr": self._learning_rate(step, warmup),
            "weight_decay": cosine(optim.weight_decay, optim.weight_decay_end, step, steps),
            "teacher_momentum": cosine(optim.teacher_momentum, optim.teacher_momentum_end, step, steps),
            "teacher_temp": linear(start, loss.teacher_temp, step // self.steps_per_epoch, temp_epochs),
        }

    def _learning_rate(self, step: int, warmup: int) -> float:
        optim = self.run.optim
        if optim.schedule == "cosine":
            return warmup_cosine(optim.lr, optim.min_lr, step, self.steps, warmup)
        cooldown = round((optim.cooldown_epochs or 0) * self.steps_per_epoch) if optim.schedule == "wsd" else 0
        return warmup_stable_decay(optim.lr, optim.min_lr, step, self.steps, warmup, cooldown)

    @property
    def _gram_start(self) -> int:
        return round((self.run.loss.gram_start_epoch or 0) * self.steps_per_epoch)

    def takes_anchor(self, step: int) -> bool:
        """Is the teacher, as it is before `step`, the one that Gram anchoring keeps?"""
        loss = self.run.loss
        if not loss.gram_weight or loss.gram_teacher or loss.anchor_weight:
            return False
        epoch = loss.gram_teacher_epoch
        return step == (self._gram_start if epoch is None else round(epoch * self.steps_per_epoch))

    def prototypes_frozen(self, step: int) -> bool:
        return step < round(self.run.optim.freeze_last_layer_epochs * self.steps_per_epoch)

    def backbone_frozen(self, step: int) -> bool:
        return step < round(self.run.optim.freeze_backbone_epochs * self.steps_per_epoch)

    def scores_due(self, step: int) -> bool:
        """Is the teacher scored after `step` steps?"""
        every = self.run.eval.knn_every_epochs
        return every > 0 and (step == self.steps or step % max(1, round(every * self.steps_per_epoch)) == 0)


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from `start` at step 0 towards `end`, which it would reach one step after the last one."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))


def warmup_cosine(peak: float, end: float, step: int, steps: int, warmup: int) -> float:
    """Linear from 0 to `peak` over `warmup` steps (a single one is at 0), then half a cosine towards `end`."""
    if step < warmup:
        return peak * (step / max(1, warmup - 1))
    return cosine(peak, end, step - warmup, steps - warmup)


def warmup_stable_decay(peak: float, end: float, step: int, steps: int, warmup: int, decay: int) -> float:
    """Linear from 0 to `peak` over `warmup` steps, constant, and linear towards `end` over the last `decay` steps.

    Hu et al., MiniCPM, 2024, section 4; a line as in Hägele et al., 2024. decay = 0: constant to the end.
    """
    if step < warmup:
        return linear(0.0, peak, step, warmup)
    left = steps - step  # 1 at the last step
    return peak if left >= decay else end + (peak - end) * left / decay


def linear(start: float, end: float, position: int, count: int) -> float:
    """Linear over `count` places from `start` to `end`, which the last of them has; a single one is at `start`."""
    if position >= count or position == count - 1 > 0:
        return end
    return start + (end - start) * (position / max(1, count - 1))
