"""Ranks without a launcher's watch, as torchrun and srun start them: one dies or stands still, and is named."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from nearfar.ssl.parallel import heartbeat
from nearfar.ssl.parallel.heartbeat import FAILURE, Heartbeat, of_attempt

# Each rank says when all have met. Then the mode: `ring` waits for a living rank that never sends, as one waits in a
# collective whose connections do not break; `reduce` waits for all; `pause` does nothing for a while.
RANKS = """
    import sys, time
    import torch
    import torch.distributed as dist
    from nearfar.ssl.parallel import distributed
    from nearfar.ssl.errors import PeerError

    world = distributed.from_environment()
    mode, silence, victim = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    try:
        with distributed.joined(world, silence=silence):
            distributed.at_step(1234)
            distributed.all_sum_(torch.ones(1))
            time.sleep(silence / 3)  # the step is told with the next beat
            print("met", flush=True)
            if world.rank == victim:
                time.sleep(600)
            if mode == "ring":
                living = [rank for rank in range(3) if rank != victim]
                dist.recv(torch.ones(1), living[0] + living[1] - world.rank)
            elif mode == "pause":
                time.sleep(1.5 * silence)
            distributed.all_sum_(torch.ones(1))
    except PeerError as error:
        print(f"nearfar: {error}", file=sys.stderr)
        sys.exit(3)
"""

Together = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Together]:
    """Starts three ranks, and returns when they have met."""
    script = tmp_path / "ranks.py"
    started: list[subprocess.Popen[str]] = []
    script.write_text(textwrap.dedent(RANKS))

    def start(mode: str, silence: float, victim: int = -1) -> list[subprocess.Popen[str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = os.environ | {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in ("0", "1", "2"):
            command = [sys.executable, str(script), mode, str(silence), str(victim)]
            each = {"RANK": rank, "LOCAL_RANK": rank}
            started.append(
                subprocess.Popen(
                    command, env=env | each, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )  # fmt: skip
        for process in started:
            assert process.stdout is not None  # on which the gloo of torch 2.8 says how many connections it has
            assert next((line for line in process.stdout if not line.startswith("[Gloo]")), "") == "met\n"
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("mode", "how", "victim"),
    [
        ("reduce", "SIGKILL", 0),
        ("reduce", "SIGSTOP", 1),
        *(pytest.param("ring", "SIGKILL", victim, marks=pytest.mark.long) for victim in (0, 1)),
        pytest.param("reduce", "SIGKILL", 1, marks=pytest.mark.long),
        pytest.param("reduce", "SIGSTOP", 0, marks=pytest.mark.long),
    ],
)
def test_a_rank_that_dies_or_stands_still_is_named_and_ends_the_others(
    three: Together, mode: str, how: str, victim: int
) -> None:
    processes = three(mode, 4.0, victim)
    time.sleep(0.5)  # the others are on their way into what they will wait in
    processes[victim].send_signal(signal.Signals[how])
    living = [process for rank, process in enumerate(processes) if rank != victim]
    outputs = [process.communicate(timeout=120)[1] for process in living]
    assert [process.returncode for process in living] == [3, 3], outputs
    first = " ".join(outputs[0].split())
    assert f"nearfar: Lost rank {victim} on {socket.gethostname()}: " in first, outputs
    assert "its last step was 1,234." in first and "Traceback" not in first


def test_neither_a_long_wait_nor_a_suspended_job_is_taken_for_a_death(three: Together) -> None:
    """All ranks are idle for longer than a rank may be silent, and all are stopped whole for as long."""
    processes = three("pause", 4.0)
    time.sleep(1)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            process.send_signal(number)
        time.sleep(6 if number == signal.SIGSTOP else 0)
    outputs = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs


# One rank's threads, with the others played by hand


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes with which a heartbeat would have ended this process; its thread waits instead."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        threading.Event().wait()

    monkeypatch.setattr(os, "_exit", leave)
    return codes


def until(condition: Callable[[], object]) -> None:
    latest = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < latest
        time.sleep(0.01)


def watching(store: dist.Store, rank: int = 0, size: int = 2, silence: float = 0.6) -> Heartbeat:
    return Heartbeat(store, rank, size, first_of_machine=True, silence=silence)


def test_a_rank_that_left_is_not_missed(store: dist.Store, ended: list[int]) -> None:
    with watching(store, 0) as first:
        with watching(store, 1):
            until(lambda: first._others[1].beat)
        time.sleep(3 * first.silence)
        assert not first.verdict and ended == []


def test_silence_ends_the_process_and_the_others_are_told(
    store: dist.Store, ended: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    ours = of_attempt(store)
    with watching(store, size=3):
        ours.set("beat/2", "node7 5 1234")
        until(lambda: ended)
    assert ended == [3]
    assert "nearfar: Lost rank 2 on node7: no sign of life for" in capsys.readouterr().err
    assert ours.get(FAILURE).decode().startswith("Lost rank 2 on node7")


def test_a_rank_that_never_came_is_named(
    store: dist.Store, ended: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heartbeat, "ARRIVAL", 1.0)
    with watching(store):
        until(lambda: ended)
    assert ended == [3] and "Rank 1 has not met the others within 1 s" in capsys.readouterr().err


def test_a_mistake_of_another_rank_ends_with_the_code_of_a_mistake(
    store: dist.Store, ended: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    of_attempt(store).set(FAILURE, heartbeat.MISTAKE + "Rank 1 on b: no such file")
    with watching(store, silence=3.0):
        until(lambda: ended)
    assert ended == [2] and capsys.readouterr().err == "nearfar: Rank 1 on b: no such file\n"


def test_a_checkpoint_in_the_making_is_finished_first(store: dist.Store, ended: list[int]) -> None:
    with watching(store) as beats:
        with beats.finishing():
            beats.lost("Lost rank 1")
            time.sleep(2 * beats.silence)
            assert ended == []
        until(lambda: ended)
    assert ended == [3]


def test_zero_watches_nothing(store: dist.Store, ended: list[int]) -> None:
    with watching(store, silence=0) as beats:
        of_attempt(store).set("beat/1", "node7 5 ")
        time.sleep(0.5)
        assert not beats.watches and beats.wait_for_verdict() == "" and not of_attempt(store).check(["beat/0"])
    assert ended == []
