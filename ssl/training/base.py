"""A run that is set up, and what its loop calls: views, the next step, scores, checkpoints.

What is learned is said in pretraining.py and finetuning.py; how a run gets here, in set_up.py.
"""

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

from nearfar.ssl.data.loaders.base import Batch, Loader
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.transforms.colors import color_views
from nearfar.ssl.data.transforms.normalize import normalize
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning import memory
from nearfar.ssl.learning.optim import moment_bytes
from nearfar.ssl.learning.step import Numbers, Stepper, StepResult
from nearfar.ssl.learning.student_teacher import StudentTeacher
from nearfar.ssl.parallel import distributed
from nearfar.ssl.parallel.device import Compute
from nearfar.ssl.parallel.distributed import Ranks
from nearfar.ssl.parallel.sharding import is_sharded
from nearfar.ssl.run import announce, kept, resume
from nearfar.ssl.run.background_save import Saver
from nearfar.ssl.run.run_folder import RunFolder
from nearfar.ssl.run.run_log import NoLog
from nearfar.ssl.settings.defaults import Derived, ResolvedRun
from nearfar.ssl.settings.finetune_settings import ResolvedFinetune
from nearfar.ssl.settings.run import AnyRun

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
    """Callbacks by which higher layers observe a run, on its first rank but for `assist`. None may change the run."""

    # First batch, colored views, run folder -> a picture of them (H, W, 3) for TensorBoard, or None.
    views: Callable[[Batch, list[Tensor], Path], np.ndarray | None] | None = None
    # Scores of the teacher's backbone (in a supervised run, of the whole classifier) under the run's settings; None
    # where a stop was requested first.
    probe: Callable[[Any, Any], dict[str, float] | None] | None = None
    # On each other rank while the first one probes the same: its share of the work.
    assist: Callable[[Any, Any], None] | None = None


NO_OBSERVERS = Observers()


@dataclass
class Training(ABC, Generic[R, L]):
    """A run that is set up: all that its loop needs. What is learned, and how, is said by its subclasses:
    `Pretraining` in pretraining.py, and `Finetuning` in finetuning.py.
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
    def needed(cls, run: R, learner: L, compute: Compute) -> memory.MemoryNeed:
        """What a step of one rank keeps in memory; asked before anything is split over ranks or compiled."""

    @classmethod
    @abstractmethod
    def trial_loss(cls, run: R, learner: L, images: int) -> Tensor:
        """The loss of so many black images, with all its parts; asked before anything is split over ranks or compiled.

        What the loss has noted for its center is to be forgotten.
        """

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

    @property
    def backbone_frozen(self) -> bool:
        """Will the next step leave the backbone as it is?"""
        return False

    def log_start(self) -> None:
        lines: list[str] = announce.start_lines(
            self.run, self.derived, self.learner, self.schedule.steps, self.compute, self.step, self.source,
            self.loader.title,
        )  # fmt: skip
        keep, copied = self.run.train.keep_last, self.run.train.save_in_background
        disk = announce.disk_line(self.learner, moment_bytes(self.optimizer), keep, copied)
        for line in [*self.warnings, disk, *lines]:
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


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of a step's drop-path: no generator state is carried from step to step."""
    return (seed % 2**20 << 43) + (rank % 2**12 << 31) + step % 2**31
