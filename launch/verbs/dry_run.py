"""`nearfar VERB ... --dry-run` of a verb that trains: settings, sizes and estimated cost of a run that is not begun."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Generator
from contextlib import closing
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from torch import nn

from nearfar.launch.finetune import labeled_images
from nearfar.launch.local import processes
from nearfar.ssl import config
from nearfar.ssl.data import open_source
from nearfar.ssl.data.loaders.base import Batch
from nearfar.ssl.data.sources.base import Source, passed_over
from nearfar.ssl.disk import checkpoint_names
from nearfar.ssl.learning.optim import moment_bytes
from nearfar.ssl.parallel.device import Compute
from nearfar.ssl.parallel.distributed import Ranks, available_cores
from nearfar.ssl.run import announce
from nearfar.ssl.run.announce import passed_over_line
from nearfar.ssl.run.run_folder import RunFolder
from nearfar.ssl.settings.defaults import Derived
from nearfar.ssl.settings.finetune_settings import FinetuneRun
from nearfar.ssl.settings.listing import all_settings
from nearfar.ssl.settings.run import AnyRun, Run
from nearfar.ssl.training.base import NO_OBSERVERS, Training
from nearfar.ssl.training.finetuning import Finetuning
from nearfar.ssl.training.pretraining import Pretraining
from nearfar.ssl.training.set_up import compile_learner, learner_on_device, loader_of
from nearfar.ssl.wording import byte_size, counted, duration

FEWEST_STEPS, MOST_STEPS = 3, 12  # that are measured
LONGEST = 15.0  # seconds after which no more than the fewest are


class Measured(NamedTuple):
    """What a few real steps took."""

    seconds: float  # a step, the median
    steps: int  # that were timed after the first; 0: the run has no more than one
    waiting: float  # share of the time in which the network waited for images
    memory: int  # bytes of this process at its highest


def dry_run(run: Run | FinetuneRun, console: Console) -> None:
    """Print the resolved settings with their reasons, sizes, steps, and an estimate of time, memory and disk.

    A few steps are run on the first images, in this process alone and with a network that is then thrown away; nothing
    is written.

    Raises:
        UserError: as `nearfar.launch.local.any_run.train` would at its start.
    """
    config.require_images(run)
    source, scores = _images(run)
    ranks = processes.ranks_here(run)
    threads = torch.get_num_threads()
    try:
        training = _set_up(run, source, ranks.value)
        if run.train.world_size is None:
            training.derived.insert(0, ranks)
        lines = [*training.warnings, *_settings(training.run, training.derived), *_sizes(training, scores)]
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        with console.status("Measuring a few steps ..."):
            measured = measure(training)
    finally:
        torch.set_num_threads(threads)
    for line in _costs(training, measured):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _images(run: Run | FinetuneRun) -> tuple[Source, str]:
    """What the run learns from, and a line where nothing is scored meanwhile."""
    if isinstance(run, FinetuneRun):
        source, scoring = labeled_images(run)
        return source, "" if scoring else "Score      none: it needs labeled images in data.val"
    source = open_source(run.data.path)
    labeled = bool(run.data.val) and source.labels is not None and open_source(str(run.data.val)).labels is not None
    return source, "" if labeled else "k-NN       none during training: it needs labels in data.path and in data.val"


def _set_up(run: Run | FinetuneRun, source: Source, ranks: int) -> Training[Any, Any]:
    """The run at the step where it would begin or go on, on its first rank, but without the weights of a checkpoint."""
    kind: type[Training[Any, Any]] = Finetuning if isinstance(run, FinetuneRun) else Pretraining
    folder, warnings = RunFolder(run.path), list[str]()
    saved, done = folder.saved(type(run)), checkpoint_names.newest_step(folder.checkpoints)
    resolved, derived = kind.resolved(run, len(source), max(1, available_cores() // ranks), ranks, saved, done)
    torch.set_num_threads(resolved.train.threads)
    learner, compute = learner_on_device(kind, resolved, source, weights=not done)
    compute = compile_learner(learner, resolved.train, compute, warnings)
    loader = loader_of(resolved, source, Ranks(0, ranks), compute.device)
    return kind(
        run=resolved,
        source=source,
        observers=NO_OBSERVERS,
        folder=folder,
        world=Ranks(0, ranks),
        compute=compute,
        learner=learner,
        optimizer=kind.optimizer_for(resolved, learner),
        loader=loader,
        schedule=kind.schedule_for(resolved, loader.steps_per_epoch),
        step=done,
        resumed=done > 0,
        description={},
        derived=derived,
        warnings=warnings,
    )


def measure(training: Training[Any, Any]) -> Measured:
    """Train for a few steps, as one of the run's ranks would in its last one: nothing is frozen any more, and all parts
    of the loss are on."""
    begins, training.step = training.step, training.schedule.steps - 1
    values = training.schedule.at(training.step)
    training.loader.seek(0, 0)
    took: list[float] = []
    waits: list[float] = []
    begun = requested = time.monotonic()
    with closing(cast("Generator[Batch]", iter(training.loader))) as batches:
        for batch in batches:
            waits.append(time.monotonic() - requested)
            training.started_step(training.views(batch), values, tuple).report.read()  # one not finite costs as much
            took.append(time.monotonic() - requested)
            requested = time.monotonic()
            if len(took) > MOST_STEPS or (len(took) > FEWEST_STEPS and requested - begun - took[0] > LONGEST):
                break
    training.step = begins
    timed = took[1:] or took  # the first also starts workers and allocates
    waiting = sum(waits[1:] or waits) / max(1e-9, sum(timed))
    return Measured(statistics.median(timed), len(took) - 1, waiting, _peak_memory(training.compute))


def _peak_memory(compute: Compute) -> int:
    if compute.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _settings(run: AnyRun, derived: list[Derived]) -> list[str]:
    """Every setting of the run, a section at a time, with the reason for those that were derived."""
    reasons = {key: why for key, _, why in derived}
    lines, tree = ["Settings (derived ones with their reason):"], run.model_dump()
    for setting in all_settings(run.as_asked()):
        section, _, name = setting.key.rpartition(".")
        value = tree[section][name] if section else tree[name]
        if value is not None:
            shown = setting._replace(default=value).typed
            lines.append(f"  {setting.key}={shown}" + (f"  ({reasons[setting.key]})" if setting.key in reasons else ""))
    return lines


def _sizes(training: Training[Any, Any], scores: str) -> list[str]:
    """What would be trained, on what, and where."""
    run, student, done = training.run, training.learner.student, training.step
    backbone, head = _parameters(student.backbone), _parameters(student.head)
    names = passed_over(training.source)
    return [
        "",
        f"Backbone   {backbone / 1e6:.2f} M parameters ({run.backbone.name})",
        f"Head       {head / 1e6:.2f} M parameters, {student.head_title}",
        f"Images     {len(training.source):,} in {run.data.path}",
        *([f"           {passed_over_line(names)}"] if names else []),
        f"Steps      {training.schedule.steps:,}: {counted(run.train.epochs, 'epoch')} of "
        f"{counted(training.loader.steps_per_epoch, 'step')} with {run.train.batch_size} images each, on "
        f"{run.train.world_size} " + ("process" if run.train.world_size == 1 else "processes"),
        f"Folder     {run.path}" + (f", which continues from step {done:,}" if done else ""),
        *([scores] if scores else []),
    ]


def _costs(training: Training[Any, Any], measured: Measured) -> list[str]:
    run, compute, steps = training.run, training.compute, training.schedule.steps - training.step
    ranks = run.train.world_size or 1
    moments = moment_bytes(training.optimizer)
    disk = announce.disk_sizes(training.learner, moments, run.train.keep_last)
    count = f"{measured.steps} timed steps" if measured.steps else "a single step with its start-up"
    by = "" if ranks == 1 else f" by one of the {ranks} processes, alone and so with the machine to itself"
    memory = "of GPU memory" if compute.device.type == "cuda" else "of memory"
    each = "" if ranks == 1 else f" ({byte_size(measured.memory)} in each of {ranks} processes)"
    return [
        "",
        f"Estimates, from {count} on the first images{by}:",
        f"Time       about {duration(steps * measured.seconds)} for {steps:,} steps of {measured.seconds:.2f} s on "
        f"{compute.device.type} in {compute.rounding} ({100 * measured.waiting:.0f} % of it waiting for images), "
        "without scores and checkpoints",
        f"Memory     about {byte_size(ranks * measured.memory)} {memory}{each}, without that of the data workers"
        + (
            f" and {byte_size(disk.checkpoint)} on the host for the copy from which checkpoints are written"
            * run.train.save_in_background
        ),
        f"Disk       about {byte_size(disk.most)}: {run.train.keep_last} checkpoints, and one being written, of "
        f"{byte_size(disk.checkpoint)} each (student and teacher, each a backbone of {byte_size(disk.backbone)} and a "
        f"head of {byte_size(disk.head)}; the optimizer's moments, {byte_size(moments)}"
        + (f"; the frozen anchor, {byte_size(disk.anchor)}" if disk.anchor else "")
        + "), and the exported weights",
        "",
        "Nothing was trained or written. Leave out --dry-run to begin.",
    ]


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
