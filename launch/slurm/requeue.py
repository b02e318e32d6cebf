"""What a job does that was interrupted: at its time limit, and where SLURM preempts it, it goes back to the queue.

What is done where its processes died instead, or failed, is in requeue_after_failure.py.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from nearfar.launch.local.stop_signals import StopFlag
from nearfar.launch.slurm import queue, records
from nearfar.launch.slurm.job_process import JobProcess
from nearfar.ssl.errors import UserError

# SLURM kills a job that it preempts or cancels within its grace time, and one that lost a node within SlurmdTimeout
# (300 s unless a site says otherwise). A process still alive after this was not going to be killed.
KILLED_WITHIN = 900.0


def leave_interrupted(run: Path, process: JobProcess, stop: StopFlag, step: int, steps: int) -> NoReturn:
    """Saved, but not finished: requeue after USR2 alone or where SLURM preempts, else wait to be killed."""
    until = time.monotonic() + 5
    while not stop() and process.size > 1 and time.monotonic() < until:  # another rank heard it first
        time.sleep(0.01)
    names = " and ".join(sorted(name.name for name in stop.signals)) or "a signal to another rank"
    if process.rank == 0:
        records.end_attempt(run, process.end("train", f"saved at step {step} after {names}"))
    if process.result and stop.signals == {signal.SIGUSR2}:
        _requeue_and_leave(run, process, stop, step, steps)
    stopped = process.ending("stopped", f"stopped by {names}").model_copy(update={"step": step, "steps": steps})
    if process.result:
        if process.rank == 0 and _preempted(process.job):
            print(f"Saved at step {step} of {steps}; SLURM preempts job {process.job}: back to the queue.", flush=True)
            try:
                queue.requeue(process.job, patience=60)
            except UserError as error:
                stopped = stopped.model_copy(update={"why": str(error)})
        wait_for_the_end()
    if process.rank == 0:
        records.write_ending(run, "train", stopped)
    sys.exit(1 if process.result else 0)  # not 0 in a job: what depends on a finished run must not start


def _requeue_and_leave(run: Path, process: JobProcess, stop: StopFlag, step: int, steps: int) -> NoReturn:
    """The first rank requeues the job; the others stay until SLURM ends them, so that srun does not miss them."""
    if process.rank > 0:
        wait_for_the_end(queue.REQUEUE_PATIENCE, lambda: signal.SIGTERM in stop.signals)
        sys.exit(0)
    print(f"Saved at step {step} of {steps}; job {process.job} goes back to the queue.", flush=True)
    try:
        queue.requeue(process.job)
    except UserError as error:
        stopped = process.ending("stopped", str(error))
        records.write_ending(run, "train", stopped.model_copy(update={"step": step, "steps": steps}))
        print(f"nearfar: {error}", flush=True)
        sys.exit(1)
    sys.exit(0)


def _preempted(job: str) -> bool:
    try:
        return queue.preempted(job)
    except UserError:
        return False


def wait_for_the_end(seconds: float = KILLED_WITHIN, enough: Callable[[], bool] = lambda: False) -> None:
    """Sleep until SLURM kills this process; returns when it does not, or when it is `enough`."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not enough():
        time.sleep(min(left, 0.2))
