"""What a job does on the cluster's nodes: one process of a run, from wherever it stands, through every interruption.

SLURM asks a job to make room in two ways, and each rank hears them: USR2, before the time limit and (where a site has
set it so) at preemption, means "requeue yourself"; TERM, at preemption with grace and at scancel, means "you will be
killed". SLURM sends its USR2 only once in a job's life, however often it is requeued (seen with 22.05): so every
attempt has a timer of its own for the time limit. Either way all ranks agree at the end of a step, the first one saves,
and then:

- after USR2 alone the first rank asks SLURM to requeue the job, and all leave;
- after TERM all wait to be killed, and the first rank requeues the job only where SLURM says that it is a preemption
  (PreemptMode=CANCEL would not bring it back). To requeue after any TERM would make a job that nobody can cancel; to
  leave would, within a preemption's grace, count as a failure.

Until the handlers here are set, both signals are ignored (see nearfar.launch.slurm.executor).
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from nearfar.launch.local.stop_signals import StopFlag
from nearfar.launch.slurm import queue, records
from nearfar.launch.slurm.job_process import JobProcess
from nearfar.launch.slurm.records import SubmissionRecord
from nearfar.launch.slurm.requeue import leave_interrupted, wait_for_the_end
from nearfar.ssl.disk import checkpoint_names, file_lock, files
from nearfar.ssl.errors import PeerError, UserError

if TYPE_CHECKING:
    from nearfar.ssl.train import Outcome

LOCK_PATIENCE = 300.0  # seconds in which a process of an earlier attempt may still be ended
MEETING = LOCK_PATIENCE + 300.0  # seconds in which the first rank must say where the ranks meet


class InfrastructureError(RuntimeError):
    """A failure of a machine or of the cluster, which another attempt may not meet again."""


def train_job(config: str, folder: str) -> None:
    """Train the run of `config` (YAML, in settings/ of a submission) in `folder`, as one process of a job.

    Ends the process by itself when the job goes on later, or failed. Returns when the run is finished.

    Raises (outside SLURM only; in a job it is written down, and the process ends):
        UserError, RuntimeError ...: what ended it; ending.json in the run's folder says it too.
    """
    run, submission, process = Path(folder), Path(config).parent.parent, JobProcess.this()
    with StopFlag() as stop:
        try:
            _forget_result(process)
            if process.rank == 0:
                record = SubmissionRecord.read(submission)
                records.begin_attempt(run, process.job, process.restart, record.resources.tries)
                _tell_changed_torch(run)
                wait_for_lock(run, stop)
            deadline = rendezvous(submission / "meeting", process, save_by(run, submission, process))
            with _alarm(deadline):
                outcome = _train(Path(config))
        except Exception as error:
            _failed(run, "train", process, error)
        if outcome.finished:
            if process.rank == 0:
                records.end_attempt(run, process.end("train", "finished"))
                ending = process.ending("finished")
                records.write_ending(
                    run, "train", ending.model_copy(update={"step": outcome.step, "steps": outcome.steps})
                )
            return
        leave_interrupted(run, process, stop, outcome.step, outcome.steps)


def evaluation_job(config: str, folder: str, tasks: list[str]) -> None:
    """Score the run in `folder` on its own data.path and data.val, and write its report; one process.

    Raises: as `train_job`; ending-eval.json says it too.
    """
    run, submission, process = Path(folder), Path(config).parent.parent, JobProcess.this()

    def again(*_: object) -> NoReturn:
        records.end_attempt(run, process.end("eval", "stopped by SIGUSR2"))
        queue.requeue(process.job)
        sys.exit(0)

    if process.result:  # TERM is ignored: to end within a preemption's grace would count as a failure
        signal.signal(signal.SIGUSR2, again)
    try:
        _forget_result(process)
        tries = SubmissionRecord.read(submission).resources.tries
        records.begin_attempt(run, process.job, process.restart, tries, "eval")
        score_run(run, tasks)
    except Exception as error:
        _failed(run, "eval", process, error)
    records.write_ending(run, "eval", process.ending("finished"))


def _forget_result(process: JobProcess) -> None:
    if process.result:
        process.result.unlink(missing_ok=True)  # of an earlier attempt: it says nothing about this one


def _tell_changed_torch(run: Path) -> None:
    """One line where the newest checkpoint was written by another torch (its version names its CUDA too)."""
    import torch

    step = records.saved_step(run)
    try:
        state = json.loads((run / "checkpoints" / checkpoint_names.name_of(step) / "state.json").read_text())
        before = state["versions"]["torch"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if before != torch.__version__:
        print(
            f"torch is {torch.__version__} now and was {before} when step {step} was saved: the run goes on, but its "
            "last bits may differ from those of an undisturbed run.",
            flush=True,
        )


def wait_for_lock(run: Path, stop: Callable[[], bool], patience: float = LOCK_PATIENCE) -> None:
    """Wait while a process of an earlier attempt, which SLURM lost track of, still holds the run's folder.

    Raises:
        InfrastructureError: it did not end in time.
    """
    until, announced = time.monotonic() + patience, False
    while not stop() and (holder := file_lock.holder(run / "lock")):
        if time.monotonic() > until:
            raise InfrastructureError(f"{run} is still in use by {holder} after {patience:.0f} s")
        if not announced:
            print(f"{run} is in use by {holder}, a process of an earlier attempt: waiting for its end.", flush=True)
            announced = True
        time.sleep(1)


def save_by(run: Path, submission: Path, process: JobProcess) -> float | None:
    """When the first rank must begin to save (time.time()), for the time limit's sake; None without a limit."""
    from nearfar.launch.slurm.executor import signal_delay

    if process.rank != 0 or not process.result:
        return None
    try:
        left = queue.seconds_left(process.job)
    except UserError as error:
        print(f"{error} The time limit is left to SLURM's own signal, which comes once in a job's life.", flush=True)
        return None
    if left is None:
        return None
    return time.time() + left - signal_delay(run, SubmissionRecord.read(submission).resources)


