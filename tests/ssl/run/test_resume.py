"""Stopped, killed, damaged: a continued run ends with the bits of the uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from nearfar.ssl import checkpoint, train
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.errors import UserError
from nearfar.ssl.run.run_folder import RunFolder
from nearfar.ssl.settings.run import Run

Make = Callable[..., Run]
Same = Callable[[Run], None]
STEPS = 20


@pytest.fixture(scope="module")
def data() -> ArraySource:
    return ArraySource(np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # before any fork
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def same(tiny: Make, data: ArraySource, quiet: Console, same_runs: Callable[[Path, Path, int], None]) -> Same:
    """Asserts that a run ended with the bits and the metrics of the run that nothing interrupted, made here."""
    reference = tiny(folder="reference")
    assert train.pretrain(reference, data, console=quiet).finished
    return lambda run: same_runs(run.path, reference.path, STEPS)


def start(run: Run, source: ArraySource) -> int:
    """The run in a process of its own; returns its id."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        with Path(os.devnull).open("w") as nowhere:
            train.pretrain(run, source, console=Console(file=nowhere))
        os._exit(0)
    return child


def kill_at(child: int, run: Run, lines: int) -> bool:
    """SIGKILL as soon as there are so many lines of metrics; False when it had already ended."""
    metrics, until = run.path / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
            time.sleep(random.random() * 0.02)  # anywhere in a step, or in a checkpoint
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the run did not get anywhere")


def test_twice_the_same_run_is_the_same(tiny: Make, data: ArraySource, quiet: Console, same: Same) -> None:
    """Without this the other tests here would mean nothing."""
    again, other = tiny(folder="again"), tiny("train.seed=1", folder="other")
    for run in (again, other):
        train.pretrain(run, data, console=quiet)
    same(again)
    with pytest.raises(AssertionError, match=r"learner/loss\.center"):  # the first of the names that differ
        same(other)


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_at_random_steps_and_continued(
    tiny: Make, data: ArraySource, quiet: Console, same: Same, workers: int
) -> None:
    run, step = tiny(f"data.workers={workers}"), 0
    stops = sorted(random.sample(range(1, STEPS), 3))
    for stop in stops:
        polls = iter(range(step + 1, STEPS + 1))
        outcome = train.pretrain(run, data, should_stop=lambda k=polls, s=stop: next(k) == s, console=quiet)
        step = stop
        assert outcome.step == stop and not outcome.finished
        assert (run.path / "checkpoints" / f"step-{stop:09d}").is_dir()
    assert train.pretrain(run, data, console=quiet).finished
    same(run)
    log = (run.path / "run.log").read_text()
    for stop in stops:
        assert f"Stopped after step {stop} of 20. The same command continues" in log
        assert f"Continuing from step {stop} of 20." in log


SUCCESSORS = {
    "ibot, shared head, centering": ["loss.ibot_weight=1", "optim.layerwise_decay=0.9"],
    "dinov3": [
        "loss.recipe=dinov3",
        "loss.gram_start_epoch=2",
        "loss.gram_teacher_epoch=1",
        "loss.centering=centering",
    ],
    "ibot and muon": ["loss.ibot_weight=1", "backbone.lgp=true", "optim.name=muon"],
    "vim, wsd": [
        "backbone.name=vim_tiny_patch8", "backbone.gaug=false", "backbone.num_heads=null", "loss.recipe=dinov2",
        "optim.schedule=wsd",
    ],
}  # fmt: skip


@pytest.mark.parametrize("parts", [*list(SUCCESSORS)[:-1], pytest.param("vim, wsd", marks=pytest.mark.long)])
def test_with_what_came_after_dino_a_continued_run_ends_with_the_same_bits(
    tiny: Make, data: ArraySource, quiet: Console, same_runs: Callable[[Path, Path, int], None], parts: str
) -> None:
    """Stopped before the anchor is taken, when it is there and when its loss is on, at steps 3, 7 and 12 of 20."""
    whole, run = (tiny(*SUCCESSORS[parts], "train.accumulate_steps=2", folder=name) for name in ("whole", "parts"))
    train.pretrain(whole, data, console=quiet)
    step = 0
    for stop in (3, 7, 12, STEPS):
        polls = iter(range(step + 1, STEPS + 1))
        step = train.pretrain(run, data, should_stop=lambda k=polls, s=stop: next(k) == s, console=quiet).step
        assert step == stop
    same_runs(run.path, whole.path, STEPS)
    lines = [line for line in read_metrics(run.path / "metrics.jsonl") if "loss" in line]
    assert all("ibot" in line for line in lines)
    if "dinov3" in parts:
        assert [line["step"] for line in lines if "gram" in line] == list(range(11, STEPS + 1))
        saved = checkpoint.latest(run.path / "checkpoints")
        assert saved is not None
        assert any(name.startswith("learner/anchor.") for name in saved.tensors)


