"""A checkpoint is written while the training goes on, and neither an error nor a kill is lost on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from nearfar.ssl import checkpoint, train
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.errors import UserError
from nearfar.ssl.run import background_save
from nearfar.ssl.run.background_save import Saver, Snapshot
from nearfar.ssl.settings.run import Run

Make = Callable[..., Run]
pytestmark = pytest.mark.usefixtures("time_limit")


def silent(text: str) -> None:
    raise AssertionError(f"nothing should be told: {text}")


def state(value: float) -> list[tuple[str, Tensor]]:
    return [("a", torch.full((3, 4), value)), ("b", torch.full((), value)), ("c", torch.empty(0))]


class Writer:
    """Writes when it is let, and keeps what it wrote."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.written: list[tuple[int, float]] = []
        self.threads: set[str] = set()

    def __call__(self, step: int, tensors: dict[str, Tensor]) -> None:
        assert self.gate.wait(60)
        self.threads.add(threading.current_thread().name)
        self.written.append((step, float(tensors["a"].sum())))


def test_the_caller_goes_on_and_what_it_changes_is_not_in_the_copy() -> None:
    writer, tensors = Writer(), state(1.0)
    with Saver(writer, silent) as saver:
        saver.save(5, tensors)
        assert saver.writing and writer.written == []
        tensors[0][1].fill_(7.0)
        writer.gate.set()
    assert writer.written == [(5, 12.0)] and not saver.writing
    assert writer.threads == {"checkpoint"}


def test_never_two_at_once() -> None:
    """The second waits for the first, and the copy of the first is not overwritten before it is on the disk."""
    writer = Writer()
    with Saver(writer, silent) as saver:
        saver.save(1, state(1.0))
        timer = threading.Timer(0.2, writer.gate.set)
        timer.start()
        saver.save(2, state(2.0))
        assert writer.written[0] == (1, 12.0)
        assert saver.seconds > 0 and saver.count == 2
    assert writer.written == [(1, 12.0), (2, 24.0)]


def test_without_a_background_it_is_written_at_once_and_from_the_tensors_themselves() -> None:
    seen = []
    tensors = state(1.0)
    with Saver(lambda step, given: seen.append((step, given["a"] is tensors[0][1])), silent, False) as saver:
        saver.save(3, tensors)
        assert seen == [(3, True)]


def failing(step: int, tensors: dict[str, Tensor]) -> None:
    raise UserError(f"disk full at {step}")


def fail(saver: Saver) -> None:
    saver.save(1, state(1.0))
    while saver.writing:
        time.sleep(0.001)


def leave(saver: Saver) -> None:
    saver.__exit__(None, None, None)


@pytest.mark.parametrize("ask", [Saver.check, Saver.wait, lambda saver: saver.save(2, state(2.0)), leave])
def test_an_error_of_the_thread_is_raised_where_the_training_asks_next_and_once(ask: Callable[[Saver], None]) -> None:
    saver = Saver(failing, silent)
    fail(saver)
    with pytest.raises(UserError, match="disk full at 1"):
        ask(saver)
    saver.check()
    saver.wait()


def test_an_error_beside_another_one_is_told() -> None:
    messages: list[str] = []
    saver = Saver(failing, messages.append)
    fail(saver)
    saver.__exit__(KeyError, KeyError(), None)
    assert messages == ["disk full at 1"]


def test_the_memory_of_a_copy_is_used_again() -> None:
    snapshot = Snapshot()
    places = [{name: copy.data_ptr() for name, copy in snapshot.take(state(x)).items()} for x in (1.0, 2.0)]
    assert places[0] == places[1] and len(places[0]) == 3
    other = snapshot.take([("a", torch.ones(5)), ("d", torch.ones(2, dtype=torch.int64))])
    assert other["a"].tolist() == [1] * 5 and other["d"].tolist() == [1, 1] and set(other) == {"a", "d"}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_a_copy_without_memory_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    tensors = [("optimizer/exp_avg/head.prototypes", torch.ones(1000))]

    def full(*_: object, **__: object) -> Tensor:
        raise error

    monkeypatch.setattr(background_save.torch, "empty", full)
    with pytest.raises(UserError, match=r"exp_avg/head\.prototypes, 4\.0 KB.*save_in_background=false"):
        Snapshot().take(tensors)


