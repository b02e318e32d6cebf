"""The record of a step that was not finite: RUN/not_finite/step-XXXXXXXXX, a checkpoint of the state before it.

Its state.json holds, besides what every checkpoint says about itself, under "failed": the epoch, the samples of the
batch with their names, loss and gradient's norm. Views are functions of (seed, epoch, sample, view), so no pixel is
kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.ssl import checkpoint
from nearfar.ssl.checkpoint import Checkpoint, DamagedError
from nearfar.ssl.data.loaders.base import Batch
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.disk import checkpoint_names
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.step import Numbers
from nearfar.ssl.learning.student_teacher import StudentTeacher
from nearfar.ssl.parallel import distributed
from nearfar.ssl.run import resume

FOLDER = "not_finite"
KEPT = 2


def save(
    folder: Path,
    step: int,
    numbers: Numbers,
    batch: Batch,
    source: Source,
    learner: StudentTeacher,
    optimizer: torch.optim.Optimizer,
    description: dict[str, Any],
) -> Path | None:
    """Write the record of a step into a run's folder, on the first rank; to be called on all. None: no space for it.

    Learner and optimizer are still as they were before the step (but for running statistics of batch norm), since a
    step that is not finite changes nothing; neither do those after it.
    """
    samples = [int(i) for part in distributed.gathered([json.dumps(batch.index.tolist())]) for i in json.loads(part)]
    failed = {
        "loss": str(numbers.loss),  # JSON has no NaN
        "grad_norm": str(numbers.grad_norm),
        "epoch": batch.epoch,
        "step_of_epoch": batch.step,
        "samples": samples,
        "names": [source.name(i) for i in samples],
    }

    tensors = dict(resume.contents(learner, optimizer))  # every rank takes part in making sharded ones whole

    def write() -> str | None:
        about = description | {"step": step, "failed": failed}
        try:
            return str(checkpoint.save(folder / FOLDER, step, tensors, about, KEPT))
        except UserError:  # the message about the step itself must not be lost
            return None

    written = distributed.from_first(write)
    return Path(written) if written else None


def read(path: Path) -> Checkpoint:
    """The record in this folder, or the newest one of this run.

    Raises:
        UserError: nothing there, damaged, or the checkpoint of a step that went well.
    """
    found = [path] if (path / checkpoint.STATE).is_file() else checkpoint_names.finished(path / FOLDER)
    if not found:
        raise UserError(
            f"{path} holds no record of a step that was not finite: give a run's folder with {FOLDER}/ in it, or "
            f"one of its {FOLDER}/step-XXXXXXXXX."
        )
    try:
        saved = checkpoint.read(found[-1])
    except DamagedError as error:
        raise UserError(f"The record {found[-1]} is damaged: {error}.") from None
    if "failed" not in saved.state:
        raise UserError(
            f"{found[-1]} is the checkpoint of a step that went well; those that were not finite are in {FOLDER}/ of "
            "the run's folder."
        )
    return saved


def samples(saved: Checkpoint) -> NDArray[np.int64]:
    """The samples of the step, of all ranks in their order."""
    return np.array(saved.state["failed"]["samples"], np.int64)
