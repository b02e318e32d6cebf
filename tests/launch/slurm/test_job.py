"""A job's process: where it is, how ranks meet, and how it leaves."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from nearfar.launch import cli
from nearfar.launch.local.stop_signals import StopFlag
from nearfar.launch.slurm import job, queue, records
from nearfar.launch.slurm.job_process import JobProcess
from nearfar.launch.slurm.records import SubmissionRecord
from nearfar.launch.slurm.resources import Resources
from nearfar.ssl.errors import PeerError, UserError
from nearfar.ssl.run.run_folder import RunFolder


def process(rank: int = 0, size: int = 1, number: str = "7") -> JobProcess:
    return JobProcess(number, rank, size, 0, "localhost", Path("result.pkl"))


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("JobId=7 StartTime=2026-11-21T10:00:00 PreemptTime=None", False),
        ("JobId=7 StartTime=2026-11-21T10:00:00 PreemptEligibleTime=2026-11-21T10:00:00 PreemptTime=None", False),
        ("JobId=7 StartTime=2026-11-21T10:00:00 PreemptTime=2026-11-21T10:05:00", True),
        ("JobId=7 PreemptTime=2026-11-21T09:00:00 StartTime=2026-11-21T10:00:00", False),  # of an attempt before
    ],
)
def test_what_slurm_says_of_a_preemption(monkeypatch: pytest.MonkeyPatch, shown: str, expected: bool) -> None:
    monkeypatch.setattr(queue, "_run", lambda *command: subprocess.CompletedProcess(command, 0, shown + "\n", ""))
    assert queue.preempted("7") is expected


def test_a_controller_that_is_away_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["Unable to contact slurm controller (connect failure)", "Unexpected message received", ""]
    replies, slept = iter(answers), list[float]()

    def scontrol(*command: str) -> subprocess.CompletedProcess[str]:
        reply = next(replies)
        return subprocess.CompletedProcess(command, bool(reply), "", reply)

    monkeypatch.setattr(queue, "_run", scontrol)
    monkeypatch.setattr(queue.time, "sleep", slept.append)
    queue.requeue("7")
    assert slept == [1.0, 2.0] and next(replies, None) is None
    replies = iter(answers[:1] * 99)
    with pytest.raises(UserError, match=r"Unable to contact .* \(asked again for 0 minutes\).*resubmit"):
        queue.requeue("7", patience=0)
    replies = iter(["Requested operation is presently disabled", ""])
    with pytest.raises(UserError, match=r"disabled\. The run is saved"):
        queue.requeue("7")
    assert next(replies) == ""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PeerError("Rank 1 ended"), True),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp, remote process exited"), True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (job.InfrastructureError("in use by process 3 on node2"), True),
        (OSError(errno.ENOENT, "No such file"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA error: out of memory"), False),
        (KeyError("planted"), False),
        (UserError("data.path is not set"), False),
    ],
)
def test_what_is_tried_again(run: Path, requests: list[str], error: Exception, expected: bool) -> None:
    assert job.is_infrastructure(error) is expected
    with pytest.raises(SystemExit) as caught:
        job._failed(run, "train", process(1, 2), error)
    assert caught.value.code == (2 if isinstance(error, UserError) else 1)
    ending, (*_, end) = records.read_ending(run), [None, *records.attempt_ends(run)]
    assert (ending is None) is expected
    if expected:
        assert end is not None and end.infrastructure and end.rank == 1
    else:
        assert ending is not None and ending.state == "failed" and ending.rank == 1


def test_a_mistake_of_the_users_is_told_without_a_traceback(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        job._failed(run, "train", process(), UserError("data.path is not set"))
    output = capsys.readouterr()
    assert output.out == "nearfar: data.path is not set\n" and output.err == ""
    with pytest.raises(UserError):  # outside SLURM the command line tells it
        job._failed(run, "train", process()._replace(result=None), UserError("data.path is not set"))


def test_a_lock_of_an_attempt_before_is_waited_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = RunFolder(run)
    held.__enter__()
    with pytest.raises(job.InfrastructureError, match=f"in use by process {os.getpid()} on"):
        job.wait_for_lock(run, lambda: False, patience=0)
    timer = threading.Timer(0.3, held.__exit__, (None, None, None))
    timer.start()
    job.wait_for_lock(run, lambda: False)
    timer.join()
    assert "waiting for its end" in capsys.readouterr().out
    with RunFolder(run):
        pass


def test_another_torch_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job._tell_changed_torch(run)
    file = run / "checkpoints" / "step-000000020" / "state.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"versions": {"torch": torch.__version__}}))
    job._tell_changed_torch(run)
    assert capsys.readouterr().out == ""
    file.write_text(json.dumps({"versions": {"torch": "2.1.0+cu118"}}))
    job._tell_changed_torch(run)
    assert "was 2.1.0+cu118 when step 20 was saved" in capsys.readouterr().out


def test_a_job_that_slurm_has_requeued_already_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(text: str) -> Callable[..., subprocess.CompletedProcess[str]]:
        return lambda *command: subprocess.CompletedProcess(command, 1, "", text)

    monkeypatch.setattr(queue, "_run", answers("Job is pending execution for job 7\n"))
    queue.requeue("7")
    monkeypatch.setattr(queue, "_run", answers("Requested operation is presently disabled\n"))
    with pytest.raises(UserError, match="presently disabled"):
        queue.requeue("7")


def test_a_rank_that_only_lost_another_leaves_the_word_to_it(run: Path, requests: list[str]) -> None:
    with pytest.raises(SystemExit):
        job._failed(run, "train", process(1, 2), ValueError("planted"))
    with pytest.raises(SystemExit):
        job._failed(run, "train", process(0, 2), PeerError("Rank 1 ended"))
    found = records.read_ending(run)
    assert requests == ["waited"] and found is not None
    assert found.why == f"rank 1 on {socket.gethostname()}: ValueError: planted"


def test_ranks_meet_at_a_free_port_of_the_first_ones_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "not yet")  # and taken back after the test
    monkeypatch.setenv("MASTER_PORT", "0")
    met: list[tuple[str, str, float | None]] = []

    def second() -> None:
        deadline = job.rendezvous(tmp_path / "meeting", process(1, 2))
        met.append((os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], deadline))

    thread = threading.Thread(target=second)
    thread.start()
    time.sleep(0.2)  # the second may come first
    assert not met
    assert job.rendezvous(tmp_path / "meeting", process(0, 2), 1234.5) == 1234.5
    thread.join(timeout=20)
    assert met == [(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], 1234.5)]
    with socket.socket() as probe:
        probe.bind((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
    monkeypatch.setattr(job, "MEETING", 0.2)
    with pytest.raises(job.InfrastructureError, match="Rank 1: the first rank did not write"):
        job.rendezvous(tmp_path / "meeting", process(1, 2, "8"))
    assert job._resolvable("no-such-host.invalid") == socket.gethostname()


def test_a_signal_before_training_is_not_forgotten_inside_it() -> None:
    with StopFlag() as outer:
        os.kill(os.getpid(), signal.SIGUSR2)
        with StopFlag() as inner:
            assert inner() and inner.signals == {signal.SIGUSR2}
            os.kill(os.getpid(), signal.SIGTERM)
        assert outer.signals == {signal.SIGUSR2, signal.SIGTERM} == inner.signals


@pytest.mark.parametrize(
    ("output", "seconds"),
    [("59:12", 3552), ("1:00:00", 3600), ("2-03:04:05", 183845), ("0:07", 7), ("UNLIMITED", None), ("NOT_SET", None)],
)
def test_time_left_as_squeue_says_it(monkeypatch: pytest.MonkeyPatch, output: str, seconds: float | None) -> None:
    monkeypatch.setattr(queue, "_run", lambda *command: subprocess.CompletedProcess(command, 0, f"{output}\n", ""))
    assert queue.seconds_left("7") == seconds


def test_the_first_rank_knows_when_to_save(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SubmissionRecord(resources=Resources(cpu=True, signal_delay=40), runs=[run]).write(run)
    monkeypatch.setattr(queue, "seconds_left", lambda number: 100.0)
    assert job.save_by(run, run, process()) == pytest.approx(time.time() + 60, abs=5)
    assert job.save_by(run, run, process(1, 2)) is None
    monkeypatch.setattr(queue, "seconds_left", lambda number: None)
    assert job.save_by(run, run, process()) is None


def test_the_alarm_rings_in_time_and_not_afterwards() -> None:
    with StopFlag() as stop:
        with job._alarm(time.time() - 1):
            until = time.monotonic() + 10
            while not stop() and time.monotonic() < until:
                time.sleep(0.01)
        assert stop.signals == {signal.SIGUSR2}
    with StopFlag() as stop:
        with job._alarm(time.time() + 0.2):
            pass
        time.sleep(0.4)
        assert not stop()


@pytest.fixture
def mine(
    tmp_path: Path, tiny_recipe: Callable[..., dict[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """mine.yaml and pictures/, and no SLURM."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "pictures.npz", images=rng.integers(0, 256, (40, 32, 32, 3), np.uint8), label=np.arange(40) % 2)
    recipe = tiny_recipe(epochs=2)
    recipe["data"] |= {"path": "pictures.npz", "val": "pictures.npz"}
    recipe["eval"] = {"knn_every_epochs": 0}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_debug_does_in_this_process_what_a_job_does(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "mine.yaml", "--cpu", "--cluster", "debug", "--then", "eval=knn"]
    assert cli.main(words) == 0
    run = mine / "runs" / "mine"
    done = records.read_ending(run)
    assert done is not None and (done.state, done.step, done.steps) == ("finished", 10, 10)
    assert (
        records.read_ending(run, "eval") is not None
        and (run / "results.json").exists()
        and (run / "report.html").exists()
    )
    assert [ending.why for ending in records.attempt_ends(run)] == ["finished"]
    capsys.readouterr()
    assert cli.main(["launch", "status", str(run)]) == 0
    assert "finished" in capsys.readouterr().out


def test_local_runs_processes_of_this_machine_one_run_after_the_other(
    mine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["launch", "mine.yaml", "--cpu", "--tasks-per-node", "2", "--cluster", "local"]
    assert cli.main([*words, "--nodes", "2"]) == 2
    assert "--nodes 2 needs --cluster slurm" in " ".join(capsys.readouterr().err.split())
    sweep = [*words, "--sweep", "optim.lr=1e-3,2e-3", "--then", "eval=knn"]
    assert cli.main(sweep) == 0
    for name in ("lr=1e-3", "lr=2e-3"):
        run = mine / "runs" / "mine" / name
        done = records.read_ending(run)
        assert done is not None and done.state == "finished"
        assert "ranks: 2" in (run / "run.log").read_text() and (run / "results.json").exists()
    capsys.readouterr()
    assert cli.main(["report", "runs/mine"]) == 0
    output = capsys.readouterr().out
    assert "lr=1e-3" in output and "lr=2e-3" in output and "k-NN" in output
