"""`nearfar launch` without a cluster: the same runs on this machine, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
import yaml
from rich.console import Console

from nearfar.launch.pretrain import pretrain
from nearfar.launch.slurm import job, records
from nearfar.launch.slurm.resources import Resources
from nearfar.ssl import config
from nearfar.ssl.config import Run
from nearfar.ssl.errors import UserError


def launch(runs: Sequence[Run], given: dict[str, Any], then: Sequence[str], *, debug: bool, console: Console) -> None:
    """Train (and score) each run; a signal saves and leaves, and the same command continues where it was.

    debug: exactly what a job does, in this process, with a debugger at the place of an error.

    Raises:
        UserError: more than one machine is asked for, and as `pretrain`.
    """
    asked = Resources.model_validate({**given, "cpu": True, "gpus_per_node": None})
    tasks = given.get("tasks_per_node") or given.get("gpus_per_node")
    if asked.nodes > 1:
        raise UserError(f"This is one machine and not {asked.nodes}: --nodes needs --cluster slurm.")
    for run in runs:
        if given.get("cpu"):
            run = run.model_copy(update={"train": run.train.model_copy(update={"device": "cpu"})})
        if debug:
            _debug(run, asked, then)
            continue
        if tasks:
            run = run.model_copy(update={"train": run.train.model_copy(update={"world_size": tasks})})
        done = records.outcome(run.path)
        if not pretrain(run, console).finished:
            return
        if done is None or done.state != "finished":
            step = records.saved_step(run.path)
            records.settle(run.path, "train", records.Done(state="finished", job="none", step=step, steps=step))
        if then:
            job.score(run.path, list(then))


def _debug(run: Run, resources: Resources, then: Sequence[str]) -> None:
    home = run.path / "cluster" / "debug"
    settings = home / "settings" / f"{run.name}.yaml"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(config.to_yaml(run))
    (home / "resources.yaml").write_text(yaml.safe_dump(resources.model_dump()))
    executor = submitit.DebugExecutor(folder=Path(home) / "log")
    executor.submit(job.train, str(settings), str(run.path)).results()
    if then:
        executor.submit(job.evaluate, str(settings), str(run.path), list(then)).results()
