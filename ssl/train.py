"""The loop: images -> views -> tokens -> loss -> step -> checkpoint. Start again with the same run to continue it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfar.ssl.data.labels import class_names
from nearfar.ssl.data.loaders.base import Batch
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.prefetch import Prefetch, side_stream
from nearfar.ssl.learning.step import StepResult
from nearfar.ssl.parallel import distributed
from nearfar.ssl.parallel.distributed import ALONE, Ranks
from nearfar.ssl.run import announce
from nearfar.ssl.run.run_folder import RunFolder
from nearfar.ssl.run.run_log import NoLog, RunLog
from nearfar.ssl.settings.finetune_settings import FinetuneRun
from nearfar.ssl.settings.run import AnyRun, Run
from nearfar.ssl.training.base import NO_OBSERVERS, Observers, Training
from nearfar.ssl.training.finetuning import Finetuning
from nearfar.ssl.training.pretraining import Pretraining
from nearfar.ssl.training.set_up import set_up

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Outcome:
    folder: Path
    step: int
    steps: int
    seconds: float
    unscored: bool = False  # did a stop request come before the score that belongs to the run?

    @property
    def finished(self) -> bool:
        return self.step >= self.steps and not self.unscored


def pretrain(
    run: Run,
    source: Source,
    observers: Observers = NO_OBSERVERS,
    should_stop: Callable[[], bool] = lambda: False,
    console: Console | None = None,
    world: Ranks = ALONE,
) -> Outcome:
    """Train `run` on `source` in its folder, from its last checkpoint to its end, as one of the ranks of `world`.

    `should_stop` is asked in every step; True on any rank saves a checkpoint after that step, or on a GPU after the
    next one, and returns. Continuing is bit-exact on a CPU in float32 on as many ranks: weights, optimizer and center
    come from the checkpoint, everything else is a function of the step.

    Raises:
        UserError: settings, data, folder, disk, memory or checkpoint are wrong, or the loss is no longer finite.
        PeerError: another rank ended.
    """
    return _train(Pretraining, run, source, observers, should_stop, console, world)


def finetune(
    run: FinetuneRun,
    source: Source,
    observers: Observers = NO_OBSERVERS,
    should_stop: Callable[[], bool] = lambda: False,
    console: Console | None = None,
    world: Ranks = ALONE,
) -> Outcome:
    """Train a classifier on the labeled images of `source`, in the run's folder, from its last checkpoint to its end,
    as one of the ranks of `world`. Continuing is bit-exact as in `pretrain`, whose loop this is.

    Raises:
        UserError: labels, settings, data, folder, disk, memory or checkpoint are wrong, or the loss is not finite.
        PeerError: another rank ended.
    """
    class_names(source, run.data.path)
    return _train(Finetuning, run, source, observers, should_stop, console, world)


def _train(
    kind: type[Training[Any, Any]],
    run: AnyRun,
    source: Source,
    observers: Observers = NO_OBSERVERS,
    should_stop: Callable[[], bool] = lambda: False,
    console: Console | None = None,
    world: Ranks = ALONE,
) -> Outcome:
    """As `pretrain`, for every `kind` of training."""
    from rich.console import Console

    console = console or Console(quiet=not world.first)
    joined = distributed.joined(world, device=run.train.device, silence=run.train.rank_timeout)
    with joined, _out_of_memory_explained(run, world), RunFolder(run.path, owns=world.first) as folder:
        training = set_up(kind, run, source, observers, folder, world)
        steps, start = training.schedule.steps, training.step
        track = training.run.track
        with RunLog(folder.path, steps, start, console, track=track) if world.first else NoLog() as log:
            training.log = log
            training.log_start()
            begun = time.monotonic()
            with training.saver:
                _loop(training, should_stop)
            seconds = time.monotonic() - begun
            if training.saver.count:
                log.say(announce.saving_line(training.saver.count, training.saver.seconds, seconds))
            finished = training.step >= steps
            if finished and start < steps and (message := training.verdict()):
                log.say(message)
            log.say(training.what_next(finished))
            return Outcome(folder.path, training.step, steps, seconds)


WARM_UP, TIMED = 2, 3  # steps that start workers and compile; steps after them, from which the rest is estimated


class Meter:
    """Speed since the last line of metrics, and what is wrong with the numbers of a step."""

    def __init__(self, training: Training[Any, Any]) -> None:
        self.training = training
        self.begun_at, self.warm = training.step, 0.0
        self.restart()

    @property
    def times_now(self) -> bool:
        """Is this step at an end of the few from which the length of the run is estimated?"""
        return self.training.step - self.begun_at in (WARM_UP, WARM_UP + TIMED)

    def estimate(self) -> None:
        """Once, after a few steps without a score or a frozen backbone: how long the others will take."""
        training, now = self.training, time.monotonic() - self.training.saver.seconds
        if training.backbone_frozen:
            self.begun_at = training.step
        elif training.step - self.begun_at == WARM_UP:
            self.warm = now
            training.log.warmed_up(training.step)
        elif self.times_now and (left := training.schedule.steps - training.step):
            training.log.say(announce.time_line((now - self.warm) / TIMED, left))

    def scored(self) -> None:
        """A score took its time, which is no step's."""
        if self.training.step - self.begun_at < WARM_UP + TIMED:
            self.begun_at = self.training.step
        self.restart()

    def restart(self) -> None:
        self.waited, self.since, self.first_step = 0.0, time.monotonic(), self.training.step
        self.saving = self.training.saver.seconds

    def waiting(self, batches: Iterator[Batch]) -> Batch:
        began = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - began
        return batch

    def log(self, trained: StepResult, values: dict[str, float]) -> None:
        """A line of metrics, the progress, and a warning."""
        training, step = self.training, self.training.step
        numbers = trained.report.read()
        health = distributed.mean_of(training.measured(trained.outputs))
        seconds = max(1e-9, time.monotonic() - self.since)
        speed = {
            "img_per_s": (step - self.first_step) * training.run.train.batch_size / seconds,
            "data_wait": self.waited / seconds,
            "save_wait": (training.saver.seconds - self.saving) / seconds,
            "time": time.time(),
        }
        measured = {**numbers.metrics(), **values, **health}
        training.log.record(step, {"epoch": step / training.loader.steps_per_epoch, **measured, **speed})
        training.log.progress(
            step,
            f"loss {numbers.loss:.3f}  {speed['img_per_s']:.0f} img/s  "
            f"waits {100 * speed['data_wait']:.0f} %  {training.progress(health)}",
        )
        if message := training.warning(step, health):
            training.log.say(message)
        self.restart()


