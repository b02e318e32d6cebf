"""What can be seen to fail before a job waits in a queue, and before anything slow is imported."""

from __future__ import annotations

from pathlib import Path

from nearfar.launch.slurm.resources import Resources
from nearfar.ssl import config
from nearfar.ssl.errors import UserError
from nearfar.ssl.run import kept
from nearfar.ssl.settings import finetune_settings
from nearfar.ssl.settings.defaults import dividing, on_ranks
from nearfar.ssl.settings.finetune_settings import FinetuneRun
from nearfar.ssl.settings.run import AnyRun, Run


def placed(run: Run | FinetuneRun, resources: Resources) -> Run | FinetuneRun:
    """`run` with absolute paths, as a job on another machine will read them.

    Raises:
        UserError: it contradicts the resources, or what it reads is not there.
    """
    _check(run, resources)
    found = _absolute_paths(run)
    if not resources.node_setup:  # which may bring the images to where data.path says
        _check_exists("data.path", found.data.path)
    if found.backbone.weights:
        _check_exists("backbone.weights", found.backbone.weights)
    if found.train.start_from:
        kept.named(found.train.start_from)
    return found


def _check(run: AnyRun, resources: Resources) -> None:
    config.require_images(run)
    if not run.name:
        raise UserError("The run has no name: set name=.")
    if resources.cpu and run.train.device == "cuda":
        raise UserError("train.device=cuda and --cpu contradict each other: choose one.")
    if not resources.cpu and run.train.device == "cpu":
        raise UserError("train.device=cpu and --gpus-per-node contradict each other: use --cpu, or omit train.device.")
    if run.train.batch_size % resources.world:
        sizes = dividing(run.train.batch_size, run.train.accumulate_steps, resources.world)
        raise UserError(
            f"train.batch_size={run.train.batch_size} cannot be split evenly over {resources.world} processes "
            f"({resources.nodes} nodes x {resources.tasks}); the nearest that do: {' and '.join(map(str, sizes))}."
        )
    if isinstance(run, FinetuneRun):  # images are mixed in pairs within a process
        config.refuse(finetune_settings.contradictions(on_ranks(run, resources.world)))


def _absolute_paths(run: Run | FinetuneRun) -> Run | FinetuneRun:
    update = {
        "data": {"path": absolute(run.data.path), "val": run.data.val and absolute(run.data.val)},
        "backbone": {"weights": run.backbone.weights and absolute(run.backbone.weights)},
        "train": {"start_from": run.train.start_from and absolute(run.train.start_from)},
    }
    if isinstance(run, Run):
        update["loss"] = {"gram_teacher": run.loss.gram_teacher and absolute(run.loss.gram_teacher)}
        update["distill"] = {"teacher_weights": run.distill.teacher_weights and absolute(run.distill.teacher_weights)}
        if run.distill.teacher and Path(run.distill.teacher).expanduser().exists():  # else it is the name of a network
            update["distill"]["teacher"] = absolute(run.distill.teacher)
    sections = {name: getattr(run, name).model_copy(update=values) for name, values in update.items()}
    return run.model_copy(update={"folder": absolute(run.folder)} | sections)


def _check_exists(key: str, path: str) -> None:
    if not Path(path).exists():
        raise UserError(f"{key}={path} does not exist on this machine; the jobs read it from there.")


def absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
