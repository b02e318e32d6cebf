"""Training with labels, in the loop of `train`: labeled images -> mixed views -> logits -> loss -> checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nearfar.ssl import checkpoint
from nearfar.ssl.checkpoint import CLASSIFIER
from nearfar.ssl.data.labels import class_names
from nearfar.ssl.data.loaders.base import Batch
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.learning import memory
from nearfar.ssl.learning.classifier import ClassifierLearner, ClassifierOutputs, build_classifier_learner
from nearfar.ssl.learning.masks import Masks
from nearfar.ssl.learning.mixing import Mixing
from nearfar.ssl.learning.optim import adamw
from nearfar.ssl.learning.schedule import warmup_cosine
from nearfar.ssl.learning.step import Numbers, Stepper, StepResult
from nearfar.ssl.parallel import distributed
from nearfar.ssl.parallel.device import Compute
from nearfar.ssl.run import announce, resume
from nearfar.ssl.run.run_folder import RunFolder
from nearfar.ssl.settings.defaults import Derived
from nearfar.ssl.settings.finetune_settings import FinetuneRun, ResolvedFinetune, resolve_finetune
from nearfar.ssl.training.base import Training, Votes


@dataclass(frozen=True)
class FinetuneSchedule:
    """Learning rate (warm-up, then half a cosine), weight decay and momentum of the average, by the step alone."""

    run: ResolvedFinetune
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        return self.run.train.epochs * self.steps_per_epoch

    def at(self, step: int) -> dict[str, float]:
        optim = self.run.optim
        warmup = round(optim.warmup_epochs * self.steps_per_epoch)
        return {
            "lr": warmup_cosine(optim.lr, optim.min_lr, step, self.steps, warmup),
            "weight_decay": optim.weight_decay,
            "teacher_momentum": optim.ema_decay,
        }

    def scores_due(self, step: int) -> bool:
        every = self.run.eval.every_epochs
        return step == self.steps or (every > 0 and step % max(1, round(every * self.steps_per_epoch)) == 0)


class ClassifierStepper(Stepper):
    """`Stepper` whose views are one group of images and their targets: [(1, B, 3, s, s), (1, B, C)]."""

    def forward(self, views: list[Tensor], values: dict[str, float], masks: Masks | None) -> Any:
        images, targets = views
        return self.learner(images[0], targets[0])


class Finetuning(Training[ResolvedFinetune, ClassifierLearner]):
    """A classifier that learns from labels."""

    settings = ResolvedFinetune
    stepper_kind = ClassifierStepper
    exported = CLASSIFIER

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mixing = Mixing(self.run.classifier, len(self.learner.student.classes), self.run.train.seed)

    @classmethod
    def resolved(
        cls, run: FinetuneRun, images: int, cores: int, world_size: int, saved: FinetuneRun | None, done: int
    ) -> tuple[ResolvedFinetune, list[Derived]]:
        return resolve_finetune(run, images, cores, world_size=world_size, saved=saved)

    @classmethod
    def built(cls, run: ResolvedFinetune, source: Source, weights: bool) -> ClassifierLearner:
        return build_classifier_learner(run, class_names(source, run.data.path), weights)

    @classmethod
    def optimizer_for(cls, run: ResolvedFinetune, learner: ClassifierLearner) -> torch.optim.Optimizer:
        return adamw(learner.student, run.optim.layerwise_decay, run.optim.patch_embed_lr_mult)

    @classmethod
    def schedule_for(cls, run: ResolvedFinetune, steps_per_epoch: int) -> FinetuneSchedule:
        return FinetuneSchedule(run, steps_per_epoch)

    @classmethod
    def needed(cls, run: ResolvedFinetune, learner: ClassifierLearner, compute: Compute) -> memory.MemoryNeed:
        images = run.train.batch_size // run.train.world_size // run.train.accumulate_steps
        recompute = run.train.checkpoint_activations
        return memory.estimate_classifier(learner, run.augment.size, images, compute.autocast, recompute)

    @classmethod
    def trial_loss(cls, run: ResolvedFinetune, learner: ClassifierLearner, images: int) -> Tensor:
        classes, device = len(learner.student.classes), next(learner.parameters()).device
        black = torch.zeros((images, 3, run.augment.size, run.augment.size), device=device)
        outputs: ClassifierOutputs = learner(black, torch.full((images, classes), 1 / classes, device=device))
        return outputs.loss

    @classmethod
    def description_of(
        cls, run: ResolvedFinetune, learner: ClassifierLearner, source: Source, rounding: str
    ) -> dict[str, Any]:
        described = {"classes": learner.student.classes, "pooling": run.classifier.pooling}
        return resume.self_description(run, learner, source.fingerprint, rounding) | {"classifier": described}

    @classmethod
    def export(cls, folder: RunFolder, step: int, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        prefix = "learner/teacher."
        network = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        checkpoint.export_tensors(folder.path / CLASSIFIER, network, description | {"step": step})

    def views(self, batch: Batch) -> list[Tensor]:
        """The one view of each image, mixed, and the targets."""
        (images,) = super().views(batch)
        assert batch.label is not None  # `finetune` has looked
        labels = torch.from_numpy(batch.label).to(images.device, non_blocking=True)
        step = batch.epoch * self.loader.steps_per_epoch + batch.step
        mixed, targets = self.mixing(images[0], labels, step)
        return [mixed[None], targets[None]]

    def started_step(self, views: list[Tensor], values: dict[str, float], votes: Votes) -> StepResult:
        return self.stepper(views, values, votes=votes)

    def measured(self, outputs: ClassifierOutputs) -> dict[str, float]:
        return {"train_top1": 100 * float(outputs.right)}

    def warning(self, step: int, measured: dict[str, float]) -> str | None:
        return None

    def progress(self, measured: dict[str, float]) -> str:
        return f"top-1 {measured['train_top1']:.0f} %"

    def _score(self) -> bool:
        def on_first() -> bool:
            assert self.observers.probe is not None
            return self.tell_scores(self.observers.probe(self.learner.teacher, self.run))

        return distributed.from_first(on_first)

    def _not_finite(self, batch: Batch, step: int, numbers: Numbers) -> str:
        first = [self.source.name(int(index)) for index in batch.index[:4]]
        return announce.not_finite(step, numbers, first, None, self.run)

    def verdict(self) -> str | None:
        return None

    def what_next(self, finished: bool) -> str:
        if not finished:
            return f"Stopped after step {self.step} of {self.schedule.steps}. The same command continues from here."
        return (
            f"Finished after {self.schedule.steps:,} steps: {self.run.path / CLASSIFIER}. Next: `nearfar predict "
            f"{self.run.path} IMAGES --csv answers.csv`."
        )
