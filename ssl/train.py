"""The loop: images -> views -> tokens -> loss -> step -> checkpoint. Start again with the same run to continue it."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from nearfar.ssl import announce, device, distributed, resume
from nearfar.ssl.backbones import Backbone
from nearfar.ssl.config import Run
from nearfar.ssl.data import open_loader
from nearfar.ssl.data.loaders.base import Batch, Loader, LoaderOptions
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.transforms.colors import color_views
from nearfar.ssl.data.transforms.normalize import normalize
from nearfar.ssl.defaults import Derived, ResolvedRun, resolve
from nearfar.ssl.device import Compute
from nearfar.ssl.distributed import ALONE, Ranks
from nearfar.ssl.errors import UserError
from nearfar.ssl.health import CollapseWatch, nothing_learned, teacher_health
from nearfar.ssl.learner import Learner, build_learner, share_batch_norm
from nearfar.ssl.optim import adamw
from nearfar.ssl.run_folder import RunFolder, read_metrics
from nearfar.ssl.run_log import NoLog, RunLog
from nearfar.ssl.schedule import Schedule
from nearfar.ssl.step import Stepper, Trained


@dataclass(frozen=True)
class Observers:
    """What the floors above want to see of a run, on its first rank. None of it may change the run."""

    # First batch, colored views, run folder -> a picture of them (H, W, 3) for TensorBoard, or None.
    views: Callable[[Batch, list[Tensor], Path], np.ndarray | None] | None = None
    # Scores of the teacher; None: a stop came first.
    probe: Callable[[Backbone, ResolvedRun], dict[str, float] | None] | None = None


@dataclass(frozen=True)
class Outcome:
    folder: Path
    step: int
    steps: int
    seconds: float

    @property
    def finished(self) -> bool:
        return self.step >= self.steps


def pretrain(
    run: Run,
    source: Source,
    observers: Observers = Observers(),
    should_stop: Callable[[], bool] = lambda: False,
    console: Console | None = None,
    world: Ranks = ALONE,
) -> Outcome:
    """Train `run` on `source` in its folder, from where it stands to its end, as one of the ranks of `world`.

    `should_stop` is asked in every step; True on any rank saves a checkpoint after that step, or on a GPU after the
    next one, and returns. Continuing is bit-exact on a CPU in float32 on as many ranks: weights, optimizer and center
    come from the checkpoint, everything else is a function of the step.

    Raises:
        UserError: settings, data, folder, disk, memory or checkpoint are wrong, or the loss is no longer finite.
        PeerError: another rank ended.
    """
    console = console or Console(quiet=not world.first)
    with distributed.joined(world), _memory_in_words(), RunFolder(run.path, owns=world.first) as folder:
        training = set_up(run, source, observers, folder, world)
        steps, start = training.schedule.steps, training.step
        with RunLog(folder.path, steps, start, console) if world.first else NoLog() as log:
            training.log = log
            training.log_start()
            begun = time.monotonic()
            _loop(training, should_stop)
            finished = training.step >= steps
            if start < steps:
                if finished and (words := training.verdict()):
                    log.say(words)
                log.say(announce.what_next(training.run, finished, training.step, steps))
            return Outcome(folder.path, training.step, steps, time.monotonic() - begun)


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
    description: dict[str, Any]  # what a checkpoint says of itself
    derived: list[Derived]
    warnings: list[str]
    log: NoLog = field(default_factory=NoLog)
    known_bad: set[str] = field(default_factory=set)
    unread: deque[tuple[Batch, int, Trained]] = field(default_factory=deque)  # steps that nobody has asked about yet
    steps_behind: int = 0  # how many of them may stay so between two lines of metrics

    def __post_init__(self) -> None:
        self.stepper = Stepper(
            self.learner,
            self.optimizer,
            self.run.optim.clip_grad,
            self.compute.autocast,
            self.run.train.accumulate_steps,
        )
        if self.compute.device.type != "cpu":  # there, asking about the step just started would wait for it
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

    def train(self, batch: Batch, values: dict[str, float], should_stop: Callable[[], bool]) -> Trained:
        """Start the next step; `settle` tells what came of it."""
        views = self.views(batch)
        torch.manual_seed(_step_seed(self.run.train.seed, self.step, self.world.rank))
        trained = self.stepper(
            views,
            values,
            freeze_last_layer=self.schedule.prototypes_frozen(self.step),
            votes=lambda: (float(should_stop()), float(len(self.new_bad()))),
        )
        self.unread.append((batch, self.step, trained))
        self.step += 1
        return trained

    def new_bad(self) -> list[tuple[str, str]]:
        """Name and reason of each bad image of this rank that was not told of yet."""
        return [item for item in self.loader.bad.items() if item[0] not in self.known_bad]

    def settle(self, behind: int = 0) -> bool:
        """Ask about all steps but the latest `behind`, the same on all ranks. Does any rank have to stop?

        Raises:
            UserError: a step was not finite. Neither it nor any step after it has changed a weight.
        """
        stop = False
        while len(self.unread) > (0 if stop else behind):
            batch, step, trained = self.unread.popleft()
            numbers = trained.report.read()
            if not numbers.finite:
                raise UserError(
                    announce.not_finite(step, numbers.loss, numbers.grad_norm, batch, self.source, self.folder.path)
                )
            stop_vote, any_bad = numbers.votes
            stop = stop or stop_vote > 0
            for text in distributed.gathered([json.dumps(item) for item in self.new_bad()]) if any_bad else ():
                name, reason = json.loads(text)
                self.log.say(f"Bad image {name}: {reason}. The next readable image takes its place.")
                self.known_bad.add(name)
        return stop

    def score(self) -> bool:
        """Score the teacher as it is, once; True on all ranks where a stop came first and leaves that to the next
        start.
        """
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
        return scores is None

    def save(self) -> None:
        """Write a checkpoint, on the first rank, unless a step that `settle` has yet to ask about was not finite."""
        if self.world.first and all(trained.report.read().finite for _, _, trained in self.unread):
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
        """In one sentence, that a finished run learned little; None where nothing says so."""
        rows = 2 * self.run.train.batch_size // self.world.size
        most = min(rows, self.learner.teacher.backbone.embed_dim)
        return nothing_learned(read_metrics(self.folder.metrics), most) if self.world.first else None


class Meter:
    """Speed since the last line of metrics, and whether the teacher collapses."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.watch = CollapseWatch(grace=training.schedule.steps // 10)
        self.restart()

    def restart(self) -> None:
        self.waited, self.since, self.first_step = 0.0, time.monotonic(), self.training.step

    def waiting(self, batches: Iterator[Batch]) -> Batch:
        asked = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - asked
        return batch

    def log(self, trained: Trained, values: dict[str, float]) -> None:
        """A line of metrics, the progress, and a collapse that lasts."""
        training, step, outputs = self.training, self.training.step, trained.outputs
        numbers = trained.report.read()
        health = teacher_health(outputs.teacher_probabilities, outputs.teacher_features)
        health = distributed.mean_of(health | {name: float(part) for name, part in outputs.parts.items()})
        seconds = max(1e-9, time.monotonic() - self.since)
        speed = {
            "img_per_s": (step - self.first_step) * training.run.train.batch_size / seconds,
            "data_wait": self.waited / seconds,
            "time": time.time(),
        }
        measured = {"loss": numbers.loss, "grad_norm": numbers.grad_norm, **values, **health}
        training.log.record(step, {"epoch": step / training.loader.steps_per_epoch, **measured, **speed})
        training.log.progress(
            step,
            f"loss {numbers.loss:.3f}  {speed['img_per_s']:.0f} img/s  "
            f"waits {100 * speed['data_wait']:.0f} %  entropy {health['entropy']:.2f}",
        )
        if message := self.watch.update(step, health):
            training.log.say(message)
        self.restart()


