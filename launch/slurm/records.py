"""What a run folder records of its jobs: which were submitted, each attempt of them, and how the run ended.

    runs/NAME/cluster/jobs.json         jobs that were submitted, oldest first
    runs/NAME/cluster/attempts.jsonl    a line when an attempt begins, and one for what ended it
    runs/NAME/cluster/STAMP/            one submission: settings/, submission.yaml, code/ as it was, log/
    runs/NAME/ending.json               how training ended (ending-eval.json: evaluation); none while it may go on

The disk is the authority: queues forget, and a result that a job left behind says nothing about its next attempt.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel

from nearfar.launch.slurm.resources import Resources
from nearfar.ssl.disk import checkpoint_names, file_lock, files
from nearfar.ssl.errors import UserError

Kind = Literal["train", "eval"]
ATTEMPT_BEGINS = "nearfar: attempt"  # the first words of each attempt in the log that all of them share
_log = logging.getLogger(__name__)


class SubmissionRecord(BaseModel):
    """What was asked for in one submission: submission.yaml in its folder."""

    resources: Resources
    runs: list[Path]  # run folders, in the order of the array's elements
    then: list[str] = []  # evaluations after training
    parallel: int | None = None  # runs of a sweep at the same time

    @staticmethod
    def read(submission: Path) -> SubmissionRecord:
        """
        Raises:
            UserError: the folder holds none that this version can read.
        """
        file = submission / "submission.yaml"
        try:
            return SubmissionRecord.model_validate(yaml.safe_load(file.read_text()))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}.") from None

    def write(self, submission: Path) -> None:
        submission.mkdir(parents=True, exist_ok=True)
        (submission / "submission.yaml").write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


class Job(BaseModel):
    """A submitted job of one run; `job` is SLURM's id, with _INDEX in an array."""

    job: str
    kind: Kind
    verb: Literal["pretrain", "finetune"] = "pretrain"  # what a job that trains continues
    name: str
    submission: Path  # the submission's folder
    config: Path
    tasks: list[str] = []  # of an evaluation
    submitted_at: float = 0.0
    cancelled: bool = False

    @property
    def log(self) -> Path:
        """What the first rank said, all attempts one below the other."""
        return self.log_of(0)

    def log_of(self, rank: int) -> Path:
        return self.submission / "log" / f"{self.job}_{rank}_log.out"


class Attempt(BaseModel):
    """The beginning of an attempt: from which step, and which step the attempt before had reached.

    Of an evaluation, `step` counts the scores that are there already.
    """

    kind: Kind = "train"
    job: str
    restart: int
    step: int
    reached: int
    host: str
    time: float

    @property
    def lost(self) -> int:
        """Steps that have to be done again."""
        return max(0, self.reached - self.step)


class AttemptEnd(BaseModel):
    """What ended an attempt, as the rank that knew says; `infrastructure`: not the run's fault, so it is retried."""

    kind: Kind = "train"
    job: str
    restart: int
    step: int = 0
    why: str
    rank: int = 0
    infrastructure: bool = False
    time: float = 0.0


class Ending(BaseModel):
    """How training or an evaluation ended: finished, failed (why, as `rank` saw it), or stopped on request."""

    state: Literal["finished", "failed", "stopped"]
    job: str
    restart: int = 0
    rank: int = 0
    step: int = 0
    steps: int = 0
    why: str = ""
    time: float = 0.0


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Only one process at a time decides about the jobs of a run.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        (run / "cluster").mkdir(parents=True, exist_ok=True)
        lock = (run / "cluster" / "lock").open("a")
    except OSError as error:
        raise UserError(f"The run folder {run} cannot be written: {error}.") from None
    with lock:
        if not file_lock.acquire(lock, wait=True):
            _log.warning(f"The file system of {run} has no locks (flock): do not submit a run twice at the same time.")
        yield


def forget_refused(run: Path) -> None:
    """Remove what `locked` made for a run of which nothing was submitted; what holds anything else stays."""
    if (run / "cluster" / "jobs.json").exists():
        return
    (run / "cluster" / "lock").unlink(missing_ok=True)
    remove_if_empty(run / "cluster", run)


def remove_if_empty(*folders: Path) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def jobs(run: Path) -> list[Job]:
    """The jobs of a run, oldest first; none for a run that was never submitted."""
    file = run / "cluster" / "jobs.json"
    if not file.exists():
        return []
    try:
        return [Job.model_validate(job) for job in json.loads(file.read_text())]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}.") from None


def latest_job(run: Path, kind: Kind) -> Job | None:
    return next((job for job in reversed(jobs(run)) if job.kind == kind), None)


def record_jobs(run: Path, *new: Job) -> None:
    """Add jobs, or replace those with the same id and submission."""
    known = {(str(job.submission), job.job): job for job in jobs(run)}
    known |= {(str(job.submission), job.job): job for job in new}
    _write(run / "cluster" / "jobs.json", [job.model_dump(mode="json") for job in known.values()])


