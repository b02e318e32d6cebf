"""Compute a step again that was not finite, and name the part whose numbers were the first to fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nearfar.ssl import config
from nearfar.ssl.checkpoint import Checkpoint
from nearfar.ssl.data.loaders.base import Batch, Task
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.transforms.colors import color_views
from nearfar.ssl.data.transforms.normalize import normalize
from nearfar.ssl.learning.dino import build_block_masks
from nearfar.ssl.learning.learner import Learner
from nearfar.ssl.learning.optim import optimizer_of
from nearfar.ssl.learning.schedule import Schedule
from nearfar.ssl.learning.step import Stepper
from nearfar.ssl.parallel import device
from nearfar.ssl.parallel.distributed import ALONE
from nearfar.ssl.run import announce, failed_step, resume
from nearfar.ssl.settings.defaults import ResolvedRun, as_begun, as_resolved
from nearfar.ssl.training.base import step_seed
from nearfar.ssl.training.choose_learner import learner_of
from nearfar.ssl.training.set_up import loader_of, prepare_learner


def settings_of(saved: Checkpoint) -> ResolvedRun:
    """The resolved settings of the run that a step belongs to."""
    return as_resolved(ResolvedRun, as_begun(config.validate(saved.state["run"])))


def replay(
    saved: Checkpoint,
    source: Source,
    where: Literal["auto", "cpu", "cuda"] | None = None,
    precision: Literal["auto", "bf16", "fp16", "fp32"] | None = None,
) -> list[str]:
    """Compute the step of `failed_step.read` again, in one process, and say in lines what failed first.

    As in the run, bit for bit where the machine and the number of processes are the same, unless `where` or
    `precision` ask for another device or other numbers.

    Raises:
        UserError: `source` holds other images, or the record does not fit this version's network.
    """
    run, step = settings_of(saved), int(saved.state["step"])
    torch.set_num_threads(run.train.threads)
    learner = learner_of(run, weights=False)
    width = learner.teacher.backbone.embed_dim
    compute = device.choose(where or run.train.device, precision or run.train.precision, width, "--device ")
    prepare_learner(learner, compute, run.train.checkpoint_activations)
    optimizer = optimizer_of(run.optim, learner.student)
    resume.restore(saved, learner, optimizer, source.fingerprint)
    loader = loader_of(run, source, ALONE, compute.device)
    failed = saved.state["failed"]
    batch = loader.assemble(Task(failed["epoch"], failed["step_of_epoch"], failed_step.samples(saved)))
    schedule = Schedule(run, loader.steps_per_epoch)
    stepper = Stepper(learner, optimizer, run.optim.clip_grad, compute.autocast, run.train.accumulate_steps)
    hidden = build_block_masks(run.model_copy(update={"train": _alone(run)}), learner.student.backbone.patch_size)
    masks = hidden.of_step(step, compute.device, run.train.accumulate_steps) if hidden else ()
    views = color_views(batch, compute.device)
    first = _in_weights(learner) or _in_views(views, batch, source)
    torch.manual_seed(step_seed(run.train.seed, step))
    with watched(learner) as found:
        normalized = [normalize(group) for group in views]
        prototypes, backbone = schedule.prototypes_frozen(step), schedule.backbone_frozen(step)
        result = stepper(
            normalized, schedule.at(step), masks=masks, freeze_last_layer=prototypes, freeze_backbone=backbone
        )
    numbers = result.report.read()
    lines = [
        f"Step {step} of {run.name} (epoch {failed['epoch']}), {len(batch.index)} images from {failed['names'][0]} on, "
        f"on {compute.device.type} in {compute.precision}: loss {numbers.loss:.6g}, gradient's norm "
        f"{numbers.grad_norm:.6g}; in the run they were {failed['loss']} and {failed['grad_norm']}."
    ]
    first = first or (found[0] if found else None)
    if first is None and not numbers.finite:
        first = "the sum of the squared gradients, each of which is finite: they are too large for float32"
    return [*lines, _verdict(first, saved, run, compute.rounding)]


def _verdict(first: str | None, saved: Checkpoint, run: ResolvedRun, rounding: str) -> str:
    if first:
        return f"The first numbers that are not finite: {first}."
    changes = announce.changed_versions(saved.state, resume.versions())
    changes += announce.continuation_changes(saved.state, run.model_copy(update={"train": _alone(run)}), rounding)
    other = f" What differs from the run: {' '.join(changes)}" if changes else ""
    return f"Everything is finite this time, so the same numbers do not fail again: suspect the machine.{other}"


def _alone(run: ResolvedRun) -> Any:
    return run.train.model_copy(update={"world_size": 1})


@contextmanager
def watched(learner: Learner) -> Iterator[list[str]]:
    """Within it, passes of the learner append what is not finite to the list, in the order in which it is computed.

    The outputs of every module of teacher and student, innermost first, then the loss, then the gradients.
    """
    found: list[str] = []
    handles = []
    for name, module in learner.named_modules():
        if name.startswith(("teacher.", "student.")):
            handles.append(module.register_forward_hook(_output(found, _readable(name))))
    handles.append(learner.register_forward_hook(_output(found, "loss")))
    for name, parameter in learner.student.named_parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_hook(_gradient(found, _readable(f"student.{name}"))))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _output(found: list[str], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: Any, output: Any) -> None:
        if all(_finite(tensor) for tensor in _tensors(output)):
            return
        given = list(_tensors(inputs))
        if not all(_finite(tensor) for tensor in given):
            found.append(f"the input of {name}")
        elif name == "loss":
            found.append("the loss, while all outputs of the networks are finite")
        else:
            largest = max((float(tensor.detach().abs().max()) for tensor in given if tensor.numel()), default=0.0)
            found.append(f"the output of {name}, whose input is finite (at most {largest:.3g})")

    return hook


def _gradient(found: list[str], name: str) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        if not _finite(gradient):
            found.append(f"the gradient of {name}")

    return hook


def _in_weights(learner: Learner) -> str | None:
    """Not in batch norm's running statistics, which the failed step itself wrote and which no step reads."""
    centers = {name.removeprefix("loss."): b for name, b in learner.named_buffers() if name.endswith("center")}
    tensors = {**dict(learner.named_parameters()), **centers}
    bad = [_readable(name) for name, tensor in tensors.items() if not _finite(tensor)]
    return f"the weights before the step, of which {bad[0]} is the first of {len(bad)}" if bad else None


def _in_views(views: list[Tensor], batch: Batch, source: Source) -> str | None:
    number = 0
    for kind, group in zip(("global", "local"), views, strict=False):
        for view in group:
            number += 1
            for image, index in zip(view, batch.index, strict=True):
                if not _finite(image):
                    return f"view {number} ({kind}) of the image {source.name(int(index))}"
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _readable(name: str) -> str:
    """Without the wrapper around the backbone: student.backbone.blocks.3.attn."""
    return name.replace("backbone.model.", "backbone.")
