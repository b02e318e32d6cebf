"""Supervised training in the loop of `train`: labeled images -> mixed views -> logits -> loss -> step -> checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nearfar.ssl import checkpoint
from nearfar.ssl.checkpoint import CLASSIFIER
from nearfar.ssl.data.loaders.base import Batch
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning import memory
from nearfar.ssl.learning.classifier import ClassifierLearner, ClassifierOutputs, build_classifier_learner
from nearfar.ssl.learning.masks import Masks
from nearfar.ssl.learning.mixing import Mixing
from nearfar.ssl.learning.optim import adamw
from nearfar.ssl.learning.schedule import warmup_cosine
from nearfar.ssl.learning.step import Numbers, Stepper, StepResult
from nearfar.ssl.parallel import distributed
from nearfar.ssl.parallel.device import Compute
from nearfar.ssl.parallel.distributed import ALONE, Ranks
from nearfar.ssl.run import announce, resume
from nearfar.ssl.run.run_folder import RunFolder
from nearfar.ssl.settings.defaults import Derived
from nearfar.ssl.settings.finetune_settings import FinetuneRun, ResolvedFinetune, resolve_finetune
from nearfar.ssl.train import Outcome, carry_out
from nearfar.ssl.training import NO_OBSERVERS, Observers, Training, Votes

if TYPE_CHECKING:
    from rich.console import Console


def finetune(
    run: FinetuneRun,
    source: Source,
    observers: Observers = NO_OBSERVERS,
    should_stop: Callable[[], bool] = lambda: False,
    console: Console | None = None,
    world: Ranks = ALONE,
) -> Outcome:
    """Train a classifier on the labeled images of `source`, in the run's folder, from its last checkpoint to its end,
    as one of the ranks of `world`. Continuing is bit-exact as in `train.pretrain`, whose loop this is.

    Raises:
        UserError: labels, settings, data, folder, disk, memory or checkpoint are wrong, or the loss is not finite.
        PeerError: another rank ended.
    """
    class_names(source, run.data.path)
    return carry_out(Finetuning, run, source, observers, should_stop, console, world)


def class_names(source: Source, path: str) -> list[str]:
    """The names of the classes, in the order of their numbers: those of the source, or the numbers themselves.

    Raises:
        UserError: no labels, fewer than two classes, or classes without an image.
    """
    if source.labels is None:
        raise UserError(
            f"The images of {path} have no labels, and a classifier needs them: class folders, a .txt list with a "
            "label after a tab, or an .npz or a .beton that was made with labels."
        )
    found, low = np.unique(source.labels), int(source.labels.min(initial=0))
    if low < 0:
        raise UserError(f"The labels of {path} must be class numbers from 0 on, but {low} is among them.")
    names = list(source.classes or [])
    names += [str(number) for number in range(len(names), int(found.max(initial=-1)) + 1)]
    if len(found) < 2:
        only = (
            f"all {len(source):,} images are of class {names[int(found[0])]}" if len(found) else "there are no images"
        )
        raise UserError(f"A classifier needs two classes or more, but in {path} {only}.")
    if empty := sorted(set(range(len(names))) - set(found.tolist())):
        some = ", ".join(names[number] for number in empty[:5]) + (" and others" if len(empty) > 5 else "")
        raise UserError(
            f"{len(empty)} of the {len(names)} classes of {path} have no image: {some}. Add images to them, or remove "
            "them (class folders), or number the classes without gaps."
        )
    return names


def labels_as(classes: list[str], source: Source, path: str) -> np.ndarray:
    """The labels of other images (n,) as numbers of `classes`: by name where they have names, else as they are.

    Raises:
        UserError: no labels, or classes that are not among these.
    """
    if source.labels is None:
        raise UserError(f"The images of {path} have no labels, so a classifier cannot be scored on them.")
    present = np.unique(source.labels).tolist()
    if source.classes is None:
        unknown = [str(number) for number in present if not 0 <= number < len(classes)]
        table = np.arange(len(classes))
    else:
        unknown = [source.classes[number] for number in present if source.classes[number] not in classes]
        table = np.array([classes.index(name) if name in classes else -1 for name in source.classes])
    if unknown:
        some = ", ".join(unknown[:5]) + (" and others" if len(unknown) > 5 else "")
        raise UserError(
            f"{len(unknown)} classes of {path} are not among those that the classifier was trained on: {some}. It "
            f"knows {', '.join(classes[:10])}{' and others' if len(classes) > 10 else ''}."
        )
    return np.asarray(table[source.labels])


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
