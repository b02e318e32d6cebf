"""What the batch script does when srun has failed: `python -m nearfar.launch.slurm.requeue_after_failure SUBMISSION
KIND CODE`.

Processes that were killed (too little memory, a broken node) can neither record why nor ask for another try. The
batch script's process lives on the job's first node and outlives them: it writes the reason down and, unless one of
them has said that the run itself is at fault, gives the job back to the queue, without the node that failed.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import NamedTuple

from nearfar.launch.slurm import queue, records
from nearfar.launch.slurm.records import ATTEMPT_BEGINS, AttemptEnd, Ending, Kind, SubmissionRecord
from nearfar.ssl.errors import EXIT_PEER, UserError

_SRUN = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<rank>\d+)\S*: (?P<how>.+)")
_LOST = re.compile(r"nearfar: Lost rank (?P<rank>\d+) on (?P<node>[^\s:]+): (?P<how>[^.]+)")
_NODE = re.compile(r"srun: error: Node failure on (?P<node>\S+)")


class FirstFailure(NamedTuple):
    """The first process that ended badly, as srun reports it."""

    why: str
    rank: int = 0
    node: str = ""


def first_failure(log: str, code: int) -> FirstFailure:
    """What srun reported of the last attempt in `log`; its exit code where it reported nothing."""
    last = log.rpartition(ATTEMPT_BEGINS)[2]
    if found := _NODE.search(last):
        return FirstFailure(f"node {found['node']} failed", 0, found["node"])
    ended = list(_SRUN.finditer(last))
    # A rank with this exit code only noticed that another one is lost: its node is not to blame. Where it is the first
    # to end, srun then kills the lost one as well.
    to_blame = [each for each in ended if each["how"].strip() != f"Exited with exit code {EXIT_PEER}"]
    if ended and ended[0] not in to_blame and (lost := _LOST.search(last)):
        node = lost["node"].partition(".")[0]
        return FirstFailure(f"rank {lost['rank']} on {node} was lost: {lost['how']}", int(lost["rank"]), node)
    if to_blame:
        found = to_blame[0]
        how, node = found["how"].strip(), found["node"]
        if how.startswith("Killed"):
            how = "was killed by SIGKILL (often too little memory: --mem-gb)"
        elif how.startswith("Out Of Memory"):
            how = "ran out of memory (--mem-gb)"
        else:
            how = f"ended: {how[:1].lower()}{how[1:]}"
        return FirstFailure(f"rank {found['rank']} on {node} {how}", int(found["rank"]), node)
    return FirstFailure(f"srun ended with exit code {code}: see the log")


def handle(submission: Path, kind: Kind, code: int) -> None:
    """Record why, and requeue what may be tried again."""
    found = SubmissionRecord.read(submission)
    run = found.runs[int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))]
    job, restart = job_id(), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    ending = records.read_ending(run, kind)
    if ending and (ending.job, ending.restart) == (job, restart):
        return  # a process has recorded the ending already
    state = queue.details(job).get("JobState", "")
    if state != "RUNNING":
        return  # cancelled, or requeued already
    log = submission / "log" / f"{job}_0_log.out"
    bad = first_failure(log.read_text(errors="replace") if log.exists() else "", code)
    ends = [end for end in records.attempt_ends(run, kind) if (end.job, end.restart) == (job, restart)]
    why = ends[-1].why if ends and ends[-1].infrastructure else bad.why
    if not ends or not ends[-1].infrastructure:
        records.end_attempt(
            run, AttemptEnd(kind=kind, job=job, restart=restart, why=why, rank=bad.rank, infrastructure=True)
        )
    last = Ending(state="failed", job=job, restart=restart, rank=bad.rank, step=records.saved_step(run), why=why)
    tried = records.fruitless_attempts(run, job, kind)
    if len(tried | {restart}) >= found.resources.tries and restart in tried:
        why = records.no_progress(run, job, len(tried), kind)
        records.write_ending(run, kind, last.model_copy(update={"why": why}))
        return
    print(f"nearfar: {why}. This does not look like the run's own fault: job {job} goes back to the queue.", flush=True)
    try:
        queue.requeue(job)
    except UserError as error:
        records.write_ending(run, kind, last.model_copy(update={"state": "stopped", "why": f"{why}; {error}"}))
        raise
    if bad.node and queue.exclude_node(job, bad.node, found.resources.exclude or ""):
        print(f"nearfar: the job is kept off {bad.node} from now on.", flush=True)


def job_id() -> str:
    """As `squeue` and submitit write it: ID, or ARRAY_INDEX."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def main(arguments: list[str]) -> int:
    for each in (signal.SIGTERM, signal.SIGUSR2):  # a requeue ends this process too, but after a moment's work
        signal.signal(each, signal.SIG_IGN)
    submission, kind, code = arguments
    try:
        handle(Path(submission), "eval" if kind == "eval" else "train", int(code))
    except UserError as error:
        print(f"nearfar: {error}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
