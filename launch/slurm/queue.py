"""What SLURM says of jobs: squeue first, sacct for those it has forgotten, and the commands that change a job."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from typing import NamedTuple

from nearfar.ssl.errors import UserError

# Everything after which a job may run (again). While a job is in one of these, no result of it is to be trusted.
ACTIVE = {
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING",
    "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT",
}  # fmt: skip
# Answers of scontrol that are final. Anything else comes from a controller that is restarting, busy or away.
_FINAL_REFUSALS = ("disabled", "invalid job id", "access/permission denied", "not permitted", "already completed")
REQUEUE_PATIENCE = 600.0  # seconds in which a controller that is away may come back
_LONGEST_PAUSE = 15.0  # seconds between two tries
_COMMAND_SECONDS = 60  # a busy controller may be slow; one that hangs must not hang this process


class QueueEntry(NamedTuple):
    """A job as SLURM's queue has it."""

    state: str  # RUNNING, PENDING ...
    name: str  # empty where it is not known
    nodes: str = ""
    reason: str = ""
    seconds_left: float | None = None  # until the time limit

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def installed() -> bool:
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


def entries(ids: Iterable[str]) -> dict[str, QueueEntry]:
    """What SLURM knows of these jobs; those it has forgotten are left out.

    Raises:
        UserError: SLURM is not installed here or does not answer.
    """
    ids = list(dict.fromkeys(ids))
    if not ids:
        return {}
    listed = _run("squeue", "-h", "-r", "-t", "all", "-j", ",".join(ids), "-o", "%i|%T|%j|%N|%L|%r")
    if listed.returncode and "Invalid job id" not in listed.stderr:
        raise UserError(f"squeue failed: {_message(listed)}.")
    found = {}
    for line in listed.stdout.splitlines():
        job, state, name, nodes, left, reason = line.split("|", 5)
        seconds = clock_seconds(left) if state == "RUNNING" else None
        found[job] = QueueEntry(state, name, nodes, "" if reason == "None" else reason, seconds)
    if missing := [job for job in ids if job not in found]:
        found |= _accounted(missing)
    return found


def _accounted(ids: list[str]) -> dict[str, QueueEntry]:
    """Of ended jobs, where the cluster keeps accounts; {} where it does not."""
    if not shutil.which("sacct"):
        return {}
    listed = _run("sacct", "-nPX", "-j", ",".join(ids), "-o", "JobID,State,JobName,NodeList")
    found = {}
    for line in listed.stdout.splitlines() if listed.returncode == 0 else []:
        job, state, name, nodes = line.split("|", 3)
        name = "" if name == "allocation" else name  # where the job ended before slurmdbd heard of its beginning
        found[job] = QueueEntry(state.split(" ")[0], name, nodes)  # "CANCELLED by 1000"
    return {job: entry for job, entry in found.items() if job in ids}


def scancel(ids: Iterable[str]) -> None:
    """End jobs for good.

    Raises:
        UserError: SLURM refused.
    """
    ids = list(ids)
    ended = _run("scancel", *ids)
    if ended.returncode:
        raise UserError(f"scancel {' '.join(ids)}: {_message(ended)}.")


def requeue(job: str, patience: float = REQUEUE_PATIENCE) -> None:
    """Give a job back to the queue, to go on later.

    Preemption without grace may have done so already: that is no error. While the controller does not answer, it is
    asked again, for `patience` seconds.

    Raises:
        UserError: SLURM refused, or did not answer in all that time.
    """
    until, pause = time.monotonic() + patience, 1.0
    while True:
        try:
            result = _run("scontrol", "requeue", job)
            refusal = _message(result) if result.returncode else ""
        except UserError as error:  # it hangs
            refusal = str(error)
        if not refusal or "pending" in refusal.lower():
            return
        final = any(words in refusal.lower() for words in _FINAL_REFUSALS)
        if final or time.monotonic() + pause > until:
            waited = "" if final else f" (asked again for {patience / 60:.0f} minutes)"
            raise UserError(
                f"scontrol requeue {job}: {refusal}{waited}. The run is saved: `nearfar launch resubmit` continues it."
            )
        print(f"scontrol requeue {job}: {refusal}. Asking again in {pause:.0f} s.", flush=True)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def details(job: str) -> dict[str, str]:
    """What `scontrol show job` says, by SLURM's names such as JobState, PreemptTime, ExcNodeList.

    Raises:
        UserError: SLURM does not know the job or does not answer.
    """
    result = _run("scontrol", "-o", "show", "job", job)
    if result.returncode:
        raise UserError(f"scontrol show job {job}: {_message(result)}.")
    return {key: "" if value == "(null)" else value for key, value in re.findall(r"(\w+)=(\S*)", result.stdout)}


def preempted(job: str) -> bool:
    """Is a running job being preempted, rather than cancelled?

    Raises:
        UserError: as `details`.
    """
    found = details(job)
    preempted_at, started = found.get("PreemptTime", "None"), found.get("StartTime", "")
    # ISO times of one clock; an older one is of an attempt before.
    return preempted_at[:1].isdigit() and preempted_at >= started


def exclude_node(job: str, node: str, also: str = "") -> bool:
    """Keep a pending job off a node (and off `also`, what the user excluded) where enough others are left.

    Returns whether SLURM did so.
    """
    try:
        job_details = details(job)
        nodes = usable_nodes(job_details.get("Partition", ""))
    except UserError:
        return False
    needed = int(job_details.get("NumNodes", "1").partition("-")[0])
    if len(nodes - {node}) < needed:
        return False
    excluded = ",".join(part for part in (also, node) if part)
    return _run("scontrol", "update", f"JobId={job}", f"ExcNodeList={excluded}").returncode == 0


def usable_nodes(partition: str) -> set[str]:
    """The nodes of a partition that are up, busy or not.

    Raises:
        UserError: SLURM does not answer.
    """
    listed = _run("sinfo", "-h", "-N", "-p", partition, "-o", "%N %t")
    if listed.returncode:
        raise UserError(f"sinfo -p {partition}: {_message(listed)}.")
    lines = [line.split() for line in listed.stdout.splitlines()]
    return {line[0] for line in lines if len(line) == 2 and line[1] in ("idle", "mix", "alloc", "comp", "resv")}


def seconds_left(job: str) -> float | None:
    """Until the time limit of a running job; None for one without a limit.

    Raises:
        UserError: SLURM does not answer.
    """
    result = _run("squeue", "-h", "-j", job, "-o", "%L")
    if result.returncode:
        raise UserError(f"squeue -j {job}: {_message(result)}.")
    return clock_seconds(result.stdout)


def clock_seconds(text: str) -> float | None:
    """`2-03:04:05` -> 183845.0; None for UNLIMITED, NOT_SET and the like."""
    days, _, clock = text.strip().rpartition("-")
    if not clock.replace(":", "").isdigit():
        return None
    seconds = 0
    for part in clock.split(":"):
        seconds = 60 * seconds + int(part)
    return float(seconds + 86400 * int(days or 0))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_COMMAND_SECONDS)
    except FileNotFoundError:
        raise UserError(f"SLURM's {command[0]} is not installed on this machine.") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {_COMMAND_SECONDS} s.") from None


def _message(result: subprocess.CompletedProcess[str]) -> str:
    return " ".join((result.stderr or result.stdout).split()) or f"exit code {result.returncode}"
