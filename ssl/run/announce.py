"""The messages of a run: at its start, when it is continued, when it fails, and at its end."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from nearfar.ssl.backbones import choose_scan
from nearfar.ssl.data.sources.base import Source, passed_over
from nearfar.ssl.data.sources.files import kinds_of
from nearfar.ssl.disk import checkpoint_names
from nearfar.ssl.learning.memory import MemoryNeed
from nearfar.ssl.learning.step import Numbers
from nearfar.ssl.learning.student_teacher import StudentTeacher
from nearfar.ssl.parallel.device import Compute
from nearfar.ssl.settings.defaults import Derived, ResolvedRun, fork_command
from nearfar.ssl.settings.finetune_settings import FinetuneRun, ResolvedFinetune
from nearfar.ssl.settings.run import AnyRun, Run
from nearfar.ssl.wording import byte_size, counted, duration


def start_lines(
    run: AnyRun,
    derived: list[Derived],
    learner: StudentTeacher,
    steps: int,
    compute: Compute,
    step: int,
    source: Source,
    loader: str,
) -> list[str]:
    lines = [f"derived {key} = {value}  ({reason})" for key, value, reason in derived]
    parameters = sum(p.numel() for p in learner.student.backbone.parameters())
    lines.append(
        f"{run.name}: {run.backbone.name}, {parameters / 1e6:.2f} M parameters, on {len(source):,} images; "
        f"{counted(run.train.epochs, 'epoch')} = {counted(steps, 'step')}; {compute.device.type}, {compute.rounding}, "
        f"ranks: {run.train.world_size}, each with threads: {run.train.threads}, workers: {run.data.workers}, {loader}"
    )
    if names := passed_over(source):
        lines.append(passed_over_line(names))
    lines += learner.notes
    if run.train.shard:
        lines.append(
            f"train.shard: each of {run.train.world_size} ranks holds its rows of student, teacher and moments."
            if (run.train.world_size or 1) > 1
            else "train.shard=true changes nothing: this process is alone."
        )
    if run.backbone.name.startswith("vim_"):
        chosen = choose_scan(run.backbone.scan, compute.device.type)
        lines.append(f"selective scan: {chosen} (backbone.scan={run.backbone.scan})")
    if step >= steps:
        lines.append(f"This run is already finished (step {step}): nothing to train.")
    elif step:
        lines.append(f"Continuing from step {step} of {steps}.")
    return lines


def passed_over_line(names: list[str]) -> str:
    """Files of `data.path` that are skipped because of their type: how many of each, with an example."""
    return f"{len(names):,} files of data.path are skipped because of their type: {kinds_of(names)}."


def continuation_changes(saved: dict[str, Any], run: AnyRun, precision: str) -> list[str]:
    """What differs from the run that saved a checkpoint, so that it is not continued bit for bit."""
    lines = []
    if (ranks := saved.get("world_size", 1)) != run.train.world_size:
        drawn = ", and drop-path draws other numbers" if run.backbone.drop_path else ""
        lines.append(
            f"Saved by {ranks} ranks, continued by {run.train.world_size}: the same run, but sums are rounded "
            f"differently{drawn}."
        )
    if bool(saved.get("run", {}).get("train", {}).get("shard")) != run.train.shard:
        lines.append(f"Continued with train.shard={str(run.train.shard).lower()}: the same run, but not the same bits.")
    if (before := saved.get("precision", precision)) != precision:
        lines.append(f"Saved in {before}, continued in {precision}: the same run, but not the same bits.")
    return lines


def changed_versions(saved: dict[str, Any], versions: dict[str, str]) -> list[str]:
    """A checkpoint's state against the libraries in use now: other versions may round differently."""
    before = saved.get("versions") or {}
    changed = [f"{name} {before[name]} -> {now}" for name, now in versions.items() if before.get(name, now) != now]
    if not changed:
        return []
    return [f"Continued with other versions ({', '.join(changed)}): the same run, but sums may be rounded differently."]


def step_skipped(step: int, scale: float) -> str:
    """Under fp16, once for every new low of the scale."""
    return (
        f"Step {step} was skipped: its gradient overflowed in fp16, so the loss is scaled by {scale:,.0f} from now on, "
        f"half as much as before. Nothing else changed; a few such steps are normal."
    )


