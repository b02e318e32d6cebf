"""The loop: what a run leaves behind, what is said of its time, and that looking at it changes nothing."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from nearfar.ssl import checkpoint, train
from nearfar.ssl.backbones import Backbone
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.settings.run import Run
from nearfar.ssl.training import base

Make = Callable[..., Run]
SameBits = Callable[..., None]
SameRuns = Callable[[Path, Path, int], None]


def half_cosine(start: float, end: float, t: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


def test_a_whole_run_leaves_what_it_promises(
    tiny: Make, images: ArraySource, quiet: Console, same_bits: SameBits
) -> None:
    seen: list[tuple[Any, ...]] = []
    observers = train.Observers(
        views=lambda batch, colored, folder: seen.append((batch, colored, folder)),
        probe=lambda backbone, run: {"knn_top1": 50.0 + backbone.training},
    )
    run = tiny("train.log_every_steps=3", "eval.knn_every_epochs=2")
    outcome = train.pretrain(run, images, observers, console=quiet)
    assert outcome.finished and outcome.step == outcome.steps == 20 and outcome.folder == run.path

    ((batch, colored, folder),) = seen
    assert folder == run.path and batch.epoch == batch.step == 0
    assert [tuple(group.shape) for group in colored] == [(2, 8, 3, 32, 32), (2, 8, 3, 16, 16)]
    assert all(group.min() >= 0 and group.max() <= 1 for group in colored)

    metrics = read_metrics(run.path / "metrics.jsonl")
    assert [line["step"] for line in metrics if "loss" in line] == [3, 6, 9, 12, 15, 18, 20]
    keys = {
        "step", "epoch", "loss", "lr", "weight_decay", "teacher_momentum", "teacher_temp", "grad_norm", "img_per_s",
        "data_wait", "save_wait", "entropy", "feature_std", "rankme", "kl", "prototypes_used", "time",
    }  # fmt: skip
    assert all(set(line) == keys for line in metrics if "loss" in line)
    probed = [line for line in metrics if "knn_top1" in line]
    assert probed == [{"step": 10, "epoch": 2.0, "knn_top1": 50.0}, {"step": 20, "epoch": 4.0, "knn_top1": 50.0}]
    last = metrics[-2]  # of the last step, number 19 of 20, two of which warm up: just short of the final values
    assert last["lr"] == pytest.approx(half_cosine(1e-3, 1e-6, 17 / 18))
    assert last["weight_decay"] == pytest.approx(half_cosine(0.04, 0.4, 19 / 20)) and last["teacher_momentum"] < 1

    tensors = checkpoint.read(run.path / "checkpoints" / "step-000000020").tensors
    exported = checkpoint.load(run.path)
    teacher = "learner/teacher.backbone."
    saved = {name.removeprefix(teacher): tensor for name, tensor in tensors.items() if name.startswith(teacher)}
    same_bits(exported.state_dict(), saved)
    assert list(run.path.glob("events.out.tfevents*"))
    log = (run.path / "run.log").read_text()
    assert "derived loss.teacher_temp = 0.04" in log and "4 epochs = 20 steps; cpu, float32" in log
    assert log.count("15 steps left: about ") == 1 == log.count("steps left: about ")


def test_what_observers_do_changes_nothing(
    tiny: Make, images: ArraySource, quiet: Console, same_runs: SameRuns
) -> None:
    def probe(backbone: Backbone, run: Run) -> dict[str, float]:
        torch.manual_seed(1)
        backbone(torch.randn(2, 3, 32, 32))
        return {"knn_top1": float(torch.rand(()))}

    def look(*_: object) -> None:
        torch.rand(9)

    watched, alone = tiny("eval.knn_every_epochs=1", folder="a"), tiny(folder="b")
    train.pretrain(watched, images, train.Observers(look, probe), console=quiet)
    train.pretrain(alone, images, console=quiet)
    same_runs(watched.path, alone.path, 20)


def test_a_finished_run_does_nothing_again(tiny: Make, images: ArraySource, quiet: Console) -> None:
    run = tiny()
    train.pretrain(run, images, train.Observers(probe=lambda *a: {"knn_top1": 50.0}), console=quiet)

    def state() -> dict[str, bytes]:
        files = [run.path / "metrics.jsonl", run.path / "teacher.safetensors", *run.path.glob("checkpoints/*/*")]
        states = {str(file): file.read_bytes() for file in files}
        return states | {str(file): file.read_bytes() for file in run.path.glob("events.out.tfevents*")}

    before = state()
    calls: list[Any] = []
    watch = train.Observers(views=lambda *a: calls.append(a), probe=lambda *a: calls.append(a) or {})
    outcome = train.pretrain(run, images, watch, console=quiet)
    assert outcome.finished and state() == before and not calls
    assert "already finished (step 20)" in (run.path / "run.log").read_text()


def test_the_seed_of_a_step_differs_from_step_to_step_and_from_run_to_run() -> None:
    seeds = {base.step_seed(seed, step, rank) for seed in range(5) for step in range(50) for rank in range(3)}
    assert len(seeds) == 750
    assert 0 <= base.step_seed(2**40, 2**40, 2**20) < 2**63
    torch.manual_seed(base.step_seed(2**20 - 1, 2**31 - 1, 2**12 - 1))


def test_the_metrics_are_on_the_disk_before_their_checkpoint(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync, save = os.fsync, checkpoint.save

    def noted(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").resolve().name == "metrics.jsonl":
            synced.append(os.fstat(handle).st_size)
        fsync(handle)

    def checked(folder: Path, step: int, *rest: Any) -> Path:
        on_disk = (folder.parent / "metrics.jsonl").read_bytes()[: synced[-1]].splitlines()
        assert [json.loads(line)["step"] for line in on_disk][:step] == list(range(1, step + 1))
        return save(folder, step, *rest)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(checkpoint, "save", checked)
    train.pretrain(tiny("train.save_every_steps=7"), images, console=quiet)
    assert len(synced) == 3


def test_the_last_line_says_what_to_do_next(tiny: Make, images: ArraySource, quiet: Console) -> None:
    run = tiny()
    train.pretrain(run, images, should_stop=lambda: True, console=quiet)
    train.pretrain(run, images, train.Observers(probe=lambda *_: {"knn_top1": 25.0}), console=quiet)
    lines = (run.path / "run.log").read_text().splitlines()
    assert any("Stopped after step 1 of 20. The same command continues" in line for line in lines)
    assert f"Next: `nearfar eval all {run.path} --train LABELED" in lines[-1]
    assert "Little or nothing was learned: the online k-NN did not rise" in lines[-2]
    sizes = {found[1] for line in lines if (found := re.search(r"A checkpoint takes ([\d.]+) KB", line))}
    tensors = checkpoint.read(run.path / "checkpoints" / "step-000000020").tensors
    (size,) = (float(text) * 1e3 for text in sizes)
    assert size == pytest.approx(sum(tensor.nbytes for tensor in tensors.values()), rel=0.02)


class Clock:
    """Seconds that pass as the test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def estimates(
    monkeypatch: pytest.MonkeyPatch, *, first: int = 0, steps: int = 100, **events: Any
) -> list[tuple[int, str]]:
    """(step, line) of what `Meter` says of the time in a run whose steps take 2 s, but the first two 60 s.

    frozen: steps before which the backbone is frozen, and takes 1 s; scored, saved: seconds by step.
    """
    clock, lines, warm = Clock(), [], list[int]()
    monkeypatch.setattr(train, "time", clock)
    loop: Any = SimpleNamespace(
        step=first, saver=SimpleNamespace(seconds=0.0), schedule=SimpleNamespace(steps=steps), backbone_frozen=False,
        log=SimpleNamespace(say=lambda line: lines.append((loop.step, line)), warmed_up=lambda step: warm.append(step)),
    )  # fmt: skip
    meter = train.Meter(loop)
    while loop.step < steps:
        loop.step += 1
        loop.backbone_frozen = loop.step < events.get("frozen", 0)
        clock.now += 60 if loop.step <= first + 2 else 1 if loop.backbone_frozen else 2
        meter.estimate()
        if loop.step in events.get("scored", {}):
            clock.now += events["scored"][loop.step]
            meter.scored()
        saving = events.get("saved", {}).get(loop.step, 0)
        clock.now, loop.saver.seconds = clock.now + saving, loop.saver.seconds + saving
    return lines


def test_the_length_of_a_run_is_told_from_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = partial(estimates, monkeypatch)
    assert lines() == [(5, "95 steps left: about 3.2 minutes at 2.00 s a step, without scores.")]
    assert lines(first=50) == [(55, "45 steps left: about 90 seconds at 2.00 s a step, without scores.")]
    assert lines(steps=5) == []
    assert lines(scored={4: 500}, saved={3: 70})[0][0] == 9 and len(lines(scored={4: 500})) == 1
    assert lines(saved={3: 70}) == lines() and lines(scored={5: 500, 10: 500}) == lines()
    assert [step for step, _ in lines(frozen=20)] == [24] and "2.00 s" in lines(frozen=20)[0][1]