def test_killed_at_random_moments_and_started_again(tiny: Make, data: ArraySource, same: Same) -> None:
    run = tiny("train.save_every_steps=2")
    killed = [kill_at(start(run, data), run, lines) for lines in (random.randrange(1, 9), random.randrange(10, 19))]
    assert killed == [True, True]
    assert os.waitpid(start(run, data), 0)[1] == 0
    same(run)
    assert not list(run.path.glob("checkpoints/.*"))


def test_killed_before_the_first_checkpoint(tiny: Make, data: ArraySource, same: Same) -> None:
    run = tiny()
    assert kill_at(start(run, data), run, 3)
    assert os.waitpid(start(run, data), 0)[1] == 0
    same(run)


def test_killed_with_workers_and_started_again_at_once(
    tiny: Make, data: ArraySource, quiet: Console, same: Same
) -> None:
    """The workers outlive their parent by seconds; they must not keep the folder's lock, and must go by themselves."""
    run = tiny("data.workers=2", "train.save_every_steps=3")
    child = start(run, data)
    assert kill_at(child, run, 8)
    assert train.pretrain(run, data, console=quiet).finished
    same(run)
    until = time.monotonic() + 20
    while (left := members(child)) and time.monotonic() < until:
        time.sleep(0.2)
    for process in left:
        process.kill()
    assert left == []


