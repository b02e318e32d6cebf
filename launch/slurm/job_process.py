"""A process of a job, and what it says of itself in the records."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, NamedTuple

import submitit

from nearfar.launch.slurm import records
from nearfar.launch.slurm.records import AttemptEnd, Ending


class JobProcess(NamedTuple):
    """This process among those of its job."""

    job: str
    rank: int
    size: int
    restart: int
    first_node: str
    result: Path | None  # where submitit will put a result; None outside SLURM

    @staticmethod
    def this() -> JobProcess:
        """From submitit's environment under SLURM; elsewhere the only process of a job that has no id."""
        if "SLURM_PROCID" not in os.environ or "SUBMITIT_EXECUTOR" not in os.environ:
            return JobProcess("none", 0, 1, 0, "localhost", None)
        env = submitit.JobEnvironment()
        restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        return JobProcess(
            env.job_id, env.global_rank, env.num_tasks, restart, env.hostnames[0], env.paths.result_pickle
        )  # fmt: skip

    def end(self, kind: records.Kind, why: str, infrastructure: bool = False) -> AttemptEnd:
        return AttemptEnd(
            kind=kind, job=self.job, restart=self.restart, rank=self.rank, why=why, infrastructure=infrastructure
        )

    def ending(self, state: Literal["finished", "failed", "stopped"], why: str = "") -> Ending:
        return Ending(state=state, job=self.job, restart=self.restart, rank=self.rank, why=why)
