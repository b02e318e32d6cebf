"""Every way in which SLURM interrupts a run: it goes on by itself and ends with the bits of the undisturbed run.

Two ranks on two nodes throughout. `bench/requeue.py` runs this file and prints what each interruption cost.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nearfar.launch.slurm import records
from nearfar.ssl.disk.metrics import read_metrics


def slow(attempts: int, seconds: float) -> str:
    """Code that adds seconds to each step of so many attempts, so that an interruption finds the run at work."""
    return f"import os\nif int(os.environ.get('SLURM_RESTART_COUNT', 0)) < {attempts}: time.sleep({seconds})"


def message(what: str, lost: int, seconds: float) -> None:
    """For the table of bench/requeue.py."""
    if file := os.environ.get("NEARFAR_INTERRUPTIONS"):
        with Path(file).open("a") as handle:
            handle.write(json.dumps({"what": what, "lost": lost, "seconds": round(seconds, 1)}) + "\n")


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, timeout=60, text=True).stdout


@pytest.fixture(scope="module")
def limited(cluster: Any, launch: Callable[..., Any]) -> Any:
    """A run that its time limit of a minute interrupts twice while other tests go on: slow at first, fast at last.

    Twice, because SLURM sends its signal once in a job's life; from the second attempt on the job is on its own. On the
    first node, which no test kills.
    """
    words = ("--tasks-per-node", "2", "--hours", "0.01", "--signal-delay", "20", "--exclude", "node2,node3")
    return launch(*words, name="limited", code=slow(2, 1.5))


def test_signals_requeues_preemptions_and_the_death_of_a_node_one_after_the_other(
    cluster: Any, limited: Any, launch: Callable[..., Any], reference: Callable[[int], Path], same: Callable[..., None]
) -> None:
    """No bit differs in the end, however often; and where SLURM says a word before, no step is lost."""
    words = ("--nodes", "2", "--partition", "low", "--cpus-per-task", "5", "train.save_every_steps=5")
    run = launch(*words, name="everything", code=slow(6, 0.5))

    def preempt() -> None:
        """Five of eight cores on all three nodes: more than the run leaves free."""
        slurm("sbatch", "-p", "high", "-N3", "--ntasks-per-node=1", "-c5", "-o", "/dev/null", "--wrap", "sleep 1")

    def preempt_by_term() -> None:
        cluster.signal_at_preemption(False)
        slurm("scontrol", "update", "PartitionName=low", "GraceTime=3")
        preempt()

    def preempt_at_once() -> None:
        slurm("scontrol", "update", "PartitionName=low", "GraceTime=0")
        preempt()

    def kill_last_node() -> None:
        """Never the first one, where the limited run is; which others this run has is SLURM's choice."""
        nodes = slurm("squeue", "-h", "-j", run.job, "-o", "%N").strip()
        killed.append(slurm("scontrol", "show", "hostnames", nodes).split()[-1])
        cluster.kill_node(killed[-1])

    killed: list[str] = []
    interruptions = {
        "SIGUSR2 (scancel --signal)": lambda: slurm("scancel", "--signal=USR2", run.job),
        "scontrol requeue": lambda: slurm("scontrol", "requeue", run.job),
        "preemption, 20 s grace, SIGUSR2": preempt,
        "preemption, 3 s grace, SIGTERM": preempt_by_term,
        "preemption without grace": preempt_at_once,
        "node death, a checkpoint every 5 steps": kill_last_node,
    }
    for number, (what, action) in enumerate(interruptions.items(), 1):
        run.reach(records.saved_step(run.run) + 2)
        lost, seconds = run.interrupted(action, number)
        message(what, lost, seconds)
        assert lost <= (5 if "death" in what else 0), f"{what}\n{run.log}"
    assert len(run.finish().attempts) == 7
    cluster.start_node(killed[0])
    same(run.run, reference(2))


def test_the_time_limit_again_and_again(
    limited: Any, reference: Callable[[int], Path], same: Callable[..., None]
) -> None:
    """Two times or more: the slower the machine, the less an attempt of a minute gets done."""
    attempts = limited.finish(240).attempts
    *saved, finished = records.attempt_ends(limited.run)
    assert len(saved) == len(attempts) - 1 >= 2 and finished.why == "finished"
    for ending, attempt in zip(saved, attempts[1:], strict=True):
        assert ending.why == f"saved at step {attempt.step} after SIGUSR2"
        assert attempt.lost == 0 and attempt.step == ending.step
    again = min(line["time"] for line in read_metrics(limited.run / "metrics.jsonl") if line["time"] > attempts[2].time)
    message("time limit", attempts[2].lost, again - saved[1].time)
    same(limited.run, reference(2))