def not_finite(step: int, numbers: Numbers, names: list[str], record: Path | None, run: Run | FinetuneRun) -> str:
    """names: of the first images of the batch. record: where the step was saved; None where that failed."""
    again = f"`nearfar replay {record}` computes it again and names the part that failed first. " if record else ""
    scaled = f" (fp16, with the loss scaled by {numbers.loss_scale:,.0f})" if numbers.loss_scale else ""
    return (
        f"At step {step} the loss is {numbers.loss} and the gradient's norm {numbers.grad_norm}{scaled}: not finite, "
        f"so the weights were left as they were and the run stopped. The batch began with {', '.join(names)}. {again}"
        f"{_last_checkpoint(run.path)} To continue at half the rate: `{_way_on(run)}`."
    )


def _way_on(run: Run | FinetuneRun) -> str:
    """The command that goes on from the last checkpoint, or starts again without one, in a folder of its own."""
    saved = bool(checkpoint_names.finished(run.path / "checkpoints"))
    changes = [] if run.optim.lr is None else [f"optim.lr={run.optim.lr / 2:g}"]
    if saved and isinstance(run, Run):
        return fork_command(run, *changes)
    if saved:  # a supervised run: from its backbone
        changes.append(f"backbone.weights={run.path}")
    verb = "finetune" if isinstance(run, FinetuneRun) else "pretrain"
    return shlex.join(["nearfar", verb, str(run.path / "config.yaml"), f"name={run.name}-again", *changes])


def not_saved(step: int, tensors: list[str], folder: Path) -> str:
    return (
        f"After step {step} {len(tensors)} tensors hold numbers that are not finite ({tensors[0]} is the first), so no "
        f"checkpoint was written and the run stopped. {_last_checkpoint(folder)}"
    )


def _last_checkpoint(folder: Path) -> str:
    advice = "Try a lower optim.lr, a longer optim.warmup_epochs, optim.clip_grad=1, or train.precision=fp32"
    kept = checkpoint_names.finished(folder / "checkpoints")
    if not kept:
        return f"There is no checkpoint in {folder} yet: the same command starts afresh. {advice}."
    last = f"The last checkpoint in {folder} is {kept[-1].name}."
    return f"{last} {advice}, under another name= (a run keeps its settings)."


# What torch says of the CPU's memory, of CUDA's and of cuBLAS's, where the class of the error does not.
NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException, run: AnyRun, ranks: int = 1) -> str | None:
    """What to try when an error of torch or Python says that memory ran out; None for any other error."""
    text = " ".join(str(error).split())
    recognized = any(phrase in text for phrase in NO_MEMORY)
    if not recognized and not isinstance(error, MemoryError | torch.OutOfMemoryError):
        return None
    return (
        f"There is not enough memory ({text[:200] or 'MemoryError'}). {less_memory(run, ranks)} "
        f"{'Smaller head.prototypes or a' if isinstance(run, Run) else 'A'} smaller backbone.name needs less, too. "
        "Checkpoints that were written are intact."
    )


def less_memory(run: AnyRun, ranks: int) -> str:
    """The settings that make a step need less memory, with what they are now: the cheapest first."""
    train, each = run.train, run.train.batch_size // ranks
    ways = []
    if more := next((n for n in range(train.accumulate_steps + 1, each + 1) if each % n == 0), None):
        ways.append(
            f"train.accumulate_steps={more} (now {train.accumulate_steps}: {each // train.accumulate_steps} images at "
            "a time in each process)"
        )
    if not train.checkpoint_activations:
        ways.append("train.checkpoint_activations=true (now false; a run may be continued with it)")
    ways.append(f"a smaller train.batch_size (now {train.batch_size})")
    if isinstance(run, Run) and run.views.local_crops_number:
        ways.append(f"a smaller views.local_crops_number (now {run.views.local_crops_number})")
    return f"Try {', '.join(ways[:-1])} or {ways[-1]}."


class Costs(NamedTuple):
    """What is known of a run's costs before its first step."""

    need: MemoryNeed
    free: int | None  # bytes, as far as the system tells
    seconds: float | None  # of a step's passes, uncompiled; None: not tried, as memory or the run is short


def cost_lines(run: ResolvedRun | ResolvedFinetune, costs: Costs, left: int, compiled: bool) -> list[str]:
    """What `left` steps need, before the first one."""
    lines = [memory_line(run, costs.need, costs.free)]
    if costs.seconds is not None:
        lines.append(rough_time_line(costs.seconds, left, compiled))
    return lines


