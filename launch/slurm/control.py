"""What a user asks of submitted runs: how are they, stop, say what they say, go on."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table

from nearfar.launch.slurm import queue, records, resources, submission
from nearfar.launch.slurm.queue import Seen
from nearfar.launch.slurm.records import Attempt, Done, Job
from nearfar.launch.slurm.submission import Plan
from nearfar.ssl import config
from nearfar.ssl.errors import UserError

POLL = 1.0  # seconds between two looks at a log that is followed


class Status(NamedTuple):
    """One run, as the queue and its folder tell together."""

    run: Path
    job: Job | None
    state: str
    why: str
    step: int
    steps: int | None
    loss: float | None
    attempts: list[Attempt]
    evaluation: str

    @property
    def lost(self) -> int:
        return sum(attempt.lost for attempt in self.attempts)


def found(folder: Path) -> list[Path]:
    """The run folders that are meant: a run, the runs of a sweep, or all below a folder of runs.

    Raises:
        UserError: there is none.
    """
    if not folder.is_dir():
        raise UserError(f"There is no run folder {folder}.")
    if _is_run(folder):
        return [folder]
    inside = sorted(
        {file.parent.parent for depth in ("*", "*/*") for file in folder.glob(f"{depth}/cluster/jobs.json")}
    )
    if not inside:
        raise UserError(f"Nothing in {folder} was submitted to a cluster: see `nearfar launch --help`.")
    return inside


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("cluster/jobs.json", "config.yaml", "done.json"))


def statuses(runs: Sequence[Path]) -> list[Status]:
    """How each run is. One look at the queue for all of them; where it cannot be asked, the folders alone are read."""
    last = {run: {kind: records.latest(run, kind) for kind in ("train", "eval")} for run in runs}
    ids = [job.job for jobs in last.values() for job in jobs.values() if job]
    try:
        seen, trouble = queue.look(ids), ""
    except UserError as error:
        seen, trouble = {}, str(error)
    return [_status(run, last[run]["train"], last[run]["eval"], seen, trouble) for run in runs]


def _status(run: Path, train: Job | None, scoring: Job | None, seen: dict[str, Seen], trouble: str) -> Status:
    metrics = records.last_metrics(run, "loss")
    step, done = max(records.saved_step(run), int(metrics.get("step", 0))), records.outcome(run)
    state, why = combined(train, seen.get(train.job) if train else None, done, trouble)
    known = records.attempts(run)
    here = [attempt for attempt in known if train and attempt.job == train.job]
    evaluation = ""
    if scoring:
        evaluation, problem = combined(scoring, seen.get(scoring.job), records.outcome(run, "eval"), trouble)
        if evaluation == "failed":  # not where it was given up because training did not end well
            why = " ".join(part for part in (why, f"Evaluation: {problem}") if part)
    return Status(run, train, state, why, step, _steps(run, metrics, done), metrics.get("loss"), here, evaluation)


def combined(job: Job | None, seen: Seen | None, done: Done | None, trouble: str) -> tuple[str, str]:
    """State and reason, from the queue while the job is in it, from the run's own word after that."""
    done = done if done and (job is None or done.job == job.job) else None
    why = done.why if done else ""
    if seen and job and seen.name not in ("", job.name):
        seen = None  # another job: ids begin anew on a new cluster
    if seen and seen.active:
        return seen.state.lower(), seen.reason if seen.state == "PENDING" else ""
    if job and job.cancelled and not (done and done.state == "finished"):
        return "cancelled", why
    if done:
        return done.state, why
    if job is None:
        return "not submitted", ""
    if seen:
        return seen.state.lower(), why or "it ended without a word: see the log"
    return "unknown", trouble or "SLURM has forgotten the job, and it left no done.json: killed, or never started"


def _steps(run: Path, metrics: dict[str, Any], done: Done | None) -> int | None:
    if done and done.steps:
        return done.steps
    file = run / "config.yaml"
    if not metrics.get("epoch") or not file.exists():
        return None
    per_epoch = metrics["step"] / metrics["epoch"]
    return round(per_epoch * yaml.safe_load(file.read_text())["train"]["epochs"])


