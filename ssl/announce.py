"""The messages of a run: at its start, when it is continued, when it fails, and at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from nearfar.ssl import checkpoint_names
from nearfar.ssl.backbones import choose_scan
from nearfar.ssl.data.loaders.base import Batch
from nearfar.ssl.data.sources.base import Source, passed_over
from nearfar.ssl.data.sources.files import kinds_of
from nearfar.ssl.defaults import Derived
from nearfar.ssl.device import Compute
from nearfar.ssl.learner import Learner
from nearfar.ssl.settings import Run


def start_lines(
    run: Run,
    derived: list[Derived],
    learner: Learner,
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
        f"{run.train.epochs} epochs = {steps:,} steps; {compute.device.type}, {compute.precision}, "
        f"ranks: {run.train.world_size}, each with threads: {run.train.threads}, workers: {run.data.workers}, {loader}"
    )
    if names := passed_over(source):
        lines.append(passed_over_line(names))
    lines.append(disk_line(learner, run.train.keep_last))
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


def continuation_changes(saved: dict[str, Any], run: Run, precision: str) -> list[str]:
    """What differs from the run that saved a checkpoint, so that it is not continued bit for bit."""
    lines = []
    if (ranks := saved.get("world_size", 1)) != run.train.world_size:
        drawn = ", and drop-path draws other numbers" if run.backbone.drop_path else ""
        lines.append(
            f"Saved by {ranks} ranks, continued by {run.train.world_size}: the same run, but sums are rounded "
            f"differently{drawn}."
        )
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


def not_finite(step: int, loss: float, grad_norm: float, batch: Batch, source: Source, folder: Path) -> str:
    names = ", ".join(source.name(int(index)) for index in batch.index[:4])
    return (
        f"At step {step} the loss is {loss} and the gradient's norm {grad_norm}: not finite, so the weights were left "
        f"as they were and the run stopped. The batch began with {names}. {_last_checkpoint(folder)}"
    )


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


def out_of_memory(error: BaseException) -> str | None:
    """What to try when an error of torch or Python says that memory ran out; None for any other error."""
    text = " ".join(str(error).split())
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in text:
        return None
    return (
        f"There is not enough memory ({text[:200] or 'MemoryError'}). Try train.accumulate_steps=2, a smaller "
        "train.batch_size, fewer views.local_crops_number, smaller head.prototypes or a smaller backbone.name; "
        "checkpoints that were written are intact."
    )


def disk_line(learner: Learner, keep: int) -> str:
    """What a checkpoint holds, and how much disk space the run will take."""

    def size(module: nn.Module) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())

    backbone, head = size(learner.student.backbone), size(learner.student) - size(learner.student.backbone)
    anchor = 0 if learner.anchor is None else backbone
    one = 4 * (backbone + head) + anchor
    with_anchor = ", and the anchor of the patches" if anchor else ""
    most = (keep + 1) * one + backbone
    return (
        f"A checkpoint takes {_in_units(one)}: student, teacher and AdamW's two moments, each a backbone of "
        f"{_in_units(backbone)} and a head of {_in_units(head)}{with_anchor}. With train.keep_last={keep}, one more "
        f"while it is written, and teacher.safetensors the run takes up to {_in_units(most)} of disk."
    )


def _in_units(size: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.1f} KB"


def what_next(run: Run, finished: bool, step: int, steps: int) -> str:
    """The last line of a run."""
    if not finished:
        return f"Stopped after step {step} of {steps}. The same command continues from here."
    labeled = "" if run.data.val else " --train LABELED_IMAGES --val OTHER_LABELED_IMAGES"
    return (
        f"Finished after {steps:,} steps. Next: `nearfar eval all {run.path}{labeled}` scores the features, and "
        f"`nearfar report {run.path}` writes {run.path}/report.html."
    )