def memory_line(run: ResolvedRun | ResolvedFinetune, need: MemoryNeed, free: int | None) -> str:
    """What a step needs, before the first one."""
    images = run.train.batch_size // run.train.world_size // run.train.accumulate_steps
    each = "A step" if run.train.world_size == 1 else f"A step of each of {run.train.world_size} processes"
    have = "" if free is None else f"; {byte_size(free)} are free"
    line = (
        f"{each} needs about {byte_size(need.total)} of memory: weights {byte_size(need.weights)}, gradients "
        f"{byte_size(need.gradients)}, optimizer {byte_size(need.moments)}, activations {byte_size(need.activations)} "
        f"for {images} images at a time, logits {byte_size(need.logits)}; besides libraries and data workers{have}."
    )
    if free is None or need.total <= free:
        return line
    return f"{line} That is more than there is. {less_memory(run, run.train.world_size)}"


def no_room_for_copy(name: str, size: int, error: BaseException) -> str:
    """A checkpoint's copy for the background did not fit into memory; `name` and `size` (bytes) of what did not."""
    return (
        "There is not enough memory for the copy of weights and optimizer that a checkpoint is written from: it ended "
        f"at {name}, {byte_size(size)} ({' '.join(str(error).split())[:120] or 'MemoryError'}). Checkpoints that were "
        "written are intact. Give the job more memory, or set train.save_in_background=false, which needs no copy and "
        "lets the training wait; then start the same command again."
    )


def saving_line(count: int, waited: float, seconds: float) -> str:
    """What the checkpoints of a process cost it."""
    return (
        f"Checkpoints: {count}, for which the training waited {waited:.1f} s, "
        f"{100 * waited / max(1e-9, seconds):.2f} % of {seconds:.0f} s."
    )


class DiskSizes(NamedTuple):
    """Bytes. checkpoint: one of them; most: what the run's folder takes while one more is written."""

    backbone: int
    head: int
    anchor: int
    checkpoint: int
    most: int


def disk_sizes(learner: StudentTeacher, moments: int, keep: int) -> DiskSizes:
    """Of a run that keeps so many checkpoints: student, teacher, the optimizer's moments, and a frozen anchor if any.

    moments: bytes, as `optim.moment_bytes` has them.
    """

    def size(module: nn.Module) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())

    backbone, head = size(learner.student.backbone), size(learner.student) - size(learner.student.backbone)
    inside = set(learner.modules())
    anchor = sum(size(network) for network in learner.frozen if network in inside)
    one = 2 * (backbone + head) + moments + anchor
    return DiskSizes(backbone, head, anchor, one, (keep + 1) * one + backbone)


def disk_line(learner: StudentTeacher, moments: int, keep: int, copied: bool) -> str:
    """What a checkpoint holds, and how much disk space the run will take; `copied`: it is written from a copy."""
    backbone, head, anchor, one, most = disk_sizes(learner, moments, keep)
    with_anchor = ", and the frozen anchor" if anchor else ""
    return (
        f"A checkpoint takes {byte_size(one)}: student and teacher, each a backbone of {byte_size(backbone)} and "
        f"a head of {byte_size(head)}, the optimizer's moments, {byte_size(moments)}{with_anchor}. With "
        f"train.keep_last={keep}, one more while it is written, and the exported weights the run takes up to "
        f"{byte_size(most)} of disk."
        + (f" It is written from a copy, which takes {byte_size(one)} of the host's memory." if copied else "")
    )


def rough_time_line(seconds: float, left: int, compiled: bool) -> str:
    """seconds: of a step's passes, tried before the first one and before anything was compiled."""
    faster = ", not compiled yet" if compiled else ""
    return (
        f"{counted(left, 'step')} to go: roughly {duration(seconds * left)} at {_step_seconds(seconds)} a step, by a "
        f"trial with a few black images{faster}. Optimizer, images that are waited for and scores come on top."
    )


def _step_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def time_line(seconds: float, left: int) -> str:
    """seconds: a step, as the first ones were."""
    each = _step_seconds(seconds)
    return f"{counted(left, 'step')} left: about {duration(seconds * left)} at {each} a step, without scores."


def what_next(run: Run, finished: bool, step: int, steps: int) -> str:
    """The last line of a run."""
    if not finished:
        return f"Stopped after step {step} of {steps}. The same command continues from here."
    labeled = "" if run.data.val else " --train LABELED_IMAGES --val OTHER_LABELED_IMAGES"
    return (
        f"Finished after {steps:,} steps. Next: `nearfar eval all {run.path}{labeled}` scores the features, and "
        f"`nearfar report {run.path}` writes {run.path}/report.html."
    )