def show(all_of_them: Sequence[Status], console: Console) -> None:
    """A table for several runs; for a single one everything, a line each."""
    if len(all_of_them) == 1:
        for label, value in _lines(all_of_them[0]):
            console.print(f"{label:<11} {value}", highlight=False, markup=False, soft_wrap=True)
        return
    table = Table()
    for title in ("run", "job", "state", "attempts", "step", "loss", "evaluation", "why"):
        table.add_column(title, overflow="fold")
    for each in all_of_them:
        loss = "" if each.loss is None else f"{each.loss:.3f}"
        step = f"{each.step}/{each.steps}" if each.steps else str(each.step)
        job = each.job.job if each.job else ""
        table.add_row(
            str(each.run), job, each.state, str(len(each.attempts)), step, loss, each.evaluation, each.why[:80]
        )
    console.print(table)


def _lines(status: Status) -> Iterator[tuple[str, str]]:
    yield "run", str(status.run)
    yield "state", status.state
    if status.why:
        yield "because", status.why
    if status.job:
        yield "job", f"{status.job.job} ({status.job.name})"
        lost = f", {status.lost} steps done again" if status.lost else ""
        yield "attempts", f"{len(status.attempts)}{lost}"
    yield "step", f"{status.step}" + (f" of {status.steps}" if status.steps else "")
    if status.loss is not None:
        yield "loss", f"{status.loss:.4f}"
    if status.evaluation:
        yield "evaluation", status.evaluation
    if status.job:
        yield "log", str(status.job.log)


def cancel(runs: Sequence[Path], console: Console) -> None:
    """End the jobs of these runs for good; what they saved stays. The log says where they stopped.

    Raises:
        UserError: none of them is in the queue, or SLURM refuses.
    """
    ended = []
    for run in runs:
        with records.locked(run):
            known = {job.job: job for job in records.jobs(run)}
            active = [
                known[number]
                for number, seen in queue.look(known).items()
                if seen.active and seen.name == known[number].name
            ]
            if active:
                queue.cancel(job.job for job in active)
                records.record(run, *(job.model_copy(update={"cancelled": True}) for job in active))
            ended += active
    if not ended:
        raise UserError("None of these runs has a job in the queue.")
    for job in ended:
        console.print(f"cancelled job {job.job}: {job.name}", highlight=False, soft_wrap=True)


def logs(run: Path, follow: bool, kind: records.Kind = "train") -> None:
    """Print what the run's last job says, all attempts; `follow`: until the job has left the queue.

    Raises:
        UserError: there is no such job, or it has not said anything.
    """
    job = records.latest(run, kind)
    if job is None:
        raise UserError(f"{run} has no {kind} job: it was not submitted to a cluster.")
    place, ending = 0, not follow
    while True:
        if job.log.exists():
            with job.log.open("rb") as handle:
                handle.seek(place)
                text = handle.read()
            place += len(text)
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()
        if ending:
            break
        seen = queue.look([job.job]).get(job.job)
        ending = not (seen and seen.active)  # and read once more what was said meanwhile
        time.sleep(0 if ending else POLL)
    if not job.log.exists():
        raise UserError(f"Job {job.job} has not said anything yet: it waits in the queue, or never started.")


def resubmit(runs: Sequence[Path], given: dict[str, Any], console: Console) -> list[Job]:
    """Submit runs again that are not finished, with the settings, code and resources of their last submission.

    given: resources to change, such as a longer time limit. Runs of a sweep that are finished or still in the queue
    are left out.

    Raises:
        UserError: nothing is left to submit.
    """
    states = statuses(runs)
    if len(runs) > 1:
        states = [state for state in states if state.state not in ("finished", *map(str.lower, queue.ACTIVE))]
    jobs = [state.job for state in states if state.job]
    if not jobs:
        raise UserError("There is nothing to submit again: never submitted, finished, or still in the queue.")
    first = jobs[0]
    tree = yaml.safe_load((first.home / "resources.yaml").read_text()) | given
    then = next((tuple(job.tasks) for state in states if (job := records.latest(state.run, "eval"))), ())
    plan = Plan(
        first.home.parent.parent, [config.load(job.config) for job in jobs], resources.check(tree, "in the flags"), then
    )
    return submission.submit(plan, console, first.home / "code")
