"""Runs -> jobs: what sbatch is told, through submitit.

Why not submitit's own checkpointing: it saves on one rank, in a signal handler, in the middle of a step; and it counts
every signal as a time-out in jobs of less than ten minutes. Here submitit writes the script, passes the callable on and
keeps the logs; nearfar.launch.slurm.job does the rest.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from nearfar.launch.slurm import records
from nearfar.launch.slurm.resources import Resources
from nearfar.ssl.disk import checkpoint_names
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.errors import UserError

UNMEASURED_DELAY = 300  # seconds before the time limit at which to signal a run of which nothing is known yet
SAVE_SPEED = 50e6  # bytes a second to a slow shared file system, where no checkpoint was timed yet

# Ignored until nearfar.launch.slurm.job has set its handlers: Python takes a second to get there, and either signal
# would end it on the way, as a failure.
_START = """sh -c 'trap "" USR2 TERM; exec "$0" "$@"'"""


class Executor(SlurmExecutor):
    """submitit's, which can also write its script where no SLURM is installed."""

    def __init__(self, log: Path, python: str) -> None:
        super().__init__(log, python=f"{_START} {python}")

    @classmethod
    def name(cls) -> str:
        return "slurm"

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, jobs: int = 1) -> str:
        """Exactly what `sbatch` would be given for an array of so many jobs (1: no array)."""
        count = {"map_count": jobs} if jobs > 1 else {}
        return str(_make_sbatch_string(self._submitit_command_str, self.folder, **self.parameters, **count))


class JobOptions(NamedTuple):
    """What distinguishes the jobs of a submission, which share their resources."""

    name: str
    kind: records.Kind = "train"
    signal_delay: int = 30  # seconds before the time limit at which it is signalled
    after: str | None = None  # a dependency of sbatch's, such as afterok:12
    parallel: int | None = None  # elements of an array that may run at the same time


def executor(submission: Path, resources: Resources, options: JobOptions) -> Executor:
    """An executor for jobs that log to `submission`/log and import `submission`/code."""
    made = Executor(submission / "log", _python(resources))
    extra: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes"}
    if resources.mail:
        extra |= {"mail-user": resources.mail, "mail-type": "END,FAIL,REQUEUE"}
    optional = {
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "exclude": resources.exclude,
        "mem": None if resources.mem_gb is None else f"{math.ceil(1024 * resources.mem_gb)}M",
        "gpus_per_node": resources.gpus_per_node,
        "dependency": options.after,
        "array_parallelism": options.parallel,
    }
    made.update_parameters(
        job_name=options.name,
        time=resources.minutes,
        nodes=resources.nodes,
        ntasks_per_node=resources.tasks,
        cpus_per_task=resources.cpus_per_task,
        signal_delay_s=options.signal_delay,
        stderr_to_stdout=True,
        setup=_before_srun(submission, resources, options.kind),
        teardown=["finish $?"],
        srun_args=["--export=ALL", "--kill-on-bad-exit=1", *resources.srun_args],
        additional_parameters=extra | resources.extra,
        **{key: value for key, value in optional.items() if value is not None},
    )
    return made


def _python(resources: Resources) -> str:
    return resources.python or shlex.quote(sys.executable)


def _before_srun(submission: Path, resources: Resources, kind: records.Kind) -> list[str]:
    """The lines of the batch script before srun.

    `finish` is called with srun's exit code: processes that were killed can neither say so nor ask for another try,
    the batch script's own process can. srun gets --export=ALL, because where a site sets SBATCH_EXPORT=NONE it would
    otherwise start processes without PATH.
    """
    code = shlex.quote(str(submission / "code"))
    after = f"{_python(resources)} -m nearfar.launch.slurm.requeue_after_failure {shlex.quote(str(submission))} {kind}"
    lines = [
        f'echo "{records.ATTEMPT_BEGINS} ${{SLURM_RESTART_COUNT:-0}} on $SLURM_JOB_NODELIST"',
        *resources.setup,
        f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export SRUN_CPUS_PER_TASK={resources.cpus_per_task}",  # srun does not inherit it from SLURM 22.05 on
        f'finish() {{ [ "$1" -eq 0 ] || {after} "$1"; exit "$1"; }}',
    ]
    if resources.node_setup:
        script = shlex.quote("\n".join(["set -e", *resources.node_setup]))
        lines.append(f"srun --export=ALL --ntasks-per-node=1 --ntasks={resources.nodes} bash -c {script} || finish $?")
    return lines


def submit_calls(made: Executor, calls: Sequence[partial[None]]) -> list[str]:
    """Submit one job, or an array of them; the ids.

    Raises:
        UserError: SLURM refuses.
    """
    try:
        jobs: list[submitit.Job[None]]
        jobs = [made.submit(calls[0])] if len(calls) == 1 else made.submit_array(list[Callable[[], None]](calls))
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"SLURM refused the job: {' '.join(str(error).split())}.") from None
    return [job.job_id for job in jobs]


def signal_delay(run: Path, resources: Resources) -> int:
    """Seconds before the time limit at which the job must be told to save.

    A minute (SLURM looks at its clock every half a minute and may kill as much early), and twice the longest pause that
    the run has had between two steps (a step, a checkpoint, a k-NN score) and its longest save. Where nothing was
    measured, 300 s. Never more than half of the limit. `--signal-delay` overrides it.
    """
    if resources.signal_delay:
        return min(resources.signal_delay, 60 * resources.minutes - 1)
    pause = longest_pause(run)
    delay = UNMEASURED_DELAY if pause is None else 60 + math.ceil(2 * (pause + save_seconds(run)))
    return min(delay, 30 * resources.minutes)


def longest_pause(run: Path) -> float | None:
    """The longest time in seconds that a run took from one step to the next, as far as its metrics tell; None: unknown.

    Between two lines of metrics lie `train.log_every_steps` steps: what exceeds their usual time is taken for a pause.
    """
    restarts = [attempt.time for attempt in records.attempts(run)]
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "time" in line]
    gaps = [
        (later["time"] - sooner["time"], later["step"] - sooner["step"])
        for sooner, later in itertools.pairwise(lines)
        if later["step"] > sooner["step"] and not any(sooner["time"] < at <= later["time"] for at in restarts)
    ]
    if not gaps:
        return None
    usual = statistics.median(seconds / steps for seconds, steps in gaps)
    return max(seconds - (steps - 1) * usual for seconds, steps in gaps)


def save_seconds(run: Path) -> float:
    """The longest that a checkpoint of the run took to write, in seconds; by its size where it was not timed."""
    longest = 0.0
    for folder in checkpoint_names.finished(run / "checkpoints"):
        manifest = json.loads((folder / "manifest.json").read_text())
        size = sum(written["bytes"] for written in manifest["files"].values())
        longest = max(longest, manifest.get("seconds", size / SAVE_SPEED))
    return longest
