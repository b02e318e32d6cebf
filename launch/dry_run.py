"""`nearfar pretrain RECIPE --dry-run`: a run's settings, sizes and estimated cost, without starting it."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Generator
from contextlib import closing
from typing import NamedTuple, cast

import torch
from rich.console import Console
from torch import nn

from nearfar.launch import processes
from nearfar.ssl import checkpoint_names, config, device, fork
from nearfar.ssl.announce import passed_over_line
from nearfar.ssl.data import open_source
from nearfar.ssl.data.loaders.base import Batch, Loader
from nearfar.ssl.data.sources.base import Source, passed_over
from nearfar.ssl.data.transforms.colors import color_views
from nearfar.ssl.data.transforms.normalize import normalize
from nearfar.ssl.defaults import Derived, ResolvedRun, resolve
from nearfar.ssl.device import Compute
from nearfar.ssl.distributed import Ranks, available_cores
from nearfar.ssl.errors import counted
from nearfar.ssl.learner import Learner, block_masks
from nearfar.ssl.learners import learner_of
from nearfar.ssl.optim import adamw_of
from nearfar.ssl.run_folder import RunFolder
from nearfar.ssl.schedule import Schedule
from nearfar.ssl.set_up import compile_learner, loader_of, prepare_learner
from nearfar.ssl.setting_list import all_settings
from nearfar.ssl.settings import Run
from nearfar.ssl.step import Stepper

FEWEST_STEPS, MOST_STEPS, LONGEST = (
    3,
    12,
    15.0,
)  # measured steps, and seconds after which no more than the fewest are taken


class Measured(NamedTuple):
    """What a few real steps took."""

    seconds: float  # a step, the median
    steps: int  # that were timed after the first; 0: the run has no more than one
    waiting: float  # share of the time in which the network waited for images
    memory: int  # bytes of this process at its highest


def dry_run(run: Run, console: Console) -> None:
    """Print the resolved settings with their reasons, sizes, steps, and an estimate of time, memory and disk.

    A few steps are run on the first images, in this process alone and with a network that is then thrown away; nothing
    is written.

    Raises:
        UserError: as `nearfar.launch.pretrain.run_pretraining` would at its start.
    """
    config.require_images(run)
    source = open_source(run.data.path)
    labeled = bool(run.data.val) and source.labels is not None and open_source(str(run.data.val)).labels is not None
    ranks = processes.world_size(run)
    folder = RunFolder(run.path)
    cores = max(1, available_cores() // ranks.value)
    saved, done = folder.saved_settings(), checkpoint_names.newest_step(folder.checkpoints)
    begun, taken = (run, []) if saved else fork.located(run)
    resolved, derived = resolve(begun, len(source), cores, world_size=ranks.value, saved=saved, done=done)
    derived = [*taken, *derived]
    if run.train.world_size is None:
        derived = [ranks, *derived]

    threads = torch.get_num_threads()
    torch.set_num_threads(resolved.train.threads)
    try:
        learner = learner_of(resolved, weights=not done)
        width = learner.teacher.backbone.embed_dim
        compute = device.choose(resolved.train.device, resolved.train.precision, width)
        prepare_learner(learner, compute, resolved.train.checkpoint_activations)
        warnings: list[str] = []
        compute = compile_learner(learner, resolved.train, compute, warnings)
        loader = loader_of(resolved, source, Ranks(0, ranks.value), compute.device)
        schedule = Schedule(resolved, loader.steps_per_epoch)
        sizes = _sizes(resolved, learner, source, schedule, done, labeled)
        for line in warnings + _settings(resolved, derived) + sizes:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        with console.status("Measuring a few steps ..."):
            measured = measure(learner, loader, schedule, resolved, compute)
    finally:
        torch.set_num_threads(threads)
    for line in _costs(resolved, learner, schedule.steps - done, compute, measured):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def measure(learner: Learner, loader: Loader, schedule: Schedule, run: ResolvedRun, compute: Compute) -> Measured:
    """Train `learner` for a few steps, as one of the run's ranks would."""
    optimizer = adamw_of(run.optim, learner.student)
    stepper = Stepper(learner, optimizer, run.optim.clip_grad, compute.autocast, run.train.accumulate_steps)
    hidden = block_masks(run, learner.student.backbone.patch_size)
    masks = hidden.of_step(0, compute.device, run.train.accumulate_steps) if hidden else []
    loader.seek(0, 0)
    values = schedule.at(0)
    took: list[float] = []
    waits: list[float] = []
    begun = asked = time.monotonic()
    with closing(cast("Generator[Batch]", iter(loader))) as batches:
        for batch in batches:
            waits.append(time.monotonic() - asked)
            views = [normalize(group) for group in color_views(batch, compute.device)]
            stepper(views, values, masks=masks).report.read()  # a step that is not finite costs as much
            took.append(time.monotonic() - asked)
            asked = time.monotonic()
            if len(took) > MOST_STEPS or (len(took) > FEWEST_STEPS and asked - begun - took[0] > LONGEST):
                break
    timed = took[1:] or took  # the first also starts workers and allocates
    waiting = sum(waits[1:] or waits) / max(1e-9, sum(timed))
    return Measured(statistics.median(timed), len(took) - 1, waiting, _peak_memory(compute))


