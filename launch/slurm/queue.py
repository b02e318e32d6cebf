"""What SLURM says of jobs: squeue first, sacct for those it has forgotten, and the two commands that change a job."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from typing import NamedTuple

from nearfar.ssl.errors import UserError

# Everything after which a job may run (again). While a job is in one of these, no result of it is to be trusted.
ACTIVE = {
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING",
    "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT",
}  # fmt: skip
_SECONDS = 60  # a busy controller may take long; one that hangs must not hang us


class Seen(NamedTuple):
    """A job as SLURM sees it."""

    state: str  # RUNNING, PENDING ...
    name: str  # empty where it is not known
    nodes: str = ""
    reason: str = ""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def installed() -> bool:
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


def look(ids: Iterable[str]) -> dict[str, Seen]:
    """What SLURM knows of these jobs; those it has forgotten are left out.

    Raises:
        UserError: SLURM is not installed here or does not answer.
    """
    ids = list(dict.fromkeys(ids))
    if not ids:
        return {}
    listed = _run("squeue", "-h", "-r", "-t", "all", "-j", ",".join(ids), "-o", "%i|%T|%j|%N|%r")
    if listed.returncode and "Invalid job id" not in listed.stderr:
        raise UserError(f"SLURM's queue cannot be asked: {_said(listed)}.")
    found = {}
    for line in listed.stdout.splitlines():
        job, state, name, nodes, reason = line.split("|", 4)
        found[job] = Seen(state, name, nodes, "" if reason == "None" else reason)
    if missing := [job for job in ids if job not in found]:
        found |= _accounted(missing)
    return found


def _accounted(ids: list[str]) -> dict[str, Seen]:
    """Of ended jobs, where the cluster keeps accounts; {} where it does not."""
    if not shutil.which("sacct"):
        return {}
    listed = _run("sacct", "-nPX", "-j", ",".join(ids), "-o", "JobID,State,JobName,NodeList")
    found = {}
    for line in listed.stdout.splitlines() if listed.returncode == 0 else []:
        job, state, name, nodes = line.split("|", 3)
        name = "" if name == "allocation" else name  # where the job ended before slurmdbd heard of its beginning
        found[job] = Seen(state.split(" ")[0], name, nodes)  # "CANCELLED by 1000"
    return {job: seen for job, seen in found.items() if job in ids}


def cancel(ids: Iterable[str]) -> None:
    """End jobs for good.

    Raises:
        UserError: SLURM refused.
    """
    ended = _run("scancel", *ids)
    if ended.returncode:
        raise UserError(f"scancel {' '.join(ids)}: {_said(ended)}.")


def requeue(job: str) -> None:
    """Give a job back to the queue, to go on later.

    Preemption without grace may have done so already: that is no error.

    Raises:
        UserError: SLURM refused.
    """
    asked = _run("scontrol", "requeue", job)
    if asked.returncode and "pending" not in _said(asked).lower():
        raise UserError(
            f"scontrol requeue {job}: {_said(asked)}. The run is saved: `nearfar launch resubmit` continues it."
        )


def seconds_left(job: str) -> float | None:
    """Until the time limit of a running job; None for one without a limit.

    Raises:
        UserError: SLURM does not answer.
    """
    asked = _run("squeue", "-h", "-j", job, "-o", "%L")
    if asked.returncode:
        raise UserError(f"squeue -j {job}: {_said(asked)}.")
    days, _, clock = asked.stdout.strip().rpartition("-")
    if not clock.replace(":", "").isdigit():  # UNLIMITED, NOT_SET
        return None
    seconds = 0
    for part in clock.split(":"):
        seconds = 60 * seconds + int(part)
    return float(seconds + 86400 * int(days or 0))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except FileNotFoundError:
        raise UserError(f"SLURM's {command[0]} is not installed on this machine.") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {_SECONDS} s.") from None


def _said(result: subprocess.CompletedProcess[str]) -> str:
    return " ".join((result.stderr or result.stdout).split()) or f"exit code {result.returncode}"
