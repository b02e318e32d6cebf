"""What clusters do beyond interrupting: absent controllers, lost daemons, killed processes, bare environments."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from nearfar.launch.slurm import queue, records

PACE = 0.15  # seconds added to a step, so that an event finds the run at work
Launch = Callable[..., Any]


def slurm(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def processes(run: Any) -> dict[int, psutil.Process]:
    """The ranks of a run's job, whatever SLURM believes. Other clusters of this machine have jobs of that number."""
    found = {}
    for process in psutil.process_iter():
        try:
            env, words = process.environ(), process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        ours = env.get("SLURM_JOB_ID") == run.job and any(word.startswith(str(run.run)) for word in words)
        if ours and "SLURM_PROCID" in env and "submitit.core._submit" in words:
            found[int(env["SLURM_PROCID"])] = process
    return found


def test_requeue_while_the_controller_is_away_in_a_bare_environment(
    cluster: Any, launch: Launch, reference: Callable[[int], Path], same: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")  # as some sites set it: srun would start processes without PATH
    run = launch("--nodes", "2", name="away", pace=PACE)
    run.reach(3)
    ranks = processes(run)
    assert sorted(ranks) == [0, 1]
    cluster.stop_controller()
    for process in ranks.values():
        process.send_signal(signal.SIGUSR2)
    until = time.monotonic() + 60
    while "Asking again" not in run.log:
        assert time.monotonic() < until, run.log
        time.sleep(0.1)
    cluster.start_controller()
    run.wait("another attempt", lambda status: len(status.attempts) == 2)
    assert run.finish().lost == 0
    same(run.run, reference(2))


def test_a_killed_process_is_tried_again_elsewhere(
    cluster: Any, launch: Launch, reference: Callable[[int], Path], same: Callable[..., None]
) -> None:
    run = launch("--nodes", "2", "train.save_every_steps=5", name="killed", pace=PACE)
    run.reach(7)
    victim = processes(run)[1]
    node = victim.environ()["SLURMD_NODENAME"]
    victim.kill()
    run.wait("another attempt", lambda status: len(status.attempts) == 2)
    (end, *_) = records.attempt_ends(run.run)
    assert end.why == f"rank 1 on {node} was killed by SIGKILL (often too little memory: --mem-gb)"
    assert queue.details(run.job)["ExcNodeList"] == node
    assert run.finish().lost <= 5
    same(run.run, reference(2))


@pytest.mark.long
def test_a_process_that_stands_still_is_named_and_the_job_tried_again(
    cluster: Any, launch: Launch, reference: Callable[[int], Path], same: Callable[..., None]
) -> None:
    """SLURM sees nothing wrong with it, and no connection breaks: the other rank notices by itself."""
    run = launch("--nodes", "2", "train.save_every_steps=5", "train.rank_timeout=6", name="still", pace=PACE)
    run.reach(7)
    processes(run)[1].suspend()
    run.wait("another attempt", lambda status: len(status.attempts) == 2)
    (end, *_) = records.attempt_ends(run.run)
    assert end.why.startswith(f"rank 1 on {socket.gethostname().partition('.')[0]} was lost: no sign of life for ")
    assert end.rank == 1 and end.infrastructure and "its last step was " in end.why
    assert run.finish().lost <= 5
    same(run.run, reference(2))


@pytest.mark.long
def test_preemption_that_cancels_brings_the_run_back(
    cluster: Any, launch: Launch, reference: Callable[[int], Path], same: Callable[..., None]
) -> None:
    cluster.signal_at_preemption(False)
    run = launch("--nodes", "1", "--partition", "lowcancel", "--cpus-per-task", "5", name="comes back", pace=PACE)
    run.reach(3)
    slurm("sbatch", "-p", "high", "-N3", "--ntasks-per-node=1", "-c5", "-o", "/dev/null", "--wrap", "sleep 1")
    run.wait("another attempt", lambda status: len(status.attempts) == 2)
    assert run.finish().lost == 0
    cluster.signal_at_preemption(True)
    same(run.run, reference(1))


@pytest.mark.long
def test_a_process_that_slurm_lost_sight_of_is_waited_for(
    cluster: Any, launch: Launch, reference: Callable[[int], Path], same: Callable[..., None]
) -> None:
    """Its node's slurmd is gone and SLURM starts the job on another node, while the old process holds the folder."""
    run = launch("--nodes", "1", "train.save_every_steps=5", name="lost", pace=PACE)
    run.reach(7)
    old = processes(run)[0]
    os.kill(old.pid, signal.SIGSTOP)  # it would otherwise go on, and finish
    cluster.kill_slurmd(old.environ()["SLURMD_NODENAME"])
    until = time.monotonic() + 60
    while "waiting for its end" not in run.log:
        assert time.monotonic() < until, run.log
        time.sleep(0.1)
    node = old.environ()["SLURMD_NODENAME"]
    old.kill()
    assert len(run.finish().attempts) == 2
    cluster.start_node(node)
    same(run.run, reference(1))
