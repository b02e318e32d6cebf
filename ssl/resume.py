"""What a run continues from: find the newest checkpoint, restore it, write the next one."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.ssl import checkpoint, distributed
from nearfar.ssl.announce import not_saved
from nearfar.ssl.checkpoint import Checkpoint
from nearfar.ssl.defaults import ResolvedRun
from nearfar.ssl.distributed import Ranks
from nearfar.ssl.errors import UserError
from nearfar.ssl.learner import Learner
from nearfar.ssl.loss_scale import fitted
from nearfar.ssl.run_folder import TEACHER, RunFolder


def latest(folder: RunFolder, world: Ranks, warnings: list[str]) -> Checkpoint | None:
    """The checkpoint to continue from: the first rank chooses it, and all read it."""
    saved = checkpoint.latest(folder.checkpoints, warnings.append) if world.first else None
    path = distributed.from_first(lambda: str(saved.path) if saved else None)
    return saved or (checkpoint.read(Path(path)) if path else None)


def restore(saved: Checkpoint, learner: Learner, optimizer: torch.optim.Optimizer, fingerprint: str) -> int:
    """Restore everything and return the step. `fingerprint`: that of the images the run is continued on.

    Raises:
        UserError: other images, or weights of another network.
    """
    if saved.state["data"] != fingerprint:
        raise UserError(
            f"The run was begun on other images than data.path holds now (fingerprint {saved.state['data']}, now "
            f"{fingerprint}). Continue it on the same images, or choose another name=."
        )
    parts: dict[str, dict[str, Tensor]] = {"learner": {}, "optimizer": {}}
    for full, tensor in saved.tensors.items():
        part, _, name = full.partition("/")
        parts[part][name] = tensor
    checkpoint.load_strict(learner, fitted(parts["learner"], learner.loss_scale), str(saved.path))
    checkpoint.load_optimizer(optimizer, _names(learner), parts["optimizer"])
    return int(saved.state["step"])


def save(
    folder: RunFolder,
    step: int,
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    description: dict[str, Any],
    keep: int,
) -> None:
    """Write the checkpoint of `step`, then the teacher's backbone beside it.

    Raises:
        UserError: the disk refused, or some weight is not finite: such a checkpoint could never be continued.
    """
    tensors = {f"learner/{name}": tensor for name, tensor in learner.state_dict().items()}
    state = checkpoint.optimizer_tensors(optimizer, _names(learner))
    tensors |= {f"optimizer/{name}": tensor for name, tensor in state.items()}
    if bad := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise UserError(not_saved(step, bad, folder.path))
    checkpoint.save(folder.checkpoints, step, tensors, description | {"step": step}, keep)
    export(folder, step, learner, description)


def export(folder: RunFolder, step: int, learner: Learner, description: dict[str, Any]) -> None:
    checkpoint.export(folder.path / TEACHER, learner.teacher.backbone, description | {"step": step})


def self_description(run: ResolvedRun, learner: Learner, fingerprint: str, precision: str) -> dict[str, Any]:
    """What a checkpoint records about itself besides its step."""
    return {
        "world_size": run.train.world_size,
        "precision": precision,
        "arch": learner.teacher.backbone.arch,
        "run": run.model_dump(mode="json"),
        "data": fingerprint,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the libraries that a run's bits depend on."""
    cuda = torch.version.cuda or "none"
    return {"torch": torch.__version__, "cuda": cuda, "python": platform.python_version()}


def _names(learner: Learner) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in learner.student.named_parameters()}
