"""`nearfar launch`: runs -> a submission folder with settings, code and logs -> jobs that the run folders know of."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import yaml
from rich.console import Console

from nearfar.launch.slurm import executor, job, queue, records, snapshot
from nearfar.launch.slurm.records import Job
from nearfar.launch.slurm.resources import Resources
from nearfar.ssl import config
from nearfar.ssl.config import Run
from nearfar.ssl.defaults import continued
from nearfar.ssl.errors import UserError
from nearfar.ssl.run_folder import RunFolder

EVAL_HOURS = 4.0


class Plan(NamedTuple):
    """What is to be submitted: one run, or the runs of a sweep."""

    folder: Path  # of the run or the sweep
    runs: list[Run]
    resources: Resources
    then: tuple[str, ...] = ()  # evaluations after training
    parallel: int | None = None  # runs of a sweep at the same time


def settled(run: Run, resources: Resources) -> Run:
    """`run` as a job on another machine will read it: paths absolute, the device that was asked for.

    Raises:
        UserError: what can be seen to fail before it waits in a queue.
    """
    if not run.data.path:
        raise UserError("data.path is not set: name the training images, for example data.path=~/pictures.")
    if not run.name:
        raise UserError("The run has no name: set name=.")
    if resources.cpu and run.train.device == "cuda":
        raise UserError("train.device=cuda and --cpu contradict each other: choose one.")
    if not resources.cpu and run.train.device == "cpu":
        raise UserError("train.device=cpu and --gpus-per-node contradict each other: say --cpu, or leave the device.")
    if run.train.batch_size % resources.world:
        raise UserError(
            f"train.batch_size={run.train.batch_size} does not divide into {resources.world} processes "
            f"({resources.nodes} nodes x {resources.tasks})."
        )
    data = run.data.model_copy(
        update={"path": _absolute(run.data.path), "val": run.data.val and _absolute(run.data.val)}
    )
    if not Path(data.path).exists():
        raise UserError(f"data.path={data.path} does not exist on this machine; the jobs read it from there.")
    placed = run.model_copy(update={"folder": _absolute(run.folder), "data": data})
    saved = RunFolder(placed.path).saved_settings()
    if saved is None:  # "auto" on a node whose GPU is broken would train on its CPU for days
        device = run.train.model_copy(update={"device": "cpu" if resources.cpu else "cuda"})
        placed = placed.model_copy(update={"train": device})
    elif saved.train.device != run.train.device == "auto":  # begun by a job: continued by one
        placed = placed.model_copy(update={"train": run.train.model_copy(update={"device": saved.train.device})})
    if saved:
        continued(placed, saved)
    return placed


def dry_run(plan: Plan, console: Console) -> None:
    """Print the resources and exactly what sbatch would be given, and touch nothing."""
    home = _absolute(str(plan.folder)) + "/cluster/STAMP"
    world = plan.resources
    console.print(
        f"{len(plan.runs)} run{'s' if len(plan.runs) > 1 else ''} on {world.nodes} x {world.tasks} processes, "
        f"{world.cpus_per_task} cores each, {plan.runs[0].train.batch_size // world.world} images a step each",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    training = _training(Path(home), plan)
    print(training.script(len(plan.runs)))
    if plan.then:
        print(f"# then, for {', '.join(plan.then)}")
        print(_evaluation(Path(home), plan, "JOB").script(len(plan.runs)))


def submit(plan: Plan, console: Console, code: Path | None = None) -> list[Job]:
    """Submit training and what follows it; each run's folder knows its jobs from then on.

    code: a snapshot to run (of an earlier submission); default: a new one.

    Raises:
        UserError: a run of the plan has a job in the queue or is finished, or SLURM refuses.
    """
    if not queue.installed():
        raise UserError("SLURM is not installed on this machine (no sbatch): use --cluster local, or log in to one.")
    with ExitStack() as stack:
        for run in plan.runs:
            stack.enter_context(records.locked(run.path))
        refuse_active([run.path for run in plan.runs])
        home = _new_home(plan.folder / "cluster")
        if code:
            shutil.copytree(code, home / "code")
        else:
            snapshot.take(home / "code")
        (home / "resources.yaml").write_text(yaml.safe_dump(plan.resources.model_dump(), sort_keys=False))
        (home / "settings").mkdir()
        for run in plan.runs:
            _config(home, run).write_text(config.to_yaml(run))
        return _submit(home, plan, console)


def refuse_active(folders: Sequence[Path]) -> None:
    """
    Raises:
        UserError: one of the runs has a job that is queued or running, or is finished.
    """
    for folder in folders:
        known = {each.job: each for each in records.jobs(folder)}
        found = queue.look(known)
        for number, each in known.items():
            seen = found.get(number)
            if seen and seen.active and seen.name == each.name:
                raise UserError(
                    f"{folder} already has job {number} ({each.kind}, {seen.state}) in the queue. Two jobs in "
                    f"one run folder would overwrite each other: `nearfar launch cancel {folder}` first, or choose "
                    "another name=."
                )
        done = records.outcome(folder)
        if done and done.state == "finished":
            raise UserError(f"{folder} is finished (step {done.step}): nothing to train. `nearfar eval` scores it.")


def _submit(home: Path, plan: Plan, console: Console) -> list[Job]:
    training = _training(home, plan)
    name, now = _name(plan), time.time()
    calls = [partial(job.train, str(_config(home, run)), str(run.path)) for run in plan.runs]
    numbers = executor.submit(training, calls)
    made = []
    for run, number in zip(plan.runs, numbers, strict=True):
        made.append(Job(job=number, kind="train", name=name, home=home, config=_config(home, run), when=now))
        records.record(run.path, made[-1])
    if plan.then:
        evaluation = _evaluation(home, plan, numbers[0].partition("_")[0])
        scoring = [partial(job.evaluate, str(_config(home, run)), str(run.path), list(plan.then)) for run in plan.runs]
        for run, number in zip(plan.runs, executor.submit(evaluation, scoring), strict=True):
            (run.path / "done-eval.json").unlink(missing_ok=True)
            made.append(
                Job(
                    job=number, kind="eval", name=f"{name}-eval", home=home, config=_config(home, run),
                    tasks=list(plan.then), when=now,
                )
            )  # fmt: skip
            records.record(run.path, made[-1])
    for each in made:
        console.print(f"job {each.job}: {each.name}, log {each.log}", highlight=False, soft_wrap=True)
    console.print(f"nearfar launch status {plan.folder}", highlight=False, soft_wrap=True)
    return made


def _training(home: Path, plan: Plan) -> executor.Executor:
    delay = max(executor.signal_delay(run.path, plan.resources) for run in plan.runs)
    return executor.executor(home, _name(plan), plan.resources, delay=delay, parallel=plan.parallel)


def _evaluation(home: Path, plan: Plan, training: str) -> executor.Executor:
    """One process, after training has ended well; the elements of an array each wait for their own run."""
    resources = plan.resources.model_copy(
        update={
            "nodes": 1,
            "tasks_per_node": 1,
            "gpus_per_node": None if plan.resources.cpu else 1,
            "hours": min(plan.resources.hours, EVAL_HOURS),
        }
    )
    kind = "afterok" if len(plan.runs) == 1 else "aftercorr"
    return executor.executor(
        home, f"{_name(plan)}-eval", resources, delay=30, after=f"{kind}:{training}", parallel=plan.parallel
    )  # fmt: skip


def _name(plan: Plan) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_.=+" else "-" for letter in plan.folder.name)


def _config(home: Path, run: Run) -> Path:
    return home / "settings" / f"{run.name}.yaml"


def _new_home(folder: Path) -> Path:
    """A fresh folder: a new cluster counts its jobs from 1 again, and old logs must not be taken for its own."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        try:
            (folder / f"{stamp}{suffix}").mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error}.") from None
        return folder / f"{stamp}{suffix}"
    raise UserError(f"A hundred submissions to {folder} within a second: something calls `nearfar launch` in a loop.")


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
