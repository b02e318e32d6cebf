"""`nearfar launch` without a cluster: the same runs on this machine, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import submitit
from rich.console import Console

from nearfar.launch.slurm import job, records
from nearfar.launch.slurm.records import SubmissionRecord
from nearfar.launch.slurm.resources import Resources, gpu_count
from nearfar.ssl import config
from nearfar.ssl.errors import UserError
from nearfar.ssl.run.run_folder import VERBS
from nearfar.ssl.settings.finetune_settings import FinetuneRun
from nearfar.ssl.settings.run import Run


def launch(
    runs: Sequence[Run | FinetuneRun], given: dict[str, Any], then: Sequence[str], *, debug: bool, console: Console
) -> None:
    """Train (and score) each run; a signal saves and leaves, and the same command continues where it was.

    debug: exactly what a job does, in this process, with a debugger at the place of an error.

    Raises:
        UserError: more than one machine is asked for, and as the run's own verb.
    """
    from nearfar.launch.local.any_run import train

    resources = _of_this_machine(given)
    for run in runs:
        run = _as_given(run, given, debug)
        if debug:
            _debug(run, resources, then)
            continue
        before = records.read_ending(run.path)
        if not train(run, console).finished:
            return
        if before is None or before.state != "finished":
            step = records.saved_step(run.path)
            ending = records.Ending(state="finished", job="none", step=step, steps=step)
            records.write_ending(run.path, "train", ending)
        if then:
            job.score_run(run.path, list(then))


def describe_runs(
    runs: Sequence[Run | FinetuneRun], given: dict[str, Any], then: Sequence[str], console: Console
) -> None:
    """Say what `launch` would do, and do nothing.

    Raises:
        UserError: more than one machine is asked for, or more GPUs than this one has.
    """
    from nearfar.launch.local import processes

    _of_this_machine(given)
    for run in runs:
        run = _as_given(run, given, debug=False)
        count, why = processes.ranks_here(run)[1:]
        verb, images = VERBS[run.as_asked()], run.data.path or "no images (data.path= is not set)"
        line = f"{run.path}: {verb} on {images}, {run.train.device}, "
        line += f"{count} process{'es' if count != 1 else ''} ({why})"
        line += f", {run.train.epochs} epochs" + (f"; then {', '.join(then)}" if then else "")
        console.print(line, highlight=False, soft_wrap=True)
    console.print("Nothing was started. Leave out --dry-run to begin.", highlight=False, soft_wrap=True)


def _of_this_machine(given: dict[str, Any]) -> Resources:
    resources = Resources.model_validate({**given, "cpu": True, "gpus_per_node": None})
    if resources.nodes > 1:
        raise UserError(f"--nodes {resources.nodes} needs --cluster slurm: this is one machine.")
    return resources


def _as_given(run: Run | FinetuneRun, given: dict[str, Any], debug: bool) -> Run | FinetuneRun:
    """With the device and the number of processes that the flags say."""
    update: dict[str, Any] = {}
    if given.get("cpu"):
        update["device"] = "cpu"
    requested = given.get("tasks_per_node") or gpu_count(given.get("gpus_per_node"))
    if requested and not debug:
        update["world_size"] = requested
    return run.model_copy(update={"train": run.train.model_copy(update=update)})


def _debug(run: Run | FinetuneRun, resources: Resources, then: Sequence[str]) -> None:
    submission = run.path / "cluster" / "debug"
    settings = submission / "settings" / f"{run.name}.yaml"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(config.to_yaml(run))
    SubmissionRecord(resources=resources, runs=[run.path], then=list(then)).write(submission)
    executor = submitit.DebugExecutor(folder=submission / "log")
    executor.submit(job.train_job, str(settings), str(run.path)).results()
    if then:
        executor.submit(job.evaluation_job, str(settings), str(run.path), list(then)).results()
