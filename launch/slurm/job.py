"""What a job does on the cluster's nodes: one process of a run, from wherever it stands, through every interruption.

SLURM asks a job to make room in two ways, and each rank hears them: USR2, before the time limit and (where a site has
set it so) at preemption, means "requeue yourself"; TERM, at preemption with grace and at scancel, means "you will be
killed". SLURM sends its USR2 only once in a job's life, however often it is requeued (seen with 22.05): so every
attempt has a timer of its own for the time limit. Either way all ranks agree at the end of a step, the first one saves,
and then:

- after USR2 alone the first rank asks SLURM to requeue the job, and all leave;
- after TERM all wait to be killed. To requeue then would make a job that nobody can cancel; to leave then would, within
  a preemption's grace, count as a failure.

Until the handlers here are set, both signals are ignored (see nearfar.launch.slurm.executor).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import submitit
import yaml

from nearfar.launch.slurm import queue, records
from nearfar.launch.slurm.records import Done
from nearfar.launch.slurm.resources import Resources
from nearfar.launch.stop_signals import StopFlag
from nearfar.ssl.errors import UserError

if TYPE_CHECKING:
    from nearfar.ssl.train import Outcome

# SLURM kills a job that it preempts or cancels within its grace time, and one that lost a node within SlurmdTimeout
# (300 s unless a site says otherwise). Whoever is still there after this was not going to be killed.
KILLED_WITHIN = 900.0
MEETING = 300.0  # seconds in which the first rank must say where the ranks meet


class Place(NamedTuple):
    """This process among those of its job."""

    job: str
    rank: int
    size: int
    restart: int
    node: str  # the name of the first node
    result: Path | None  # where submitit will put a result

    @staticmethod
    def here() -> Place:
        """From submitit's environment under SLURM; elsewhere the only process of a job that has no id."""
        if "SLURM_PROCID" not in os.environ or "SUBMITIT_EXECUTOR" not in os.environ:
            return Place("none", 0, 1, 0, "localhost", None)
        env = submitit.JobEnvironment()
        restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        return Place(
            env.job_id, env.global_rank, env.num_tasks, restart, env.hostnames[0], env.paths.result_pickle
        )  # fmt: skip


def train(config: str, folder: str) -> None:
    """Train the run of `config` (YAML, in settings/ of a submission) in `folder`, as one process of a job.

    Ends the process by itself when the job goes on later. Returns when the run is finished.

    Raises:
        UserError, RuntimeError ...: what ended it; done.json in the run's folder says it too.
    """
    run, home, place = Path(folder), Path(config).parent.parent, Place.here()
    with StopFlag() as stop:
        try:
            if place.result:
                place.result.unlink(missing_ok=True)  # of an attempt before: it says nothing of this one
            if place.rank == 0:
                records.begin(run, place.job, place.restart, _resources(home).tries)
            deadline = meet(home / "meeting", place, save_by(run, home, place))
            with _alarm(deadline):
                outcome = _pretrain(Path(config))
        except Exception as error:
            _failed(run, "train", place, error)
            raise
        if outcome.finished:
            if place.rank == 0:
                records.end(run, place.job, place.restart, "finished")
                records.settle(
                    run, "train", Done(state="finished", job=place.job, step=outcome.step, steps=outcome.steps)
                )
            return
        leave(run, place, stop, outcome.step, outcome.steps)


def evaluate(config: str, folder: str, tasks: list[str]) -> None:
    """Score the run in `folder` on its own data.path and data.val, and write its report; one process.

    Raises:
        UserError, RuntimeError ...: what ended it; done-eval.json says it too.
    """
    run, place = Path(folder), Place.here()

    def again(*_: object) -> NoReturn:
        queue.requeue(place.job)
        sys.exit(0)

    if place.result:  # TERM stays unheard: to end within a preemption's grace would count as a failure
        signal.signal(signal.SIGUSR2, again)
    try:
        if place.restart > _resources(Path(config).parent.parent).tries:
            raise UserError(f"The evaluation did not finish in {place.restart} attempts: give it a longer time limit.")
        score(run, tasks)
    except Exception as error:
        _failed(run, "eval", place, error)
        raise
    records.settle(run, "eval", Done(state="finished", job=place.job))


