"""A run that is set up, and what its loop calls: views, the next step, scores, checkpoints."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from nearfar.ssl import (
    announce,
    checkpoint,
    checkpoint_names,
    compiled,
    device,
    distributed,
    failed_step,
    fork,
    gpus,
    kept,
    memory,
    resume,
    tracking,
)
from nearfar.ssl.backbones import Backbone
from nearfar.ssl.background_save import Saver
from nearfar.ssl.checkpoint import TEACHER
from nearfar.ssl.data import open_loader
from nearfar.ssl.data.loaders.base import Batch, Loader, LoaderOptions
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.transforms.colors import color_views
from nearfar.ssl.data.transforms.normalize import normalize
from nearfar.ssl.defaults import Derived, ResolvedRun, resolve
from nearfar.ssl.device import Compute
from nearfar.ssl.distributed import Ranks
from nearfar.ssl.errors import UserError
from nearfar.ssl.finetune_settings import ResolvedFinetune
from nearfar.ssl.health import CollapseWatch, falling_score, features_lost, nothing_learned, patience
from nearfar.ssl.learner import Learner, Outputs, block_masks, share_batch_norm
from nearfar.ssl.learners import learner_of
from nearfar.ssl.loss_scale import LossScale
from nearfar.ssl.masks import Masks
from nearfar.ssl.optim import adamw_of
from nearfar.ssl.run_folder import START, RunFolder, read_metrics
from nearfar.ssl.run_log import NoLog
from nearfar.ssl.schedule import Schedule
from nearfar.ssl.settings import AnyRun, Run
from nearfar.ssl.sharding import is_sharded, shard
from nearfar.ssl.step import Numbers, Stepper, StepResult
from nearfar.ssl.student_teacher import StudentTeacher

R = TypeVar("R", ResolvedRun, ResolvedFinetune)
L = TypeVar("L", bound=StudentTeacher)
Votes = Callable[[], tuple[float, ...]]


class AnySchedule(Protocol):
    """The values of each step, and when scores are due."""

    @property
    def steps(self) -> int: ...

    def at(self, step: int) -> dict[str, float]: ...

    def scores_due(self, step: int) -> bool: ...


@dataclass(frozen=True)
class Observers:
    """Callbacks by which higher layers observe a run, on its first rank. None may change the run."""

    # First batch, colored views, run folder -> a picture of them (H, W, 3) for TensorBoard, or None.
    views: Callable[[Batch, list[Tensor], Path], np.ndarray | None] | None = None
    # Scores of the teacher's backbone (in a supervised run, of the whole classifier) under the run's settings; None
    # where a stop was requested first.
    probe: Callable[[Any, Any], dict[str, float] | None] | None = None


NO_OBSERVERS = Observers()
T = TypeVar("T", bound="Training[Any, Any]")


@dataclass
class Training(ABC, Generic[R, L]):
    """A run that is set up: all that its loop needs. What is learned, and how, is said by its subclasses:
    `Pretraining` here, and `Finetuning` in finetune.py.
    """

    run: R
    source: Source
    observers: Observers
    folder: RunFolder
    world: Ranks
    compute: Compute
    learner: L
    optimizer: torch.optim.Optimizer
    loader: Loader
    schedule: AnySchedule
    step: int  # steps that are done
    resumed: bool
    description: dict[str, Any]  # what a checkpoint records about itself
    derived: list[Derived]
    warnings: list[str]
    log: NoLog = field(default_factory=NoLog)
    known_bad: set[str] = field(default_factory=set)
    unread: deque[tuple[Batch, int, StepResult]] = field(default_factory=deque)  # steps whose reports are not read yet
    steps_behind: int = 0  # how many of them there may be between two lines of metrics
    lowest_scale: float = math.inf  # of the loss under fp16, in this process
    saved_step: int = 0  # where the last checkpoint of this process was taken
    saved_at: float = field(default_factory=time.monotonic)
    is_best: bool = False  # is the step the best so far, and not saved yet?
    late_save: bool = False  # did the ranks agree in a step after `saved_step` that it is time for one?

    def __post_init__(self) -> None:
        self.stepper = self.stepper_kind(
            self.learner,
            self.optimizer,
            self.run.optim.clip_grad,
            self.compute.autocast,
            self.run.train.accumulate_steps,
        )
        if self.compute.device.type != "cpu":  # where reading the report of the step just started would wait for it
            self.steps_behind = 1
        self.saver = Saver(self._write, lambda text: self.log.say(text), self.run.train.save_in_background)

    # What is learned, and how

    settings: ClassVar[type[AnyRun]]  # as they are resolved
    stepper_kind: ClassVar[type[Stepper]] = Stepper
    exported: ClassVar[str]  # the file of weights that a run leaves beside its checkpoints

    @classmethod
    @abstractmethod
    def resolved(
        cls, run: Any, images: int, cores: int, world_size: int, saved: Any, done: int
    ) -> tuple[R, list[Derived]]:
        """The settings that the run trains with, and which of them were derived.

        saved: those of the run that it continues, which has checkpoints of `done` steps.
        """

    @classmethod
    @abstractmethod
    def built(cls, run: R, source: Source, weights: bool) -> L:
        """The learner, seeded; weights: read backbone.weights, if set."""

    @classmethod
    @abstractmethod
    def optimizer_for(cls, run: R, learner: L) -> torch.optim.Optimizer:
        """The optimizer of the student."""

    @classmethod
    @abstractmethod
    def schedule_for(cls, run: R, steps_per_epoch: int) -> AnySchedule:
        """The values that change from step to step."""

    @classmethod
    @abstractmethod
    def needed(cls, run: R, learner: L, compute: Compute) -> memory.Need:
        """What a step of one rank keeps in memory; asked before anything is split over ranks or compiled."""

    @classmethod
    @abstractmethod
    def description_of(cls, run: R, learner: L, source: Source, rounding: str) -> dict[str, Any]:
        """What a checkpoint records about itself besides its step."""

    @classmethod
    @abstractmethod
    def export(cls, folder: RunFolder, step: int, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        """Write the file of weights from the teacher's tensors, named as in a checkpoint; others are passed over."""

    @abstractmethod
    def started_step(self, views: list[Tensor], values: dict[str, float], votes: Votes) -> StepResult:
        """Start a step."""

    @abstractmethod
    def measured(self, outputs: Any) -> dict[str, float]:
        """What a line of metrics holds of a step's forward pass, on this rank."""

    @abstractmethod
    def warning(self, step: int, measured: dict[str, float]) -> str | None:
        """What is wrong with these numbers, the mean of all ranks', in a sentence; None where nothing is."""

    @abstractmethod
    def progress(self, measured: dict[str, float]) -> str:
        """The one of these numbers that the progress shows."""

    @abstractmethod
    def _score(self) -> bool:
        """Score, on the first rank; True where a stop was requested first."""

    @abstractmethod
    def _not_finite(self, batch: Batch, step: int, numbers: Numbers) -> str:
        """What to tell of a step that was not finite."""

    @abstractmethod
    def verdict(self) -> str | None:
        """One sentence about a finished run; None where there is nothing to say."""

    @abstractmethod
    def what_next(self, finished: bool) -> str:
        """The last line of a run."""

    # What the loop calls

    @property
    def sharded(self) -> bool:
        return is_sharded(next(self.learner.parameters()))

    def log_start(self) -> None:
        lines: list[str] = announce.start_lines(
            self.run, self.derived, self.learner, self.schedule.steps, self.compute, self.step, self.source,
            self.loader.title,
        )  # fmt: skip
        for line in [*self.warnings, *lines]:
            self.log.say(line)
        self.log.settings(self.description["run"])

    def views(self, batch: Batch) -> list[Tensor]:
        """The colored views of a batch, on the device and normalized; shown to the observer in the first step."""
        colored = color_views(batch, self.compute.device)
        if self.step == 0 and self.observers.views and self.world.first:
            picture = self.observers.views(batch, colored, self.folder.path)
            if picture is not None:
                self.log.picture("views", 0, picture)
        return [normalize(group) for group in colored]

    def next_step(
        self, batch: Batch, views: list[Tensor], values: dict[str, float], should_stop: Callable[[], bool]
    ) -> StepResult:
        """Start the next step, on the `views` of a batch; `finish_steps` reads its report."""
        torch.manual_seed(step_seed(self.run.train.seed, self.step, self.world.rank))
        result = self.started_step(
            views, values, lambda: (float(should_stop()), float(len(self.new_bad())), float(self._late_for_save()))
        )
        self.unread.append((batch, self.step, result))
        self.step += 1
        return result

    def new_bad(self) -> list[tuple[str, str]]:
        """Name and reason of each bad image of this rank that is not reported yet."""
        return [item for item in self.loader.bad.items() if item[0] not in self.known_bad]

    def finish_steps(self, behind: int = 0) -> bool:
        """Read the reports of all steps but the latest `behind`, the same on all ranks. Must any rank stop?

        Raises:
            UserError: a step was not finite. Neither it nor any step after it has changed a weight.
        """
        stop = False
        while len(self.unread) > (0 if stop else behind):
            batch, step, result = self.unread.popleft()
            numbers = result.report.read()
            if not numbers.finite:
                raise UserError(self._not_finite(batch, step, numbers))
            if numbers.skipped and numbers.loss_scale < self.lowest_scale:
                self.lowest_scale = numbers.loss_scale
                self.log.say(announce.step_skipped(step, numbers.loss_scale))
            stop_vote, any_bad, save_vote = numbers.votes
            stop = stop or stop_vote > 0
            self.late_save = self.late_save or (save_vote > 0 and step >= self.saved_step)
            for text in distributed.gathered([json.dumps(item) for item in self.new_bad()]) if any_bad else ():
                name, reason = json.loads(text)
                self.log.say(f"Bad image {name}: {reason}. The next readable image is used instead.")
                self.known_bad.add(name)
        return stop

    def score(self) -> bool:
        """Score the teacher, once a step; True on all ranks where a stop was requested first, and the score put off."""
        if not distributed.from_first(lambda: self.observers.probe is not None and not self.folder.scored(self.step)):
            return False
        stopped = self._score()
        if self.run.train.keep_best:
            best = distributed.from_first(lambda: kept.is_best(self.folder.metrics, self.step))
            self.is_best = best and self.step != self.saved_step
        return stopped

    def tell_scores(self, scores: dict[str, float] | None) -> bool:
        """Log the scores of a probe; True where a stop was requested before there were any."""
        if scores:
            self.log.record(self.step, {"epoch": self.step / self.loader.steps_per_epoch, **scores})
            self.log.say(f"step {self.step}: " + ", ".join(f"{k} {v:.{1 + (v <= 1)}f}" for k, v in scores.items()))
        return scores is None

    def save(self) -> None:
        """Write a checkpoint, on the first rank, unless a step whose report is not read yet was not finite."""
        if (self.world.first or self.sharded) and all(result.report.read().finite for _, _, result in self.unread):
            contents = resume.contents(self.learner, self.optimizer)
            if self.world.first:
                self.saver.save(self.step, contents)
            else:
                deque(contents, maxlen=0)  # its part in making them whole
        self.saved_step, self.saved_at, self.late_save = self.step, time.monotonic(), False
        self.is_best = False

    def _write(self, step: int, tensors: dict[str, Tensor]) -> None:
        """In the thread that writes. The metrics come first: no checkpoint may exist before the lines of its steps."""
        with distributed.finishing():
            self.log.sync()
            resume.write(self.folder, step, tensors, self.description, self.run.train)
            self.export(self.folder, step, tensors, self.description)

    def _late_for_save(self) -> bool:
        """By the first rank's clock. While a checkpoint is being written the next one is put off."""
        late = time.monotonic() - self.saved_at > 60 * self.run.train.save_every_minutes
        return self.world.first and late and not self.saver.writing

    def save_due(self) -> bool:
        """The same on all ranks."""
        train, step = self.run.train, self.step
        due = any(every is not None and step % every == 0 for every in (train.save_every_steps, train.keep_every))
        return step == self.schedule.steps or due or self.late_save or self.is_best