# A run


class Slow:
    """In place of `checkpoint.save_file`: the writing of the `number`-th file begins and does not end before `gate`."""

    def __init__(self, number: int) -> None:
        self.number, self.gate, self.begun = number, threading.Event(), threading.Event()
        self.save_file = checkpoint.save_file

    def __call__(self, tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        self.number -= 1
        if self.number == 0:
            path.write_bytes(b"half of it")
            self.begun.set()
            assert self.gate.wait(60)
        self.save_file(tensors, path, metadata)


def test_the_run_trains_on_while_a_checkpoint_is_written(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch,
    same_runs: Callable[[Path, Path, int], None],
) -> None:  # fmt: skip
    run, waiting = tiny("train.save_every_steps=10"), tiny("train.save_in_background=false", folder="waiting")
    train.pretrain(waiting, images, console=quiet)
    slow = Slow(1)
    monkeypatch.setattr(checkpoint, "save_file", slow)
    seen = []

    def stop() -> bool:
        if slow.begun.is_set() and not slow.gate.is_set():
            seen.append([path.name[:9] for path in (run.path / "checkpoints").iterdir()])
            if len(seen) == 4:
                slow.gate.set()
        return False

    assert train.pretrain(run, images, should_stop=stop, console=quiet).finished
    assert seen == [[".writing-"]] * 4  # nothing under its own name, for four steps of training
    same_runs(run.path, waiting.path, 20)
    log = (run.path / "run.log").read_text()
    assert "Checkpoints: 2, for which the training waited" in log
    waits = [line["save_wait"] for line in read_metrics(run.path / "metrics.jsonl") if "loss" in line]
    assert waits[:10] == [0.0] * 10 and waits[10] > 0 and all(wait < 1 for wait in waits)


def test_a_stop_waits_for_the_writing(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, run = Slow(1), tiny()
    monkeypatch.setattr(checkpoint, "save_file", slow)
    threading.Timer(0.5, slow.gate.set).start()
    outcome = train.pretrain(run, images, should_stop=lambda: True, console=quiet)
    assert slow.gate.is_set()
    saved = checkpoint.latest(run.path / "checkpoints")
    assert saved is not None and saved.state["step"] == outcome.step == 1


@pytest.mark.parametrize("number", [3, 4], ids=["in the second checkpoint", "in its export"])
def test_killed_while_a_checkpoint_is_written_the_one_before_is_continued_to_the_bit(
    tiny: Make, images: ArraySource, quiet: Console, number: int, same_runs: Callable[[Path, Path, int], None]
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # before the fork
    run, whole = tiny("train.save_every_steps=6"), tiny(folder="whole")
    child = os.fork()
    if child == 0:
        slow = Slow(number)
        checkpoint.save_file = slow  # type: ignore[assignment]

        def kill() -> bool:
            if slow.begun.is_set():
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        train.pretrain(run, images, should_stop=kill, console=quiet)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    saved = checkpoint.latest(run.path / "checkpoints")
    assert saved is not None and saved.state["step"] == (6 if number == 3 else 12)
    for each in (run, whole):
        assert train.pretrain(each, images, console=quiet).finished
    same_runs(run.path, whole.path, 20)
    assert not [path for path in run.path.rglob(".writing-*") if path.parent.name == "checkpoints"]
    torch.set_num_threads(threads)


@pytest.mark.parametrize("step", [6, 20], ids=["on the way", "at the end"])
def test_a_full_disk_ends_the_run_and_says_what_is_intact(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    save_file = checkpoint.save_file

    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        if path.parent.name.startswith(f".writing-step-{step:09d}"):
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    run = tiny("train.save_every_steps=3")
    intact = {6: "03", 20: "18"}[step]
    with pytest.raises(UserError, match=f"of step {step} could not be written.*step-0000000{intact} is intact"):
        train.pretrain(run, images, console=quiet)
    monkeypatch.undo()
    assert train.pretrain(run, images, console=quiet).finished
