"""What an interrupted job does: which signals lead back to the queue, and who asks for it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from nearfar.launch.local.stop_signals import StopFlag
from nearfar.launch.slurm import queue, records, requeue
from nearfar.launch.slurm.job_process import JobProcess
from nearfar.ssl.errors import UserError


def process(rank: int = 0, size: int = 1, number: str = "7") -> JobProcess:
    return JobProcess(number, rank, size, 0, "localhost", Path("result.pkl"))


def leave(run: Path, where: JobProcess, *sent: signal.Signals) -> int | str | None:
    with StopFlag() as stop:
        for each in sent:
            os.kill(os.getpid(), each)
        with pytest.raises(SystemExit) as caught:
            requeue.leave_interrupted(run, where, stop, 5, 10)
    return caught.value.code


def test_only_usr2_alone_and_only_the_first_rank_requeues(run: Path, requests: list[str]) -> None:
    assert leave(run, process(0, 2), signal.SIGUSR2) == 0 and requests == ["requeue 7"]
    assert leave(run, process(1, 2), signal.SIGUSR2) == 0 and requests == ["requeue 7", "waited"]
    assert records.read_ending(run) is None


@pytest.mark.parametrize(
    "sent", [(signal.SIGTERM,), (signal.SIGTERM, signal.SIGUSR2), (signal.SIGUSR2, signal.SIGTERM)]
)
def test_after_term_it_waits_and_then_does_not_count_as_done(
    run: Path, requests: list[str], sent: tuple[signal.Signals, ...]
) -> None:
    assert leave(run, process(), *sent) == 1 and requests == ["waited"]
    found = records.read_ending(run)
    assert found is not None and found.state == "stopped" and found.step == 5 and "SIGTERM" in found.why


def test_slurm_that_refuses_to_requeue_is_told_of(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: str) -> None:
        raise UserError("scontrol requeue 7: disabled.")

    monkeypatch.setattr(queue, "requeue", refuse)
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
        with pytest.raises(SystemExit) as caught:
            requeue.leave_interrupted(run, process(), stop, 5, 10)
    assert caught.value.code == 1
    found = records.read_ending(run)
    assert found is not None and found.state == "stopped" and "disabled" in found.why


@pytest.mark.parametrize("preempted", [True, False])
def test_term_that_is_a_preemption_leads_back_to_the_queue(
    run: Path, requests: list[str], monkeypatch: pytest.MonkeyPatch, preempted: bool
) -> None:
    """With PreemptMode=CANCEL nobody else would bring the job back; a cancelled one must stay so."""
    monkeypatch.setattr(queue, "preempted", lambda number: preempted)
    monkeypatch.setattr(queue, "requeue", lambda number, patience: requests.append(f"requeue {number}"))
    assert leave(run, process(0, 2), signal.SIGTERM) == 1
    assert requests == (["requeue 7", "waited"] if preempted else ["waited"])


def test_waiting_ends_after_the_seconds_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(requeue, "time", SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append))
    requeue.wait_for_the_end(0.5)
    assert sum(slept) == pytest.approx(0.5) and max(slept) <= 0.2
