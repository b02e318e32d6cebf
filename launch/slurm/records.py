"""What a run folder knows of its jobs: which were submitted, each attempt of them, and how the run ended.

    runs/NAME/cluster/jobs.json         jobs that were submitted, oldest first
    runs/NAME/cluster/attempts.jsonl    a line when an attempt begins, a line when it ends in words
    runs/NAME/cluster/STAMP/            one submission: settings/, resources.yaml, code/ as it was, log/
    runs/NAME/done.json                 how training ended (done-eval.json: evaluation); none while it may go on

The disk is the truth: queues forget, and a result that a job left behind says nothing of its next attempt.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from nearfar.ssl import checkpoint_names
from nearfar.ssl.errors import UserError

Kind = Literal["train", "eval"]


class Job(BaseModel):
    """A submitted job of one run; `job` is SLURM's id, with _INDEX in an array."""

    job: str
    kind: Kind
    name: str
    home: Path  # the folder of the submission
    config: Path
    tasks: list[str] = []  # of an evaluation
    when: float = 0.0
    cancelled: bool = False

    @property
    def log(self) -> Path:
        """What the first rank said, all attempts one below the other."""
        return self.home / "log" / f"{self.job}_0_log.out"


class Attempt(BaseModel):
    """The beginning of an attempt: from which step, and which step the attempt before had reached."""

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


class Done(BaseModel):
    """How it ended: finished, failed (why), or stopped on request."""

    state: Literal["finished", "failed", "stopped"]
    job: str
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
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def jobs(run: Path) -> list[Job]:
    """The jobs of a run, oldest first; none for a run that was never submitted."""
    file = run / "cluster" / "jobs.json"
    if not file.exists():
        return []
    try:
        return [Job.model_validate(job) for job in json.loads(file.read_text())]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}.") from None


def latest(run: Path, kind: Kind) -> Job | None:
    return next((job for job in reversed(jobs(run)) if job.kind == kind), None)


def record(run: Path, *new: Job) -> None:
    """Add jobs, or replace those with the same id and home."""
    known = {(str(job.home), job.job): job for job in jobs(run)}
    known |= {(str(job.home), job.job): job for job in new}
    _write(run / "cluster" / "jobs.json", [job.model_dump(mode="json") for job in known.values()])


def begin(run: Path, job: str, restart: int, tries: int) -> Attempt:
    """Write down that an attempt begins.

    SLURM_RESTART_COUNT alone would end a run that is preempted every hour for weeks; so restarts only count since the
    checkpoint last moved.

    Raises:
        UserError: `tries` attempts of this job have begun at the step at which this one would begin.
    """
    now = Attempt(
        job=job, restart=restart, step=saved_step(run), reached=reached_step(run), host=socket.gethostname(),
        time=time.time(),
    )  # fmt: skip
    here = [attempt.restart for attempt in attempts(run) if attempt.job == job and attempt.step == now.step]
    _append(run, {"begins": now.model_dump()})
    (run / "done.json").unlink(missing_ok=True)
    if here and restart - min(here) >= tries:
        raise UserError(
            f"No progress: {tries} attempts of job {job} all began at step {now.step} and none saved a later one. "
            "See what they said in the log; make checkpoints more frequent (train.save_every_steps or "
            "train.save_every_minutes), the time limit longer or the signal earlier "
            "(--signal-delay), then `nearfar launch resubmit`."
        )
    return now


def end(run: Path, job: str, restart: int, why: str) -> None:
    """Write down how an attempt ended, where it had the time to say so."""
    _append(run, {"ends": {"job": job, "restart": restart, "step": saved_step(run), "why": why, "time": time.time()}})


def attempts(run: Path) -> list[Attempt]:
    return [Attempt.model_validate(line["begins"]) for line in _lines(run) if "begins" in line]


def endings(run: Path) -> list[dict[str, Any]]:
    return [line["ends"] for line in _lines(run) if "ends" in line]


def settle(run: Path, kind: Kind, done: Done) -> None:
    """Write how it ended. The first to say why a run failed is believed: the others only lost it."""
    file = _done_file(run, kind)
    if done.state == "failed" and (known := outcome(run, kind)) and known.job == done.job:
        return
    _write(file, done.model_copy(update={"time": time.time()}).model_dump())


def outcome(run: Path, kind: Kind = "train") -> Done | None:
    """How it ended; None while it has not."""
    file = _done_file(run, kind)
    try:
        return Done.model_validate_json(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}.") from None


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


def _done_file(run: Path, kind: Kind) -> Path:
    return run / ("done.json" if kind == "train" else "done-eval.json")


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
    partial = file.with_name(f".writing-{file.name}-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(file)
    except OSError as error:
        raise UserError(f"{file} could not be written: {error}.") from None
