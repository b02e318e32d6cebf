"""`nearfar launch`: runs -> a submission folder with settings, code and logs -> jobs, recorded in the run folders."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from nearfar.launch.slurm import checks, executor, job, queue, records, snapshot
from nearfar.launch.slurm.executor import JobOptions
from nearfar.launch.slurm.records import Ending, Job, SubmissionRecord
from nearfar.launch.slurm.resources import Resources
from nearfar.ssl import config
from nearfar.ssl.errors import UserError
from nearfar.ssl.run.run_folder import VERBS, RunFolder
from nearfar.ssl.settings.defaults import continued, continued_or_longer
from nearfar.ssl.settings.finetune_settings import FinetuneRun
from nearfar.ssl.settings.run import AnyRun, Run

EVAL_HOURS = 4.0


class Submission(NamedTuple):
    """What is to be submitted: one run, or the runs of a sweep."""

    folder: Path  # of the run or the sweep
    runs: list[Run | FinetuneRun]
    resources: Resources
    then: tuple[str, ...] = ()  # evaluations after training
    parallel: int | None = None  # runs of a sweep at the same time

    @property
    def job_name(self) -> str:
        return "".join(letter if letter.isalnum() or letter in "-_.=+" else "-" for letter in self.folder.name)


def for_cluster(placed: Run | FinetuneRun, resources: Resources) -> Run | FinetuneRun:
    """A run of `checks.placed` on the device that its job has.

    Raises:
        UserError: it contradicts the run that it would continue.
    """
    saved = RunFolder(placed.path).saved(type(placed))
    if saved is None:  # "auto" on a node whose GPU is broken would train on its CPU for days
        device = placed.train.model_copy(update={"device": "cpu" if resources.cpu else "cuda"})
        placed = placed.model_copy(update={"train": device})
    elif saved.train.device != placed.train.device == "auto":  # begun by a job: continued by one
        placed = placed.model_copy(update={"train": placed.train.model_copy(update={"device": saved.train.device})})
    if isinstance(placed, Run) and isinstance(saved, Run):
        continued_or_longer(placed, saved)
    elif saved:
        continued(placed, saved)
    return placed


def describe_jobs(submission: Submission, console: Console) -> None:
    """Print the resources and exactly what sbatch would be given, and touch nothing."""
    folder = Path(checks.absolute(str(submission.folder))) / "cluster" / "STAMP"
    resources, runs = submission.resources, submission.runs
    console.print(
        f"{len(runs)} run{'s' if len(runs) > 1 else ''} on {resources.nodes} x {resources.tasks} processes, "
        f"{resources.cpus_per_task} cores each, {runs[0].train.batch_size // resources.world} images a step each",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    print(_training(folder, submission).script(len(runs)))
    if submission.then:
        print(f"# then, for {', '.join(submission.then)}")
        print(_evaluation(folder, submission, "JOB").script(len(runs)))


def submit(submission: Submission, console: Console, code: Path | None = None) -> list[Job]:
    """Submit training and what follows it; each run's folder records its jobs.

    code: a snapshot to run (of an earlier submission); default: a new one.

    Raises:
        UserError: a run of the submission has a job in the queue or is finished, or SLURM refuses. A refused training
            leaves nothing behind; a refused evaluation leaves the training in the queue.
    """
    if not queue.installed():
        raise UserError("SLURM is not installed on this machine (no sbatch): use --cluster local, or log in to one.")
    folder: Path | None = None
    with ExitStack() as stack:
        try:
            for run in submission.runs:
                stack.enter_context(records.locked(run.path))
            refuse_active([run.path for run in submission.runs])
            folder = _new_folder(submission.folder / "cluster")
            _fill(folder, submission, code)
            made = _submit_training(folder, submission)
        except BaseException:
            _remove(folder, submission)
            raise
        _announce(made, console)
        if submission.then:
            _announce(_submit_evaluation(folder, submission, made), console)
    console.print(f"nearfar launch status {submission.folder}", highlight=False, soft_wrap=True)
    return made


def _fill(folder: Path, submission: Submission, code: Path | None) -> None:
    """The code, the settings and what was asked for."""
    if code:
        shutil.copytree(code, folder / "code")
    else:
        snapshot.copy_code(folder / "code")
    SubmissionRecord(
        resources=submission.resources,
        runs=[run.path for run in submission.runs],
        then=list(submission.then),
        parallel=submission.parallel,
    ).write(folder)
    (folder / "settings").mkdir()
    for run in submission.runs:
        _config(folder, run).write_text(config.to_yaml(run))


def _remove(folder: Path | None, submission: Submission) -> None:
    """Leave no trace of a refused submission."""
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    for run in submission.runs:
        records.forget_refused(run.path)
    records.remove_if_empty(submission.folder / "cluster", submission.folder)


def _announce(jobs: Sequence[Job], console: Console) -> None:
    for each in jobs:
        console.print(f"job {each.job}: {each.name}, log {each.log}", highlight=False, soft_wrap=True)


def refuse_active(folders: Sequence[Path]) -> None:
    """
    Raises:
        UserError: one of the runs has a job that is queued or running, or is finished.
    """
    for folder in folders:
        known = {each.job: each for each in records.jobs(folder)}
        found = queue.entries(known)
        for number, each in known.items():
            entry = found.get(number)
            if entry and entry.active and entry.name == each.name:
                raise UserError(
                    f"{folder} already has job {number} ({each.kind}, {entry.state}) in the queue. Two jobs in "
                    f"one run folder would overwrite each other: `nearfar launch cancel {folder}` first, or choose "
                    "another name=."
                )
        ending = records.read_ending(folder)
        if ending and ending.state == "finished":
            raise UserError(f"{folder} is finished (step {ending.step}): nothing to train. `nearfar eval` scores it.")


def _submit_training(folder: Path, submission: Submission) -> list[Job]:
    calls = [partial(job.train_job, str(_config(folder, run)), str(run.path)) for run in submission.runs]
    numbers = executor.submit_calls(_training(folder, submission), calls)
    return _record("train", submission.job_name, folder, submission, numbers)


def _submit_evaluation(folder: Path, submission: Submission, training: Sequence[Job]) -> list[Job]:
    """
    Raises:
        UserError: SLURM refuses; says that the training stays in the queue.
    """
    made = _evaluation(folder, submission, training[0].job.partition("_")[0])
    tasks = list(submission.then)
    calls = [partial(job.evaluation_job, str(_config(folder, run)), str(run.path), tasks) for run in submission.runs]
    try:
        numbers = executor.submit_calls(made, calls)
    except UserError as error:
        for run in submission.runs:
            records.write_ending(run.path, "eval", Ending(state="failed", job="none", why=str(error)))
        ids = ", ".join(each.job for each in training)
        raise UserError(
            f"The training was accepted as job {ids} and stays in the queue, but its evaluation was refused. {error} "
            f"When it is finished, score it with `nearfar eval`; `nearfar launch cancel {submission.folder}` ends it."
        ) from None
    for run in submission.runs:
        records.forget_ending(run.path, "eval")
    return _record("eval", f"{submission.job_name}-eval", folder, submission, numbers)


def _record(kind: records.Kind, name: str, folder: Path, submission: Submission, numbers: Sequence[str]) -> list[Job]:
    made, now = [], time.time()
    tasks = list(submission.then) if kind == "eval" else []
    for run, number in zip(submission.runs, numbers, strict=True):
        made.append(
            Job(
                job=number, kind=kind, verb=VERBS[run.as_asked()], name=name, submission=folder,
                config=_config(folder, run), tasks=tasks, submitted_at=now,
            )
        )  # fmt: skip
        records.record_jobs(run.path, made[-1])
    return made


def _training(folder: Path, submission: Submission) -> executor.Executor:
    delay = max(executor.signal_delay(run.path, submission.resources) for run in submission.runs)
    options = JobOptions(submission.job_name, signal_delay=delay, parallel=submission.parallel)
    return executor.executor(folder, submission.resources, options)


def _evaluation(folder: Path, submission: Submission, training: str) -> executor.Executor:
    """One process, after training has ended well; the elements of an array each wait for their own run."""
    dependency = "afterok" if len(submission.runs) == 1 else "aftercorr"
    options = JobOptions(
        f"{submission.job_name}-eval", "eval", after=f"{dependency}:{training}", parallel=submission.parallel
    )
    return executor.executor(folder, submission.resources.one_process(EVAL_HOURS), options)


def _config(folder: Path, run: AnyRun) -> Path:
    return folder / "settings" / f"{run.name}.yaml"


def _new_folder(folder: Path) -> Path:
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