def leave(run: Path, place: Place, stop: StopFlag, step: int, steps: int) -> NoReturn:
    """Saved, but not finished: requeue after USR2 alone, else wait to be killed. Does not return.

    Raises:
        UserError: SLURM refuses to requeue.
    """
    until = time.monotonic() + 5
    while not stop() and place.size > 1 and time.monotonic() < until:  # another rank heard it first
        time.sleep(0.01)
    heard = " and ".join(sorted(name.name for name in stop.heard)) or "a signal to another rank"
    if place.rank == 0:
        records.end(run, place.job, place.restart, f"saved at step {step} after {heard}")
    stopped = Done(state="stopped", job=place.job, step=step, steps=steps, why=f"stopped by {heard}")
    if place.result and stop.heard == {signal.SIGUSR2}:
        if place.rank == 0:
            print(f"Saved at step {step} of {steps}; job {place.job} goes back to the queue.", flush=True)
            try:
                queue.requeue(place.job)
            except UserError as error:
                records.settle(run, "train", stopped.model_copy(update={"why": str(error)}))
                raise
        sys.exit(0)
    if place.result:
        wait_for_the_end()
    if place.rank == 0:
        records.settle(run, "train", stopped)
    sys.exit(1 if place.result else 0)  # not 0 in a job: what depends on a finished run must not start


def wait_for_the_end(seconds: float = KILLED_WITHIN) -> None:
    """Sleep until SLURM kills this process; returns when it does not."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 1.0))


def save_by(run: Path, home: Path, place: Place) -> float | None:
    """When the first rank must begin to save (time.time()), for the time limit's sake; None without a limit."""
    from nearfar.launch.slurm.executor import signal_delay

    if place.rank != 0 or not place.result:
        return None
    try:
        left = queue.seconds_left(place.job)
    except UserError as error:
        print(f"{error} The time limit is left to SLURM's own signal, which comes once in a job's life.", flush=True)
        return None
    return None if left is None else time.time() + left - signal_delay(run, _resources(home))


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


def meet(folder: Path, place: Place, deadline: float | None = None) -> float | None:
    """Set MASTER_ADDR and MASTER_PORT: a port that is free now on the first rank's node, told through `folder`.

    A port computed from the job's id, as others do it, may be taken by another job on the same node. The first rank's
    `deadline` is told the same way: returns it on every rank.

    Raises:
        RuntimeError: the first rank did not say it in time.
    """
    if place.size == 1:
        return deadline
    file = folder / f"{place.job}-{place.restart}"
    if place.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        partial = file.with_suffix(".writing")
        partial.write_text(f"{_resolvable(place.node)} {port} {deadline or 'never'}\n")
        partial.replace(file)
    until = time.monotonic() + MEETING
    while file not in (folder.iterdir() if folder.is_dir() else ()):  # a listing is fresh where a look-up may be cached
        if time.monotonic() > until:
            raise RuntimeError(f"Rank {place.rank}: the first rank did not write {file} within {MEETING:g} s.")
        time.sleep(0.05)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], told = file.read_text().split()
    return None if told == "never" else float(told)


def _resolvable(node: str) -> str:
    """The node's name as SLURM knows it if that is a host's name as well, else the host's own."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        return socket.gethostname()
    return node


def _failed(run: Path, kind: records.Kind, place: Place, error: Exception) -> None:
    """Say why in done.json; a rank that only lost another one leaves the word to that, or to SLURM."""
    from nearfar.ssl.errors import PeerError

    traceback.print_exc()
    if isinstance(error, PeerError) and place.result:
        # A rank that ended by itself: srun ends us within the second. A node that died: SLURM requeues the job when it
        # notices, and to fail before that would end the run.
        wait_for_the_end()
    why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    where = f"rank {place.rank} on {socket.gethostname()}: " if place.size > 1 else ""
    records.settle(run, kind, Done(state="failed", job=place.job, step=records.saved_step(run), why=where + why))


def _pretrain(config_file: Path) -> Outcome:
    from rich.console import Console

    from nearfar.launch.pretrain import train_rank
    from nearfar.ssl import config
    from nearfar.ssl.distributed import from_environment

    world = from_environment()
    return train_rank(config.load(config_file), Console(quiet=not world.first), world)


def score(run: Path, tasks: list[str]) -> None:
    from rich.console import Console

    from nearfar.eval.report import write_report
    from nearfar.launch.score import Subject, score, sources

    subject = Subject.of(run)
    train, val = sources(subject.run, None, None)
    score(subject, train, val, tasks=tasks, console=Console())
    write_report(run)


def _resources(home: Path) -> Resources:
    return Resources.model_validate(yaml.safe_load((home / "resources.yaml").read_text()))
