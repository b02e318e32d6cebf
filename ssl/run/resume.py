"""What a run continues from: find the newest checkpoint, restore it, write the next one."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nearfar.ssl import checkpoint
from nearfar.ssl.backbones import Backbone, create_described
from nearfar.ssl.checkpoint import TEACHER, Checkpoint
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.learner import Learner
from nearfar.ssl.learning.loss_scale import fitted
from nearfar.ssl.learning.student_teacher import StudentTeacher
from nearfar.ssl.parallel import distributed
from nearfar.ssl.parallel.distributed import Ranks
from nearfar.ssl.parallel.sharding import is_sharded, whole
from nearfar.ssl.run import kept
from nearfar.ssl.run.announce import not_saved
from nearfar.ssl.run.run_folder import RunFolder
from nearfar.ssl.settings.defaults import ResolvedRun
from nearfar.ssl.settings.finetune_settings import ResolvedFinetune
from nearfar.ssl.settings.optimization import TrainSettings


def to_continue_from(folder: RunFolder, world: Ranks, warnings: list[str]) -> Checkpoint | None:
    """The checkpoint to continue from: the first rank chooses it, and all read it."""
    saved = checkpoint.latest(folder.checkpoints, warnings.append) if world.first else None
    path = distributed.from_first(lambda: str(saved.path) if saved else None)
    return saved or (checkpoint.read(Path(path)) if path else None)


def restore(saved: Checkpoint, learner: StudentTeacher, optimizer: torch.optim.Optimizer, fingerprint: str) -> int:
    """Restore everything and return the step. `fingerprint`: that of the images the run is continued on.

    Raises:
        UserError: other images, or weights of another network.
    """
    if saved.state["data"] != fingerprint:
        raise UserError(
            f"The run was begun on other images than data.path holds now (fingerprint {saved.state['data']}, now "
            f"{fingerprint}). Continue it on the same images, or choose another name=."
        )
    learner.check_continues(saved.state)
    parts: dict[str, dict[str, Tensor]] = {"learner": {}, "optimizer": {}}
    for full, tensor in saved.tensors.items():
        part, _, name = full.partition("/")
        parts[part][name] = tensor
    checkpoint.load_strict(learner, fitted(parts["learner"], learner.loss_scale), str(saved.path))
    checkpoint.load_optimizer(optimizer, _names(learner), parts["optimizer"])
    return int(saved.state["step"])


def contents(learner: StudentTeacher, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """All that a checkpoint holds, by name: the tensors themselves, and no copies.

    Where they are sharded, every rank must go through all of them: one after the other is made whole.
    """
    for name, tensor in learner.state_dict().items():
        yield f"learner/{name}", whole(tensor)
    for name, tensor in checkpoint.optimizer_tensors(optimizer, _names(learner)).items():
        yield f"optimizer/{name}", whole(tensor)


def teacher_backbone(learner: StudentTeacher) -> dict[str, Tensor]:
    """The teacher's backbone by name; where it is sharded every rank must ask, and gets it whole in its own memory."""
    state = learner.teacher.backbone.state_dict()
    return {name: whole(tensor).cpu() if is_sharded(tensor) else tensor for name, tensor in state.items()}


def whole_teacher(learner: Learner, world: Ranks) -> Backbone:
    """The teacher's backbone, fit to be run by the first rank alone: itself, or a copy where it is sharded.

    Then every rank must ask, and only the first has the copy.
    """
    backbone = learner.teacher.backbone
    parameter = next(backbone.parameters())
    if not is_sharded(parameter):
        return backbone
    tensors = teacher_backbone(learner)
    if not world.first:
        return backbone
    copy = create_described(backbone.arch, tensors, "the teacher")
    checkpoint.load_strict(copy, tensors, "the teacher")
    return copy.to(parameter.device).requires_grad_(False)


def write(
    folder: RunFolder, step: int, tensors: dict[str, Tensor], description: dict[str, Any], train: TrainSettings
) -> None:
    """Write the checkpoint of `step` from its `contents`.

    Raises:
        UserError: the disk refused, or some weight is not finite: such a checkpoint could never be continued.
    """
    if bad := [name for name, tensor in tensors.items() if not _finite(tensor)]:
        raise UserError(not_saved(step, bad, folder.path))
    spared = kept.spared(folder.metrics, step, train.keep_every, train.keep_best)
    checkpoint.save(folder.checkpoints, step, tensors, description | {"step": step}, train.keep_last, spared)


def export_teacher(folder: RunFolder, step: int, backbone: Mapping[str, Tensor], description: dict[str, Any]) -> None:
    """Write teacher.safetensors from the tensors of the teacher's backbone."""
    checkpoint.export_tensors(folder.path / TEACHER, backbone, description | {"step": step})


def _finite(tensor: Tensor) -> bool:
    """Are all its numbers? On the host by NumPy, whose loops take one core and let other threads run."""
    if tensor.device.type == "cpu" and tensor.dtype is not torch.bfloat16:
        return bool(np.isfinite(tensor.detach().numpy()).all())
    return bool(torch.isfinite(tensor).all())


def self_description(
    run: ResolvedRun | ResolvedFinetune, learner: StudentTeacher, fingerprint: str, precision: str
) -> dict[str, Any]:
    """What a checkpoint records about itself besides its step and the weights that it began from."""
    return {
        "world_size": run.train.world_size,
        "precision": precision,
        "arch": learner.teacher.backbone.arch,
        "run": run.model_dump(mode="json"),
        "data": fingerprint,
        "versions": versions(),
        **learner.description(),
    }


def versions() -> dict[str, str]:
    """Of the libraries that a run's bits depend on."""
    cuda = torch.version.cuda or "none"
    return {"torch": torch.__version__, "cuda": cuda, "python": platform.python_version()}


def _names(learner: StudentTeacher) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in learner.student.named_parameters()}
