"""What a user does with submitted runs: find them, cancel them, read their logs, submit them again."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from nearfar.launch.slurm import queue, records
from nearfar.launch.slurm.records import Job, SubmissionRecord
from nearfar.launch.slurm.status import last_end, statuses
from nearfar.launch.streams import reader_left
from nearfar.ssl.errors import UserError

POLL = 1.0  # seconds between two looks at a log that is followed
LAST_LINES = 40  # of another rank's log, when it has the reason


def run_folders(folder: Path) -> list[Path]:
    """The run folders that are meant: a run, the runs of a sweep, or all below a folder of runs.

    Raises:
        UserError: there is none.
    """
    if not folder.is_dir():
        raise UserError(f"There is no run folder {folder}.")
    if any((folder / name).exists() for name in ("cluster/jobs.json", "config.yaml", "ending.json")):
        return [folder]
    inside = sorted(
        {file.parent.parent for depth in ("*", "*/*") for file in folder.glob(f"{depth}/cluster/jobs.json")}
    )
    if not inside:
        raise UserError(f"Nothing in {folder} was submitted to a cluster: see `nearfar launch --help`.")
    return inside


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
                for number, entry in queue.entries(known).items()
                if entry.active and entry.name == known[number].name
            ]
            if active:
                queue.scancel(job.job for job in active)
                records.record_jobs(run, *(job.model_copy(update={"cancelled": True}) for job in active))
            ended += active
    if not ended:
        raise UserError("None of these runs has a job in the queue.")
    for job in ended:
        console.print(f"cancelled job {job.job}: {job.name}", highlight=False, soft_wrap=True)


def logs(run: Path, follow: bool, kind: records.Kind = "train") -> None:
    """Print the log of the run's last job, all attempts; `follow`: until the job has left the queue.

    That is the first rank's log; where another rank knows why the run failed, the end of that one's log comes after it.

    Raises:
        UserError: there is no such job, or it has written no log yet.
    """
    job = records.latest_job(run, kind)
    if job is None:
        raise UserError(f"{run} has no {kind} job: it was not submitted to a cluster.")
    position, ending = 0, not follow
    while True:
        if job.log.exists():
            with job.log.open("rb") as handle:
                handle.seek(position)
                text = handle.read()
            position += len(text)
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()
        if follow and reader_left(sys.stdout):
            return
        if ending:
            break
        entry = queue.entries([job.job]).get(job.job)
        ending = not (entry and entry.active)  # then read once more what was written meanwhile
        time.sleep(0 if ending else POLL)
    if not job.log.exists():
        raise UserError(f"Job {job.job} has written no log yet: it is waiting in the queue, or it never started.")
    _print_reason(run, job, kind)


def _print_reason(run: Path, job: Job, kind: records.Kind) -> None:
    """The end of the log of the rank that knows why, where that is not the first."""
    ending = records.read_ending(run, kind)
    known = ending if ending and ending.job == job.job and ending.why else None
    end = known or last_end(job, records.attempts(run, kind), records.attempt_ends(run, kind))
    if end is None or end.rank == 0:
        return
    log = job.log_of(end.rank)
    print(f"\n== rank {end.rank} ({log}): {end.why}")
    if log.exists():
        print("\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:]))


def resubmit(runs: Sequence[Path], given: dict[str, Any], console: Console) -> list[Job]:
    """Submit runs again that are not finished, each with the settings, code and resources of its own last submission.

    given: resources to change, such as a longer time limit. Runs of a sweep that are finished or still in the queue
    are left out; those that were submitted together are submitted together again.

    Raises:
        UserError: nothing is left to submit.
    """
    from nearfar.launch.slurm import resources, submission
    from nearfar.ssl.settings.finetune_settings import recorded_in

    states = statuses(runs)
    if len(runs) > 1:
        states = [state for state in states if state.state not in ("finished", *map(str.lower, queue.ACTIVE))]
    together: dict[Path, list[Job]] = defaultdict(list)
    for state in states:
        if state.job:
            together[state.job.submission].append(state.job)
    if not together:
        raise UserError("There is nothing to submit again: never submitted, finished, or still in the queue.")
    again = []
    for folder, jobs in together.items():  # everything is read and checked before anything is submitted
        record = SubmissionRecord.read(folder)
        share = resources.check(record.resources.model_dump(exclude_defaults=True) | given, "in the flags")
        again.append(
            submission.Submission(
                folder.parent.parent, [recorded_in(job.config) for job in jobs], share, tuple(record.then),
                record.parallel,
            )
        )  # fmt: skip
    made = []
    for each, folder in zip(again, together, strict=True):
        made += submission.submit(each, console, folder / "code")
    return made
