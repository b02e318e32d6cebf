"""A run that is set up, and what its loop calls: views, the next step, scores, checkpoints."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nearfar.ssl import announce, device, distributed, failed_step, gpus, resume, tracking
from nearfar.ssl.backbones import Backbone
from nearfar.ssl.data import open_loader
from nearfar.ssl.data.loaders.base import Batch, Loader, LoaderOptions
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.transforms.colors import color_views
from nearfar.ssl.data.transforms.normalize import normalize
from nearfar.ssl.defaults import Derived, ResolvedRun, resolve
from nearfar.ssl.device import Compute
from nearfar.ssl.distributed import Ranks
from nearfar.ssl.errors import UserError
from nearfar.ssl.health import falling_score, nothing_learned
from nearfar.ssl.learner import Learner, build_learner, share_batch_norm
from nearfar.ssl.optim import adamw
from nearfar.ssl.run_folder import RunFolder, read_metrics
from nearfar.ssl.run_log import NoLog
from nearfar.ssl.schedule import Schedule
from nearfar.ssl.settings import Run
from nearfar.ssl.step import Numbers, Stepper, StepResult


@dataclass(frozen=True)
class Observers:
    """Callbacks by which higher layers observe a run, on its first rank. None may change the run."""

    # First batch, colored views, run folder -> a picture of them (H, W, 3) for TensorBoard, or None.
    views: Callable[[Batch, list[Tensor], Path], np.ndarray | None] | None = None
    # Scores of the teacher; None where a stop was requested first.
    probe: Callable[[Backbone, ResolvedRun], dict[str, float] | None] | None = None


NO_OBSERVERS = Observers()


@dataclass
class Training:
    """A run that is set up: all that its loop needs."""

    run: ResolvedRun
    source: Source
    observers: Observers
    folder: RunFolder
    world: Ranks
    compute: Compute
    learner: Learner
    optimizer: torch.optim.Optimizer
    loader: Loader
    schedule: Schedule
    step: int  # steps that are done
    resumed: bool
    description: dict[str, Any]  # what a checkpoint records about itself
    derived: list[Derived]
    warnings: list[str]
    log: NoLog = field(default_factory=NoLog)
    known_bad: set[str] = field(default_factory=set)
    unread: deque[tuple[Batch, int, StepResult]] = field(default_factory=deque)  # steps whose reports are not read yet
    steps_behind: int = 0  # how many of them there may be between two lines of metrics

    def __post_init__(self) -> None:
        self.stepper = Stepper(
            self.learner,
            self.optimizer,
            self.run.optim.clip_grad,
            self.compute.autocast,
            self.run.train.accumulate_steps,
        )
        if self.compute.device.type != "cpu":  # where reading the report of the step just started would wait for it
            self.steps_behind = 1

    def log_start(self) -> None:
        lines = announce.start_lines(
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
        result = self.stepper(
            views,
            values,
            freeze_last_layer=self.schedule.prototypes_frozen(self.step),
            votes=lambda: (float(should_stop()), float(len(self.new_bad()))),
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
            stop_vote, any_bad = numbers.votes
            stop = stop or stop_vote > 0
            for text in distributed.gathered([json.dumps(item) for item in self.new_bad()]) if any_bad else ():
                name, reason = json.loads(text)
                self.log.say(f"Bad image {name}: {reason}. The next readable image is used instead.")
                self.known_bad.add(name)
        return stop

    def _not_finite(self, batch: Batch, step: int, numbers: Numbers) -> str:
        """Save the batch and the state before it for `nearfar replay`, and say what happened."""
        record = failed_step.save(
            self.folder.path, step, numbers, batch, self.source, self.learner, self.optimizer, self.description
        )
        first = [self.source.name(int(index)) for index in batch.index[:4]]
        return announce.not_finite(step, numbers.loss, numbers.grad_norm, first, record, self.run)

    def score(self) -> bool:
        """Score the teacher, once a step; True on all ranks where a stop was requested first, and the score put off."""
        return distributed.from_first(self._score)

    def _score(self) -> bool:
        if self.observers.probe is None or self.folder.scored(self.step):
            return False
        self.learner.teacher.eval()
        scores = self.observers.probe(self.learner.teacher.backbone, self.run)
        self.learner.teacher.train()
        if scores:
            self.log.record(self.step, {"epoch": self.step / self.loader.steps_per_epoch, **scores})
            self.log.say(f"step {self.step}: " + ", ".join(f"{k} {v:.1f}" for k, v in scores.items()))
            if message := falling_score(read_metrics(self.folder.metrics)):
                self.log.say(message)
        return scores is None

    def save(self) -> None:
        """Write a checkpoint, on the first rank, unless a step whose report is not read yet was not finite."""
        if self.world.first and all(result.report.read().finite for _, _, result in self.unread):
            with distributed.finishing():
                self.log.sync()
                resume.save(
                    self.folder, self.step, self.learner, self.optimizer, self.description, self.run.train.keep_last
                )

    def save_due(self, saved_at: float) -> bool:
        every = self.run.train.save_every_steps
        return (
            self.step == self.schedule.steps
            or (every is not None and self.step % every == 0)
            or time.monotonic() - saved_at > 60 * self.run.train.save_every_minutes
        )

    def verdict(self) -> str | None:
        """One sentence where a finished run learned little; None elsewhere."""
        rows = 2 * self.run.train.batch_size // self.world.size
        most = min(rows, self.learner.teacher.backbone.embed_dim)
        if not self.world.first:
            return None
        return nothing_learned(read_metrics(self.folder.metrics), most, self.run.head.batch_norm)


def set_up(run: Run, source: Source, observers: Observers, folder: RunFolder, world: Ranks) -> Training:
    """Everything as it stands at the step that the run continues from, and its folder made ready for it.

    Raises:
        UserError: settings, data, folder or checkpoint are wrong. Then nothing in the folder was changed.
    """
    tracking.check(run.track)
    resolved, derived = _settings(run, folder, len(source), world)
    torch.set_num_threads(resolved.train.threads)
    warnings: list[str] = []
    saved = resume.latest(folder, world, warnings)
    learner = build_learner(resolved, weights=saved is None)
    compute = device.choose(resolved.train.device, resolved.train.precision, learner.teacher.backbone.embed_dim)
    # Student, its gradients and AdamW's two moments; the teacher.
    weights = 4 * _size(learner.student) + _size(learner.teacher)
    gpus.require_room(compute.device, weights, "the weights and the optimizer's state")
    learner.to(compute.device)
    if compute.device.type == "cpu":
        device.keep_freed_memory()
    loader = loader_of(resolved, source, world, compute.device)
    if world.size > 1:
        share_batch_norm(learner)
    optimizer = adamw(learner.student)
    step = resume.restore(saved, learner, optimizer, source.fingerprint) if saved else 0
    description = resume.self_description(resolved, learner, source.fingerprint, compute.precision)
    if saved:
        warnings += announce.continuation_changes(saved.state, resolved, compute.precision)
        warnings += announce.changed_versions(saved.state, description["versions"])
    if world.first:
        folder.record(resolved)
        folder.forget_metrics_after(step)
        if saved and folder.exported_step() != step:  # killed, or out of space, between the two files of a save
            resume.export(folder, step, learner, description)
    return Training(
        run=resolved,
        source=source,
        observers=observers,
        folder=folder,
        world=world,
        compute=compute,
        learner=learner,
        optimizer=optimizer,
        loader=loader,
        schedule=Schedule(resolved, loader.steps_per_epoch),
        step=step,
        resumed=saved is not None,
        description=description,
        derived=derived,
        warnings=warnings,
    )


def _size(module: torch.nn.Module) -> int:
    """Bytes of the parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _settings(run: Run, folder: RunFolder, images: int, world: Ranks) -> tuple[ResolvedRun, list[Derived]]:
    """Resolved on the first rank, so that all have the same."""

    def resolved() -> list[Any]:
        settings, derived = resolve(
            run,
            images,
            world.cores or distributed.available_cores(),
            world_size=world.size,
            saved=folder.saved_settings(),
        )
        return [settings.model_dump(mode="json"), [list(each) for each in derived]]

    settings, derived = distributed.from_first(resolved)
    return ResolvedRun.model_validate(settings), [Derived(*each) for each in derived]


def loader_of(run: ResolvedRun, source: Source, world: Ranks, target: torch.device) -> Loader:
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