@contextmanager
def _alarm(deadline: float | None) -> Iterator[None]:
    """Within it this process gets SIGUSR2 at the deadline, as if SLURM had sent it."""
    if deadline is None:
        yield
        return
    timer = threading.Timer(max(0.0, deadline - time.time()), os.kill, (os.getpid(), signal.SIGUSR2))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def rendezvous(folder: Path, process: JobProcess, deadline: float | None = None) -> float | None:
    """Set MASTER_ADDR and MASTER_PORT: a port that is free now on the first rank's node, told through `folder`.

    A port computed from the job's id, as others do it, may be taken by another job on the same node. The first rank's
    `deadline` is told the same way: returns it on every rank.

    Raises:
        InfrastructureError: the first rank did not say it in time.
    """
    if process.size == 1:
        return deadline
    file = folder / f"{process.job}-{process.restart}"
    if process.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        files.write_text(file, f"{_resolvable(process.first_node)} {port} {deadline or 'never'}\n")
    until = time.monotonic() + MEETING
    while file not in (folder.iterdir() if folder.is_dir() else ()):  # a listing is fresh where a look-up may be cached
        if time.monotonic() > until:
            raise InfrastructureError(f"Rank {process.rank}: the first rank did not write {file} within {MEETING:g} s.")
        time.sleep(0.05)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], save_by = file.read_text().split()
    return None if save_by == "never" else float(save_by)


def _resolvable(node: str) -> str:
    """The node's name as SLURM knows it if that is a host's name as well, else the host's own."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        return socket.gethostname()
    return node


def _failed(run: Path, kind: records.Kind, process: JobProcess, error: Exception) -> NoReturn:
    """Write down why and end the process. What the machines did is tried again by requeue_after_failure.py.

    A rank that only lost another one leaves the explanation to that one, or to SLURM.

    Raises:
        Exception: `error` itself, outside SLURM.
    """
    mistake = isinstance(error, UserError)
    if process.result:  # outside SLURM the caller reports it
        print(f"nearfar: {error}", flush=True) if mistake else traceback.print_exc()
    if isinstance(error, PeerError) and process.result:
        # A rank that ended by itself: srun ends us within the second. A node that died: SLURM requeues the job when it
        # notices, and to fail before that would end the run.
        wait_for_the_end()
    why = str(error) if mistake or isinstance(error, InfrastructureError) else f"{type(error).__name__}: {error}"
    where = f"rank {process.rank} on {socket.gethostname()}: " if process.size > 1 else ""
    if process.result and is_infrastructure(error):
        records.end_attempt(run, process.end(kind, where + why, infrastructure=True))
    else:
        ending = process.ending("failed", where + why)
        records.write_ending(run, kind, ending.model_copy(update={"step": records.saved_step(run)}))
    if process.result is None:
        raise error
    sys.stdout.flush()
    sys.exit(2 if mistake else 1)


# What torch, NCCL and CUDA say of broken links and devices. Too little GPU memory is the run's own fault.
_BROKEN = re.compile(r"nccl|gloo|connection (closed|reset|refused)|cuda error|ecc error|cuda driver|xid", re.IGNORECASE)
_BROKEN_FILES = {errno.EIO, errno.ESTALE, errno.ENODEV, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ENOTCONN}


def is_infrastructure(error: BaseException) -> bool:
    """Was it the fault of machines, links or file systems, rather than of the run's settings, data or code?"""
    if isinstance(error, UserError) or type(error).__name__ == "OutOfMemoryError":
        return False
    if isinstance(error, InfrastructureError | PeerError | ConnectionError):
        return True
    if isinstance(error, OSError):
        return error.errno in _BROKEN_FILES
    return isinstance(error, RuntimeError) and _BROKEN.search(str(error)) is not None


def _train(config: Path) -> Outcome:
    """The run that these settings are of: which kind it is they say themselves."""
    from rich.console import Console

    from nearfar.launch.local.any_run import train_rank
    from nearfar.ssl.parallel.distributed import from_environment
    from nearfar.ssl.settings.finetune_settings import recorded_in

    world = from_environment()
    return train_rank(recorded_in(config), Console(quiet=not world.first), world)


def score_run(run: Path, tasks: list[str]) -> None:
    from rich.console import Console

    from nearfar.launch.computing import compute_for
    from nearfar.launch.scoring.report import report_run
    from nearfar.launch.scoring.score import Subject, score, sources

    subject = Subject.of(run)
    device = subject.run.train.device  # of the job: the GPU that it reserves
    subject = subject.on(compute_for(subject.backbone, device, "train.device="))
    train, val = sources(subject.run, None, None)
    score(subject, train, val, tasks=tasks, console=Console())
    report_run(run, subject)