def _loop(training: Training[Any, Any], should_stop: Callable[[], bool]) -> None:
    """From the current step of `training` to the last one, or to the first at which any rank is to stop."""
    schedule, run, meter = training.schedule, training.run, Meter(training)
    if training.step >= schedule.steps:
        if training.resumed and schedule.scores_due(training.step):
            training.score()
        return
    training.saved_step, training.saved_at = training.step, time.monotonic()
    distributed.at_step(training.step)
    training.loader.seek(*divmod(training.step, training.loader.steps_per_epoch))
    batches = iter(training.loader)
    prefetch = Prefetch(lambda: meter.waiting(batches), training.views, side_stream(training.compute.device))
    stop = training.resumed and schedule.scores_due(training.step) and training.score()
    while training.step < schedule.steps and not stop:
        batch, views = prefetch.take()
        values = schedule.at(training.step)
        trained = training.next_step(batch, views, values, should_stop)
        distributed.at_step(training.step)
        del views  # before the next ones are made
        if training.step < schedule.steps:
            prefetch.begin()
        logs = training.step % run.train.log_every_steps == 0 or training.step == schedule.steps
        now = logs or meter.times_now or schedule.scores_due(training.step)
        stop = training.finish_steps(0 if now else training.steps_behind)
        meter.estimate()
        if logs:
            meter.log(trained, values)
        if schedule.scores_due(training.step) and not stop:
            stop = training.score()
            meter.scored()
        training.saver.check()
        if stop or training.save_due():
            training.save()


@contextmanager
def _out_of_memory_explained(run: AnyRun, world: Ranks) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if message := announce.out_of_memory(error, run, world.size):
            raise UserError(message) from error
        raise
