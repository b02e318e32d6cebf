"""Training without labels, in the loop of `train`: what is learned from unlabeled images, and how."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nearfar.ssl.backbones import Backbone
from nearfar.ssl.checkpoint import TEACHER
from nearfar.ssl.data.loaders.base import Batch
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.learning import memory
from nearfar.ssl.learning.dino import build_block_masks
from nearfar.ssl.learning.health import CollapseWatch, falling_score, features_lost, nothing_learned, patience
from nearfar.ssl.learning.learner import Learner, Outputs
from nearfar.ssl.learning.masks import Masks
from nearfar.ssl.learning.optim import moment_bytes, optimizer_of
from nearfar.ssl.learning.schedule import Schedule
from nearfar.ssl.learning.step import Numbers, StepResult
from nearfar.ssl.parallel import distributed
from nearfar.ssl.parallel.device import Compute
from nearfar.ssl.run import announce, failed_step, fork, resume
from nearfar.ssl.run.run_folder import RunFolder
from nearfar.ssl.settings.defaults import Derived, ResolvedRun, resolve
from nearfar.ssl.settings.run import Run
from nearfar.ssl.training.base import Training, Votes
from nearfar.ssl.training.choose_learner import learner_of


class Pretraining(Training[ResolvedRun, Learner]):
    """Student and teacher on unlabeled images: DINO, or distillation."""

    settings = ResolvedRun
    exported = TEACHER
    schedule: Schedule

    def __post_init__(self) -> None:
        super().__post_init__()
        first = next((line for line in read_metrics(self.folder.metrics) if "feature_std" in line), None)
        self.block_masks = build_block_masks(self.run, self.learner.student.backbone.patch_size, self.world.rank)
        self.monitored = ""
        self.watch = CollapseWatch(self.schedule.steps // 10, patience(self.run.train.log_every_steps), start=first)

    @classmethod
    def resolved(
        cls, run: Run, images: int, cores: int, world_size: int, saved: Run | None, done: int
    ) -> tuple[ResolvedRun, list[Derived]]:
        begun, taken = (run, []) if saved else fork.located(run)
        settings, derived = resolve(begun, images, cores, world_size=world_size, saved=saved, done=done)
        return settings, [*taken, *derived]

    @classmethod
    def built(cls, run: ResolvedRun, source: Source, weights: bool) -> Learner:
        return learner_of(run, weights)

    @classmethod
    def optimizer_for(cls, run: ResolvedRun, learner: Learner) -> torch.optim.Optimizer:
        return optimizer_of(run.optim, learner.student)

    @classmethod
    def schedule_for(cls, run: ResolvedRun, steps_per_epoch: int) -> Schedule:
        return Schedule(run, steps_per_epoch)

    @classmethod
    def needed(cls, run: ResolvedRun, learner: Learner, compute: Compute) -> memory.MemoryNeed:
        return needed(learner, run, compute)

    @classmethod
    def trial_loss(cls, run: ResolvedRun, learner: Learner, images: int) -> Tensor:
        device = next(learner.parameters()).device
        black = [torch.zeros((number, images, 3, side, side), device=device) for number, side in views_of(run)]
        blocks = build_block_masks(run, learner.student.backbone.patch_size)
        masks = replace(blocks, images=images).of_step(0, device)[0] if blocks else None
        outputs: Outputs = learner(black, run.loss.teacher_temp, masks, run.loss.gram_weight)
        return outputs.loss

    @classmethod
    def description_of(cls, run: ResolvedRun, learner: Learner, source: Source, rounding: str) -> dict[str, Any]:
        return resume.self_description(run, learner, source.fingerprint, rounding)

    @classmethod
    def export(cls, folder: RunFolder, step: int, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        prefix = "learner/teacher.backbone."
        backbone = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        resume.export_teacher(folder, step, backbone, description)

    def started_step(self, views: list[Tensor], values: dict[str, float], votes: Votes) -> StepResult:
        if self.schedule.takes_anchor(self.step):
            self.learner.take_anchor()
        return self.stepper(
            views,
            values,
            masks=self.masks(),
            freeze_last_layer=self.schedule.prototypes_frozen(self.step),
            freeze_backbone=self.backbone_frozen,
            votes=votes,
        )

    @property
    def backbone_frozen(self) -> bool:
        return self.schedule.backbone_frozen(self.step)

    def masks(self) -> list[Masks]:
        """Of the coming step, for each of its parts; none without iBOT."""
        if self.block_masks is None:
            return []
        return self.block_masks.of_step(self.step, self.compute.device, self.run.train.accumulate_steps)

    def measured(self, outputs: Outputs) -> dict[str, float]:
        health = self.learner.health(outputs)
        self.monitored = next(iter(health))  # the most telling one
        return health | {name: float(part) for name, part in outputs.parts.items()}

    def warning(self, step: int, measured: dict[str, float]) -> str | None:
        return self.watch.update(step, measured)

    def progress(self, measured: dict[str, float]) -> str:
        return f"{self.monitored} {measured[self.monitored]:.2f}"

    def _score(self) -> bool:
        backbone = resume.whole_teacher(self.learner, self.world)
        if not self.world.first and self.observers.assist:
            self.observers.assist(backbone, self.run)
        return distributed.from_first(lambda: self._score_of(backbone))

    def _score_of(self, backbone: Backbone) -> bool:
        assert self.observers.probe is not None
        scores = self.observers.probe(backbone.eval(), self.run)
        backbone.train()
        stopped = self.tell_scores(scores)
        metrics = read_metrics(self.folder.metrics) if scores else []
        for message in (falling_score(metrics), features_lost(metrics)):
            if message:
                self.log.say(message)
        return stopped

    def _not_finite(self, batch: Batch, step: int, numbers: Numbers) -> str:
        """Save the batch and the state before it for `nearfar replay`, and say what happened."""
        record = failed_step.save(
            self.folder.path, step, numbers, batch, self.source, self.learner, self.optimizer, self.description
        )
        first = [self.source.name(int(index)) for index in batch.index[:4]]
        return announce.not_finite(step, numbers, first, record, self.run)

    def verdict(self) -> str | None:
        """One sentence where a finished run learned little; None elsewhere."""
        rows = 2 * self.run.train.batch_size // self.world.size
        most = min(rows, self.learner.teacher.backbone.embed_dim)
        if not self.world.first:
            return None
        return nothing_learned(read_metrics(self.folder.metrics), most, self.run.head.batch_norm, self.learner.remedy)

    def what_next(self, finished: bool) -> str:
        return announce.what_next(self.run, finished, self.step, self.schedule.steps)


def needed(learner: Learner, run: ResolvedRun, compute: Compute) -> memory.MemoryNeed:
    """What a step of one rank keeps in memory; to be asked before anything is split over ranks or compiled."""
    images = run.train.batch_size // run.train.world_size // run.train.accumulate_steps
    need = memory.estimate(learner, views_of(run), images, compute.autocast, run.train.checkpoint_activations)
    need = need._replace(moments=moment_bytes(optimizer_of(run.optim, learner.student)))
    return need.split(run.train.world_size) if run.train.shard else need


def views_of(run: ResolvedRun) -> list[tuple[int, int]]:
    """How many views an image has of each size, and their side in pixels; the global ones first."""
    sizes = [(2, run.views.global_crops_size), (run.views.local_crops_number, run.views.local_crops_size)]
    return [(number, side) for number, side in sizes if number]