def begin_attempt(run: Path, job: str, restart: int, tries: int, kind: Kind = "train") -> Attempt:
    """Write down that an attempt begins.

    Raises:
        UserError: `tries` attempts of this job have begun with the progress with which this one would begin.
    """
    progress = _progress(run, kind)
    now = Attempt(
        kind=kind, job=job, restart=restart, step=progress, reached=max(progress, reached_step(run)),
        host=socket.gethostname(), time=time.time(),
    )  # fmt: skip
    before = fruitless_attempts(run, job, kind) - {restart}
    _append(run, {"begins": now.model_dump()})
    _ending_file(run, kind).unlink(missing_ok=True)
    if len(before) >= tries:
        raise UserError(no_progress(run, job, len(before), kind))
    return now


def fruitless_attempts(run: Path, job: str, kind: Kind = "train") -> set[int]:
    """The attempts of a job (by SLURM's count of restarts) since the last progress, that is since a checkpoint or a
    score was last saved.

    A job that is preempted every hour for weeks and saves every time has few of them, however often it restarted. An
    attempt that died before it could write down its beginning counts when its end was written down.
    """
    progress = _progress(run, kind)
    begun = {attempt.restart: attempt.step for attempt in attempts(run, kind) if attempt.job == job}
    silent = {
        end.restart
        for end in attempt_ends(run, kind)
        if end.job == job and end.restart not in begun and end.step == progress
    }
    return {restart for restart, step in begun.items() if step == progress} | silent


def no_progress(run: Path, job: str, count: int, kind: Kind = "train") -> str:
    """The sentence for a job that is given up after so many attempts."""
    last = next((f" The last one: {end.why}." for end in reversed(attempt_ends(run, kind)) if end.job == job), "")
    if kind == "eval":
        return (
            f"No progress: {count} attempts of job {job} added no score.{last} See what they said in the log; give the "
            "evaluation a longer time limit (--hours) or more memory (--mem-gb), or use `nearfar eval`."
        )
    return (
        f"No progress: {count} attempts of job {job} all began at step {saved_step(run)} and none saved a later one."
        f"{last} See what they said in the log; make checkpoints more frequent (train.save_every_steps or "
        "train.save_every_minutes), the time limit longer or the signal earlier (--signal-delay), then "
        "`nearfar launch resubmit`."
    )


def end_attempt(run: Path, end: AttemptEnd) -> None:
    """Write down what ended an attempt."""
    known = end.model_copy(update={"step": _progress(run, end.kind), "time": time.time()})
    _append(run, {"ends": known.model_dump()})


def attempts(run: Path, kind: Kind = "train") -> list[Attempt]:
    found = (Attempt.model_validate(line["begins"]) for line in _lines(run) if "begins" in line)
    return [attempt for attempt in found if attempt.kind == kind]


def attempt_ends(run: Path, kind: Kind = "train") -> list[AttemptEnd]:
    found = (AttemptEnd.model_validate(line["ends"]) for line in _lines(run) if "ends" in line)
    return [end for end in found if end.kind == kind]


def write_ending(run: Path, kind: Kind, ending: Ending) -> None:
    """Write how it ended. Of several failures the first recorded one stays: the other ranks only lost that rank."""
    if ending.state == "failed":
        known = read_ending(run, kind)
        if known and (known.job, known.restart) == (ending.job, ending.restart):
            return
    _write(_ending_file(run, kind), ending.model_copy(update={"time": time.time()}).model_dump())


def read_ending(run: Path, kind: Kind = "train") -> Ending | None:
    """How it ended; None while it has not."""
    file = _ending_file(run, kind)
    try:
        return Ending.model_validate_json(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}.") from None


def forget_ending(run: Path, kind: Kind) -> None:
    _ending_file(run, kind).unlink(missing_ok=True)


def saved_step(run: Path) -> int:
    """The step of the newest checkpoint, by name; 0 without one."""
    return checkpoint_names.newest_step(run / "checkpoints")


def reached_step(run: Path) -> int:
    """The last step in metrics.jsonl: with `train.log_every_steps` above 1 there may have been a few more."""
    return int(last_metrics(run).get("step", 0))


def last_metrics(run: Path, key: str = "step") -> dict[str, Any]:
    """The last whole line of metrics.jsonl that has `key`; reads only the end of the file."""
    try:
        with (run / "metrics.jsonl").open("rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - 65536))
            lines = handle.read().splitlines()
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and key in found:
            return found
    return {}


def _progress(run: Path, kind: Kind) -> int:
    return saved_step(run) if kind == "train" else _scores(run)


def _scores(run: Path) -> int:
    """How many numbers results.json holds."""

    def count(node: Any) -> int:
        if isinstance(node, dict | list):
            return sum(count(each) for each in (node.values() if isinstance(node, dict) else node))
        return isinstance(node, int | float)

    try:
        return count(json.loads((run / "results.json").read_text()))
    except (OSError, ValueError):
        return 0


def _ending_file(run: Path, kind: Kind) -> Path:
    return run / ("ending.json" if kind == "train" else "ending-eval.json")


def _append(run: Path, line: dict[str, Any]) -> None:
    with (run / "cluster" / "attempts.jsonl").open("ab+") as handle:
        size = handle.seek(0, os.SEEK_END)
        torn = size > 0 and os.pread(handle.fileno(), 1, size - 1) != b"\n"  # by a node that died while it wrote
        handle.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")


def _lines(run: Path) -> list[dict[str, Any]]:
    found = []
    file = run / "cluster" / "attempts.jsonl"
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def _write(file: Path, content: Any) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(file, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{file} could not be written: {error}.") from None