def members(group: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


def test_a_damaged_checkpoint_falls_back_and_ends_the_same(
    tiny: Make, data: ArraySource, quiet: Console, same: Same
) -> None:
    run = tiny("train.save_every_steps=5")
    polls = iter(range(1, STEPS))
    train.pretrain(run, data, should_stop=lambda: next(polls) == 13, console=quiet)
    file = run.path / "checkpoints" / "step-000000013" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert train.pretrain(run, data, console=quiet).finished
    same(run)
    log = (run.path / "run.log").read_text()
    assert "step-000000013: tensors.safetensors has" in log and "continuing from step-000000010" in log


def test_free_settings_may_change_on_the_way(tiny: Make, data: ArraySource, quiet: Console, same: Same) -> None:
    train.pretrain(tiny(), data, should_stop=lambda: True, console=quiet)
    run = tiny("data.workers=1", "train.save_every_minutes=0.0001", "train.keep_last=1", "eval.knn_every_epochs=3")
    assert train.pretrain(run, data, console=quiet).finished
    same(run)
    assert len(list((run.path / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize("left", ["nothing", "an older one", "half a file"])
def test_a_teacher_that_was_not_exported_is_exported_by_the_next_start(
    tiny: Make, data: ArraySource, quiet: Console, left: str, same_bits: Callable[..., None]
) -> None:
    """Killed, or no space left, between the two files of the last save."""
    run = tiny("train.save_every_steps=10")
    polls = iter(range(STEPS))
    train.pretrain(run, data, should_stop=lambda: next(polls) == 9, console=quiet)
    file = run.path / "teacher.safetensors"
    older = file.read_bytes()
    assert train.pretrain(run, data, console=quiet).finished
    whole = file.read_bytes()
    assert whole != older
    file.unlink() if left == "nothing" else file.write_bytes(older if left == "an older one" else whole[:100])
    assert train.pretrain(run, data, console=quiet).finished
    assert checkpoint.about(file)["step"] == STEPS
    (run.path / "whole.safetensors").write_bytes(whole)
    same_bits(load_file(file), load_file(run.path / "whole.safetensors"))


def test_a_stop_is_saved_before_the_scores_are_computed(tiny: Make, data: ArraySource, quiet: Console) -> None:
    run = tiny("eval.knn_every_epochs=1")
    saved_first = []

    def probe(*_: object) -> dict[str, float]:
        saved_first.append((run.path / "checkpoints" / "step-000000005").is_dir())
        return {}

    train.pretrain(run, data, train.Observers(probe=probe), should_stop=lambda: True, console=quiet)
    polls = iter(range(STEPS))
    train.pretrain(run, data, train.Observers(probe=probe), should_stop=lambda: next(polls) == 3, console=quiet)
    assert saved_first == []
    train.pretrain(run, data, train.Observers(probe=probe), should_stop=lambda: True, console=quiet)
    assert saved_first == [True]


def test_a_score_that_a_stop_left_undone_is_done_by_the_next_start(
    tiny: Make, data: ArraySource, quiet: Console
) -> None:
    """Whether the stop came in the step whose score is due, or while it was computed: no score is lost."""

    def scored(run: Run) -> list[tuple[int, float]]:
        lines = read_metrics(run.path / "metrics.jsonl")
        return [(line["step"], line["knn"]) for line in lines if "knn" in line]

    def probe(backbone: torch.nn.Module, _: Run) -> dict[str, float] | None:
        if next(calls) in interrupted:
            return None
        return {"knn": float(sum(p.double().sum() for p in backbone.parameters()))}

    calls, interrupted = iter(range(99)), set[int]()
    whole = tiny("eval.knn_every_epochs=1", folder="whole")
    assert train.pretrain(whole, data, train.Observers(probe=probe), console=quiet).finished
    assert [step for step, _ in scored(whole)] == [5, 10, 15, 20]

    calls, interrupted = iter(range(99)), {1, 4}  # the second score, and the last one
    run, polls = tiny("eval.knn_every_epochs=1"), iter(range(99))
    for _ in range(4):
        train.pretrain(run, data, train.Observers(probe=probe), should_stop=lambda: next(polls) == 4, console=quiet)
    assert scored(run) == scored(whole)


def untouched(run: Run) -> dict[str, bytes]:
    kept = ("config.yaml", "metrics.jsonl", "teacher.safetensors", "checkpoints/*/*")
    return {str(file): file.read_bytes() for pattern in kept for file in run.path.glob(pattern)}


def test_other_images_and_other_settings_are_refused_and_nothing_is_lost(
    tiny: Make, data: ArraySource, quiet: Console
) -> None:
    run = tiny()
    train.pretrain(run, data, should_stop=lambda: True, console=quiet)
    before = untouched(run)
    other = ArraySource(np.random.default_rng(1).integers(0, 256, (40, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"begun on other images.*choose another name="):
        train.pretrain(tiny("data.path=elsewhere"), other, console=quiet)
    with pytest.raises(UserError, match=r"optim.lr: 0.001 -> 0.002; train.epochs: 4 -> 5"):
        train.pretrain(tiny("optim.lr=2e-3", "train.epochs=5"), data, console=quiet)
    with RunFolder(run.path), pytest.raises(UserError, match="is in use by process"):
        train.pretrain(run, data, console=quiet)
    assert untouched(run) == before


def test_all_checkpoints_damaged_is_told_and_nothing_is_lost(tiny: Make, data: ArraySource, quiet: Console) -> None:
    run = tiny("train.save_every_steps=1")
    polls = iter(range(STEPS))
    train.pretrain(run, data, should_stop=lambda: next(polls) == 2, console=quiet)
    for file in run.path.glob("checkpoints/*/tensors.safetensors"):
        file.write_bytes(b"")
    before = untouched(run)
    with pytest.raises(UserError, match=r"step-000000003.*step-000000002.*start the run afresh"):
        train.pretrain(run, data, console=quiet)
    assert untouched(run) == before


def test_a_checkpoint_of_another_network_is_refused_by_name(tiny: Make, data: ArraySource, quiet: Console) -> None:
    run, other = tiny(), tiny("backbone.lgp=false", folder="other")
    for each in (run, other):
        train.pretrain(each, data, should_stop=lambda: True, console=quiet)
    (other.path / "checkpoints" / "step-000000001").rename(run.path / "checkpoints" / "step-000000009")
    with pytest.raises(UserError, match=r"trained with other settings \(backbone.lgp: False -> True\)"):
        train.pretrain(run, data, console=quiet)
