"""What the batch script does when its processes have failed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nearfar.launch.slurm import queue, records, requeue_after_failure
from nearfar.launch.slurm.records import AttemptEnd, Ending, SubmissionRecord
from nearfar.launch.slurm.resources import Resources
from nearfar.ssl.errors import UserError


@pytest.mark.parametrize(
    ("output", "why", "node"),
    [
        (
            "srun: error: node2: task 1: Killed\nsrun: error: node1: task 0: Terminated",
            "rank 1 on node2 was killed by SIGKILL (often too little memory: --mem-gb)",
            "node2",
        ),
        ("srun: error: n7: tasks 8-15: Out Of Memory", "rank 8 on n7 ran out of memory (--mem-gb)", "n7"),
        ("srun: error: Node failure on node3\nsrun: error: node1: task 0: Killed", "node node3 failed", "node3"),
        ("srun: error: a-1: task 3: Exited with exit code 1", "rank 3 on a-1 ended: exited with exit code 1", "a-1"),
        (
            "nearfar: Lost rank 3 on node2.cluster: no sign of life for 45 s; its last step was 1,234. Its process\n"
            "srun: error: node1: tasks 0-1: Exited with exit code 3\nsrun: error: node2: task 3: Killed",
            "rank 3 on node2 was lost: no sign of life for 45 s; its last step was 1,234",
            "node2",
        ),
        (
            "srun: error: node1: task 0: Exited with exit code 3\nsrun: error: node2: task 1: Killed",
            "rank 1 on node2 was killed by SIGKILL (often too little memory: --mem-gb)",
            "node2",
        ),
        ("srun: error: n1: task 0: Exited with exit code 3", "srun ended with exit code 9: see the log", ""),
        ("nothing", "srun ended with exit code 9: see the log", ""),
    ],
)
def test_who_it_was(output: str, why: str, node: str) -> None:
    before = "nearfar: attempt 0 on n\nsrun: error: another: task 5: Killed\nnearfar: attempt 1 on n\n"
    found = requeue_after_failure.first_failure(before + output + "\n", 9)
    assert (found.why, found.node) == (why, node)


@pytest.fixture
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of SLURM; job 7 of the run in tmp_path/run, whose rank 1 was killed on node2, is running."""
    calls: list[str] = []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setattr(queue, "details", lambda job: {"JobState": "RUNNING"})
    monkeypatch.setattr(queue, "requeue", lambda job: calls.append(f"requeue {job}"))
    monkeypatch.setattr(queue, "exclude_node", lambda job, node, also: calls.append(f"without {node},{also}"))
    SubmissionRecord(resources=Resources(cpu=True, tries=2, exclude="bad"), runs=[tmp_path / "run"]).write(tmp_path)
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "7_0_log.out").write_text("srun: error: node2: task 1: Killed\n")
    with records.locked(tmp_path / "run"):
        return calls


def attempt(folder: Path, restart: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    records.begin_attempt(folder / "run", "7", restart, 2)


def test_infrastructure_is_tried_again_a_bounded_number_of_times(
    tmp_path: Path, requests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    attempt(tmp_path, 0, monkeypatch)
    requeue_after_failure.handle(tmp_path, "train", 137)
    assert requests == ["requeue 7", "without node2,bad"] and records.read_ending(run) is None
    attempt(tmp_path, 1, monkeypatch)
    (run / "checkpoints" / "step-000000010").mkdir(parents=True)  # progress: it counts anew
    requeue_after_failure.handle(tmp_path, "train", 137)
    for restart in (2, 3):
        attempt(tmp_path, restart, monkeypatch)
        requeue_after_failure.handle(tmp_path, "train", 137)
    ending = records.read_ending(run)
    assert requests.count("requeue 7") == 3 and ending is not None and ending.state == "failed" and ending.rank == 1
    assert ending.why.startswith("No progress: 2 attempts of job 7") and "rank 1 on node2 was killed" in ending.why


def test_what_a_process_said_of_infrastructure_is_kept(
    tmp_path: Path, requests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(tmp_path, 0, monkeypatch)
    end = AttemptEnd(job="7", restart=0, rank=3, why="rank 3: NCCL error", infrastructure=True)
    records.end_attempt(tmp_path / "run", end)
    requeue_after_failure.handle(tmp_path, "train", 1)
    assert [end.why for end in records.attempt_ends(tmp_path / "run")] == ["rank 3: NCCL error"]
    assert requests[0] == "requeue 7"


def test_a_mistake_a_cancelled_job_and_a_refusal_are_left_alone(
    tmp_path: Path, requests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    attempt(tmp_path, 0, monkeypatch)
    records.write_ending(run, "train", Ending(state="failed", job="7", restart=0, why="a mistake"))
    requeue_after_failure.handle(tmp_path, "train", 2)
    attempt(tmp_path, 0, monkeypatch)
    monkeypatch.setattr(queue, "details", lambda job: {"JobState": "CANCELLED"})
    requeue_after_failure.handle(tmp_path, "train", 143)
    assert requests == [] and records.read_ending(run) is None

    def refuse(job: str) -> None:
        raise UserError("scontrol requeue 7: disabled")

    monkeypatch.setattr(queue, "details", lambda job: {"JobState": "RUNNING"})
    monkeypatch.setattr(queue, "requeue", refuse)
    assert requeue_after_failure.main([str(tmp_path), "train", "137"]) == 0
    ending = records.read_ending(run)
    assert ending is not None and ending.state == "stopped" and "disabled" in ending.why and "killed" in ending.why


def test_elements_of_an_array_and_evaluations_have_their_own_records(
    tmp_path: Path, requests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [tmp_path / name for name in ("one", "two")]
    SubmissionRecord(resources=Resources(cpu=True, tries=2), runs=runs).write(tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "6")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with records.locked(runs[1]):
        requeue_after_failure.handle(tmp_path, "eval", 137)
    assert requests == ["requeue 6_1"] and not runs[0].exists()
    assert [end.job for end in records.attempt_ends(runs[1], "eval")] == ["6_1"]


@pytest.mark.parametrize(
    ("listed", "excluded"), [("node1 idle\nnode2 mix\n", True), ("node1 down*\nnode2 mix\n", False)]
)
def test_a_node_is_left_out_only_where_enough_others_are(
    monkeypatch: pytest.MonkeyPatch, listed: str, excluded: bool
) -> None:
    commands = []

    def answer(*command: str) -> subprocess.CompletedProcess[str]:
        commands.append(" ".join(command))
        shown = "JobId=7 Partition=main NumNodes=1-1 ExcNodeList=(null)" if "show" in command else listed
        return subprocess.CompletedProcess(command, 0, shown, "")

    monkeypatch.setattr(queue, "_run", answer)
    assert queue.exclude_node("7", "node2", "bad") is excluded
    assert ("scontrol update JobId=7 ExcNodeList=bad,node2" in commands) is excluded