class Pretraining(Training[ResolvedRun, Learner]):
    """Student and teacher on unlabeled images: DINO, or distillation."""

    settings = ResolvedRun
    exported = TEACHER
    schedule: Schedule

    def __post_init__(self) -> None:
        super().__post_init__()
        first = next((line for line in read_metrics(self.folder.metrics) if "feature_std" in line), None)
        self.block_masks = block_masks(self.run, self.learner.student.backbone.patch_size, self.world.rank)
        self.told = ""
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
        return adamw_of(run.optim, learner.student)

    @classmethod
    def schedule_for(cls, run: ResolvedRun, steps_per_epoch: int) -> Schedule:
        return Schedule(run, steps_per_epoch)

    @classmethod
    def needed(cls, run: ResolvedRun, learner: Learner, compute: Compute) -> memory.Need:
        return needed(learner, run, compute)

    @classmethod
    def description_of(cls, run: ResolvedRun, learner: Learner, source: Source, rounding: str) -> dict[str, Any]:
        return resume.self_description(run, learner, source.fingerprint, rounding)

    @classmethod
    def export(cls, folder: RunFolder, step: int, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        prefix = "learner/teacher.backbone."
        backbone = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        resume.export(folder, step, backbone, description)

    def started_step(self, views: list[Tensor], values: dict[str, float], votes: Votes) -> StepResult:
        if self.schedule.takes_anchor(self.step):
            self.learner.take_anchor()
        return self.stepper(
            views,
            values,
            masks=self.masks(),
            freeze_last_layer=self.schedule.prototypes_frozen(self.step),
            freeze_backbone=self.schedule.backbone_frozen(self.step),
            votes=votes,
        )

    def masks(self) -> list[Masks]:
        """Of the coming step, for each of its parts; none without iBOT."""
        if self.block_masks is None:
            return []
        return self.block_masks.of_step(self.step, self.compute.device, self.run.train.accumulate_steps)

    def measured(self, outputs: Outputs) -> dict[str, float]:
        health = self.learner.health(outputs)
        self.told = next(iter(health))  # the most telling one
        return health | {name: float(part) for name, part in outputs.parts.items()}

    def warning(self, step: int, measured: dict[str, float]) -> str | None:
        return self.watch.update(step, measured)

    def progress(self, measured: dict[str, float]) -> str:
        return f"{self.told} {measured[self.told]:.2f}"

    def _score(self) -> bool:
        backbone = resume.whole_teacher(self.learner, self.world)
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


def set_up(kind: type[T], run: AnyRun, source: Source, observers: Observers, folder: RunFolder, world: Ranks) -> T:
    """Everything as it stands at the step that the run continues from, and its folder made ready for it.

    kind: what is learned, `Pretraining` or another.

    Raises:
        UserError: settings, data, folder or checkpoint are wrong. Then nothing in the folder was changed.
    """
    tracking.check(run.track)
    resolved, derived = _settings(kind, run, folder, len(source), world)
    torch.set_num_threads(resolved.train.threads)
    warnings: list[str] = []
    saved = resume.latest(folder, world, warnings)
    origin = fork.read(resolved.train.start_from) if saved is None and resolved.train.start_from else None
    learner = kind.built(resolved, source, saved is None)
    compute = device.choose(resolved.train.device, resolved.train.precision, learner.teacher.backbone.embed_dim)
    # Student, its gradients and AdamW's two moments; the teacher; what stays as it is.
    weights = 4 * _size(learner.student) + _size(learner.teacher) + sum(map(_size, learner.frozen))
    gpus.require_room(compute.device, weights, "the weights and the optimizer's state")
    prepare_learner(learner, resolved, compute)
    if compute.device.type == "cpu":
        device.keep_freed_memory()
    loader = loader_of(resolved, source, world, compute.device)
    need, free = kind.needed(resolved, learner, compute), memory.free(compute.device)
    if world.size > 1:
        _spread(learner, resolved.train.shard)
    optimizer = kind.optimizer_for(resolved, learner)
    if origin:
        begun = fork.begin(origin, learner, optimizer, resolved, source.fingerprint, loader.steps_per_epoch)
    else:
        begun = fork.Begun(resume.restore(saved, learner, optimizer, source.fingerprint) if saved else 0, [])
    step, warnings = begun.step, [*warnings, *begun.said]
    if step < resolved.train.epochs * loader.steps_per_epoch:
        warnings.append(announce.memory_line(resolved, need, free))
    compute = compile_learner(learner, resolved, compute, warnings)
    description = kind.description_of(resolved, learner, source, compute.rounding)
    description["lineage"] = (saved.state.get("lineage") or []) if saved else fork.lineage(origin, resolved)
    if before := saved or origin:
        warnings += announce.continuation_changes(before.state, resolved, compute.rounding)
        warnings += announce.changed_versions(before.state, description["versions"])
    if world.first:
        folder.record(resolved)
        folder.forget_metrics_after(step)
    if saved:
        _export_what_lacks(kind, folder, step, learner, optimizer, description, world)
    else:
        _export_start(resolved, folder, step, learner, description, world)
    return kind(
        run=resolved,
        source=source,
        observers=observers,
        folder=folder,
        world=world,
        compute=compute,
        learner=learner,
        optimizer=optimizer,
        loader=loader,
        schedule=kind.schedule_for(resolved, loader.steps_per_epoch),
        step=step,
        resumed=saved is not None,
        description=description,
        derived=derived,
        warnings=warnings,
    )


def _spread(learner: StudentTeacher, sharded: bool) -> None:
    """Make a learner one of several: batch norm over all ranks' images, and its tensors in shards where set."""
    share_batch_norm(learner)
    if sharded:
        shard(learner.student, learns=True)
        shard(learner.teacher, learns=False)


def _export_what_lacks(
    kind: type[Training[Any, Any]],
    folder: RunFolder,
    step: int,
    learner: StudentTeacher,
    optimizer: torch.optim.Optimizer,
    description: dict[str, Any],
    world: Ranks,
) -> None:
    """Export again where a run that continues was killed, or out of space, between the two files of a save."""
    if distributed.from_first(lambda: folder.exported_step(kind.exported) != step):
        contents = resume.contents(learner, optimizer)  # all ranks go through it, to make sharded ones whole
        teacher = {name: tensor for name, tensor in contents if name.startswith("learner/teacher.")}
        if world.first:
            kind.export(folder, step, teacher, description)


def _export_start(
    run: AnyRun, folder: RunFolder, step: int, learner: StudentTeacher, description: dict[str, Any], world: Ranks
) -> None:
    """The backbone that a pretraining run begins with, where it is trained already: to compare its features with."""
    if isinstance(run, Run) and fork.begins_with_weights(run):
        backbone = resume.teacher_backbone(learner)
        if world.first:
            checkpoint.export_tensors(folder.path / START, backbone, description | {"step": step})


def _size(module: torch.nn.Module) -> int:
    """Bytes of the parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def prepare_learner(learner: StudentTeacher, run: ResolvedRun | ResolvedFinetune, compute: Compute) -> None:
    """To the device, with a scaled loss under fp16, and with activations that are computed twice where set."""
    if compute.fp16:
        learner.loss_scale = LossScale()
    if run.train.checkpoint_activations:
        memory.recompute_activations(learner.student.backbone)
    learner.to(compute.device)


def needed(learner: Learner, run: ResolvedRun, compute: Compute) -> memory.Need:
    """What a step of one rank keeps in memory; to be asked before anything is split over ranks or compiled."""
    sizes = [(2, run.views.global_crops_size), (run.views.local_crops_number, run.views.local_crops_size)]
    images = run.train.batch_size // run.train.world_size // run.train.accumulate_steps
    views = [(number, side) for number, side in sizes if number]
    need = memory.estimate(learner, views, images, compute.autocast, run.train.checkpoint_activations)
    return need.split(run.train.world_size) if run.train.shard else need


def compile_learner(
    learner: StudentTeacher, run: ResolvedRun | ResolvedFinetune, compute: Compute, warnings: list[str]
) -> Compute:
    """Compile what student and teacher do in training, as `train.compile` says. Returns how the run computes now."""
    backbones, wanted = (learner.student.backbone, learner.teacher.backbone), run.train.compile
    if run.train.shard and wanted == "auto":
        wanted = False  # compiled blocks of sharded networks were never tried
    return compute._replace(compiled=compiled.switch_on(backbones, wanted, compute.device, warnings))


def _settings(
    kind: type[Training[Any, Any]], run: AnyRun, folder: RunFolder, images: int, world: Ranks
) -> tuple[Any, list[Derived]]:
    """Resolved on the first rank, so that all have the same."""

    def resolved() -> list[Any]:
        saved = folder.saved(run.as_asked())
        done = checkpoint_names.newest_step(folder.checkpoints)
        cores = world.cores or distributed.available_cores()
        settings, derived = kind.resolved(run, images, cores, world.size, saved, done)
        return [settings.model_dump(mode="json"), [list(each) for each in derived]]

    settings, derived = distributed.from_first(resolved)
    return kind.settings.model_validate(settings), [Derived(*each) for each in derived]


def loader_of(run: ResolvedRun | ResolvedFinetune, source: Source, world: Ranks, target: torch.device) -> Loader:
    """The loader of one rank of the run, which makes views for the device `target`."""
    options = LoaderOptions(
        batch_size=run.train.batch_size // world.size,
        epochs=run.train.epochs,
        seed=run.train.seed,
        workers=run.data.workers,
        rank=world.rank,
        world_size=world.size,
        max_bad_fraction=run.data.max_bad_fraction,
        min_side=run.data.min_side,
    )
    return open_loader(source, run.views, options, loader=run.data.loader, color=run.data.color_on, device=target)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of a step's drop-path: no generator state is carried from step to step."""
    return (seed % 2**20 << 43) + (rank % 2**12 << 31) + step % 2**31