def _loop(training: Training, should_stop: Callable[[], bool]) -> None:
    """From the step that `training` stands at to the last one, or to the first at which any rank is to stop."""
    schedule, run, meter = training.schedule, training.run, Meter(training)
    if training.step >= schedule.steps:
        if training.resumed and schedule.scores_due(training.step):
            training.score()
        return
    saved_at = time.monotonic()
    training.loader.seek(*divmod(training.step, training.loader.steps_per_epoch))
    batches = iter(training.loader)
    stop = training.resumed and schedule.scores_due(training.step) and training.score()
    while training.step < schedule.steps and not stop:
        batch = meter.waiting(batches)
        values = schedule.at(training.step)
        trained = training.train(batch, values, should_stop)
        logs = training.step % run.train.log_every_steps == 0 or training.step == schedule.steps
        stop = training.settle(0 if logs or schedule.scores_due(training.step) else training.steps_behind)
        if logs:
            meter.log(trained, values)
        if schedule.scores_due(training.step) and not stop:
            stop = training.score()
            meter.restart()
        if stop or training.save_due(saved_at):
            training.save()
            saved_at = time.monotonic()


def set_up(run: Run, source: Source, observers: Observers, folder: RunFolder, world: Ranks) -> Training:
    """Everything as it stands at the step that the run continues from, and its folder made ready for it.

    Raises:
        UserError: settings, data, folder or checkpoint are wrong. Then nothing in the folder was changed.
    """
    resolved, derived = _settings(run, folder, len(source), world)
    torch.set_num_threads(resolved.train.threads)
    warnings: list[str] = []
    saved = resume.latest(folder, world, warnings)
    learner = build_learner(resolved, weights=saved is None)
    compute = device.choose(resolved.train.device, resolved.train.precision, learner.teacher.backbone.embed_dim)
    learner.to(compute.device)
    if compute.device.type == "cpu":
        device.keep_freed_memory()
    loader = loader_of(resolved, source, world, compute.device)
    if world.size > 1:
        share_batch_norm(learner)
    optimizer = adamw(learner.student)
    step = resume.restore(saved, learner, optimizer, source.fingerprint) if saved else 0
    description = resume.describe(resolved, learner, source.fingerprint, compute.precision)
    if saved:
        warnings += announce.continued_otherwise(saved.state, resolved, compute.precision)
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


def loader_of(run: ResolvedRun, source: Source, world: Ranks, place: torch.device) -> Loader:
    """The loader of one rank of the run, which makes views for the device `place`."""
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
    return open_loader(source, run.views, options, loader=run.data.loader, color=run.data.color_on, device=place)


@contextmanager
def _memory_in_words() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if words := announce.out_of_memory(error):
            raise UserError(words) from error
        raise


def _step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of a step's drop-path: no generator state is carried from step to step."""
    return (seed % 2**20 << 43) + (rank % 2**12 << 31) + step % 2**31