def _peak_memory(compute: Compute) -> int:
    if compute.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _settings(run: Run, derived: list[Derived]) -> list[str]:
    """Every setting of the run, a section at a time, with the reason for those that were derived."""
    reasons = {key: why for key, _, why in derived}
    lines, tree = ["Settings (derived ones with their reason):"], run.model_dump()
    for setting in all_settings():
        section, _, name = setting.key.rpartition(".")
        value = tree[section][name] if section else tree[name]
        if value is not None:
            shown = setting._replace(default=value).typed
            lines.append(f"  {setting.key}={shown}" + (f"  ({reasons[setting.key]})" if setting.key in reasons else ""))
    return lines


def _sizes(run: Run, learner: Learner, source: Source, schedule: Schedule, done: int, labeled: bool) -> list[str]:
    """What would be trained, on what, and where."""
    backbone, head = _parameters(learner.student.backbone), _parameters(learner.student.head)
    lines = [
        "",
        f"Backbone   {backbone / 1e6:.2f} M parameters ({run.backbone.name})",
        f"Head       {head / 1e6:.2f} M parameters, {learner.student.head_title}",
        f"Images     {len(source):,} in {run.data.path}",
        *([f"           {passed_over_line(names)}"] if (names := passed_over(source)) else []),
        f"Steps      {schedule.steps:,}: {counted(run.train.epochs, 'epoch')} of "
        f"{counted(schedule.steps_per_epoch, 'step')} with {run.train.batch_size} images each, on "
        f"{run.train.world_size} " + ("process" if run.train.world_size == 1 else "processes"),
        f"Folder     {run.path}" + (f", which continues from step {done:,}" if done else ""),
    ]
    if not labeled:
        lines.append("k-NN       none during training: it needs labels in data.path and in data.val")
    return lines


def _costs(run: Run, learner: Learner, steps: int, compute: Compute, measured: Measured) -> list[str]:
    ranks = run.train.world_size or 1
    backbone, head = _bytes(learner.student.backbone), _bytes(learner.student.head)
    one = 4 * (backbone + head)
    count = f"{measured.steps} timed steps" if measured.steps else "a single step with its start-up"
    by = "" if ranks == 1 else f" by one of the {ranks} processes, alone and so with the machine to itself"
    place = "of GPU memory" if compute.device.type == "cuda" else "of memory"
    each = "" if ranks == 1 else f" ({_size(measured.memory)} in each of {ranks} processes)"
    return [
        "",
        f"Estimates, from {count} on the first images{by}:",
        f"Time       about {_duration(steps * measured.seconds)} for {steps:,} steps of {measured.seconds:.2f} s on "
        f"{compute.device.type} in {compute.rounding} ({100 * measured.waiting:.0f} % of it waiting for images), "
        "without scores and checkpoints",
        f"Memory     about {_size(ranks * measured.memory)} {place}{each}, besides that of the data workers"
        + (
            f" and {_size(one)} on the host for the copy from which checkpoints are written"
            * run.train.save_in_background
        ),
        f"Disk       about {_size((run.train.keep_last + 1) * one + backbone)}: {run.train.keep_last} checkpoints, and "
        f"one being written, of {_size(one)} each (student, teacher, and two moments of the optimizer, each a backbone "
        f"of {_size(backbone)} and a head of {_size(head)}), and the exported teacher",
        "",
        "Nothing was trained or written. Leave out --dry-run to begin.",
    ]


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
