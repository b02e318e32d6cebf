"""The time of a step before the first one: against a clock that a test turns, and runs that are the same with it."""

from __future__ import annotations

import socket
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from nearfar.ssl import checkpoint
from nearfar.ssl.backbones import create
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.learning import memory, pace
from nearfar.ssl.learning.classifier import build_classifier_learner
from nearfar.ssl.learning.student_teacher import StudentTeacher
from nearfar.ssl.parallel import device
from nearfar.ssl.run import announce
from nearfar.ssl.settings import finetune_settings
from nearfar.ssl.settings.defaults import resolve
from nearfar.ssl.settings.finetune_settings import FinetuneRun
from nearfar.ssl.settings.run import Run
from nearfar.ssl.train import finetune, pretrain
from nearfar.ssl.training import set_up
from nearfar.ssl.training.base import Training
from nearfar.ssl.training.choose_learner import learner_of
from nearfar.ssl.training.finetuning import Finetuning
from nearfar.ssl.training.pretraining import Pretraining

Make = Callable[..., Run]
SAID = "to go: roughly"


class Clock:
    """A machine that takes `fixed` seconds for a pass and `each` for an image, and 9 s more where a size is new."""

    def __init__(self, fixed: float, each: float) -> None:
        self.fixed, self.each, self.now = fixed, each, 0.0
        self.passes: list[int] = []

    def monotonic(self) -> float:
        return self.now

    def loss_of(self, learner: nn.Module) -> Callable[[int], Tensor]:
        def loss(count: int) -> Tensor:
            self.now += self.fixed + self.each * count + 9 * (count not in self.passes and count != 2)
            self.passes.append(count)
            return sum((p.sum() for p in learner.parameters()), torch.zeros(()))

        return loss


def estimate(monkeypatch: pytest.MonkeyPatch, clock: Clock, images: int, most: int, left: int = 10**6) -> float | None:
    learner = StudentTeacher(nn.Linear(2, 2), nn.Linear(2, 2))
    monkeypatch.setattr(pace, "time", clock)
    return pace.step_seconds(learner, clock.loss_of(learner.student), images, most, left)


@pytest.mark.parametrize(("fixed", "each"), [(0.0, 0.5), (3.0, 0.25), (0.001, 0.002), (0.0, 1e-4)])
@pytest.mark.parametrize(("images", "most"), [(1, 1), (2, 2), (64, 64), (100, 7), (5, 1)])
def test_the_time_goes_on_in_proportion(
    monkeypatch: pytest.MonkeyPatch, fixed: float, each: float, images: int, most: int
) -> None:
    clock = Clock(fixed, each)
    found = estimate(monkeypatch, clock, images, most)
    # From one image alone nothing tells what is for all of them.
    expected = images * (fixed + each) if most == 1 else fixed + each * images
    assert found == pytest.approx(expected) and max(clock.passes) <= most
    assert max(clock.passes) == 2 or 4 * (fixed + 2 * each) < pace.TRIAL or most == 1


def test_a_short_run_is_not_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.5, 0.5)
    assert estimate(monkeypatch, clock, images=10, most=10, left=5) is None and clock.passes == [1, 1]
    assert estimate(monkeypatch, Clock(0.5, 0.5), images=10, most=10, left=7) == pytest.approx(5.5)


KINDS = {
    "batch norm and drop-path": ["head.batch_norm=true", "backbone.drop_path=0.3"],
    "ibot, koleo and gram": ["loss.ibot_weight=1", "loss.koleo_weight=0.1", "loss.gram_weight=1"],
    "sinkhorn": ["loss.centering=sinkhorn_knopp"],
    "recomputed": ["train.checkpoint_activations=true"],
    "timm": [
        "backbone.name=timm/resnet18", "backbone.lgp=false", "backbone.gaug=false", "backbone.prr=false",
        "backbone.embed_dim=null", "backbone.depth=null", "backbone.num_heads=null", "backbone.drop_path=0",
    ],
    "distilled": ["distill.teacher=TEACHER"],
}  # fmt: skip


def tried(
    kind: type[Training], run: Run | FinetuneRun, learner: StudentTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ask for the costs of a step, and find everything as it was."""
    monkeypatch.setattr(pace, "SHORT", 0.0)
    compute = device.choose("cpu", run.train.precision, 24)
    set_up.prepare_learner(learner, compute, run.train.checkpoint_activations)
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    random = torch.get_rng_state()
    costs = set_up.costs_of(kind, run, learner, compute, 10)
    assert costs.seconds is not None and 0 < costs.seconds < 60
    assert torch.equal(torch.get_rng_state(), random)
    after = learner.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in learner.parameters())
    assert not any(getattr(part, "_noted", None) for part in learner.modules())


@pytest.mark.parametrize("name", KINDS)
def test_a_trial_leaves_every_kind_of_pretraining_as_it_was(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    teacher = tmp_path / "teacher.safetensors"
    checkpoint.export(teacher, create("vit_tiny_patch16", img_size=32, embed_dim=16, depth=1, num_heads=2), {"step": 1})
    settings = [setting.replace("TEACHER", str(teacher)) for setting in KINDS[name]]
    run = resolve(tiny("train.accumulate_steps=2", *settings), 40)[0]
    tried(Pretraining, run, learner_of(run), monkeypatch)


def supervised(folder: Path) -> FinetuneRun:
    words = [
        "name=tiny", f"folder={folder}", "data.workers=0", "augment.size=16", "backbone.name=vit_tiny_patch8",
        "backbone.embed_dim=24", "backbone.depth=2", "backbone.num_heads=2", "backbone.drop_path=0.3",
        "train.epochs=2", "train.batch_size=8", "train.device=cpu", "train.precision=fp32", "train.threads=1",
        "train.log_every_steps=1",
    ]  # fmt: skip
    return finetune_settings.load(None, words)


def test_a_trial_leaves_a_classifier_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finetune_settings.resolve_finetune(supervised(tmp_path), 40)[0]
    tried(Finetuning, run, build_classifier_learner(run, ["a", "b", "c"]), monkeypatch)


# Runs


def lines(run: Run | FinetuneRun) -> list[str]:
    return (run.path / "run.log").read_text().splitlines()


def test_a_run_says_it_before_its_first_step_and_is_the_same_with_and_without(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch,
    same_runs: Callable[[Path, Path, int], None],
) -> None:  # fmt: skip
    """Begun, stopped and continued with the trial, against a whole run without."""
    settings = ("head.batch_norm=true", "loss.ibot_weight=1", "backbone.drop_path=0.2")
    without, parts = tiny(*settings, folder="without"), tiny(*settings, folder="parts")
    pretrain(without, images, console=quiet)
    monkeypatch.setattr(pace, "SHORT", 0.0)
    steps = iter(range(1, 21))
    pretrain(parts, images, should_stop=lambda: next(steps) == 8, console=quiet)
    (said,) = (line for line in lines(parts) if SAID in line)
    assert "20 steps to go: roughly" in said and "by a trial with a few black images. Optimizer, images that" in said
    assert pretrain(parts, images, console=quiet).finished
    assert [line.partition(" steps to go")[0].split()[-1] for line in lines(parts) if SAID in line] == ["20", "12"]
    same_runs(without.path, parts.path, 20)
    assert not any(SAID in line for line in lines(without))
    pretrain(parts, images, console=quiet)  # finished: nothing to estimate
    assert sum(SAID in line for line in lines(parts)) == 2


def test_a_supervised_run_is_the_same_with_and_without(
    tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch, same_runs: Callable[[Path, Path, int], None]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 20, 20, 3), np.uint8)
    source = ArraySource(pixels, np.arange(40) % 3, classes=["a", "b", "c"])
    without, tried = supervised(tmp_path / "without"), supervised(tmp_path / "tried")
    finetune(without, source, console=quiet)
    monkeypatch.setattr(pace, "SHORT", 0.0)
    finetune(tried, source, console=quiet)
    same_runs(without.path, tried.path, 10)
    assert sum(SAID in line for line in lines(tried)) == 1 and not any(SAID in line for line in lines(without))


RANKS = """
    import os
    import sys
    import numpy as np
    from nearfar.ssl import config, train
    from nearfar.ssl.data.sources.base import ArraySource
    from nearfar.ssl.learning import pace
    from nearfar.ssl.parallel import distributed

    source = ArraySource(np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8))
    ports = os.environ["MASTER_PORT"], sys.argv[2]  # one each: a rank may be early, and the first store still there
    for pace.SHORT, folder, os.environ["MASTER_PORT"] in zip((float("inf"), 0.0), ("without", "tried"), ports):
        run = config.load(None, [*sys.argv[3:], f"folder={sys.argv[1]}/{folder}"])
        train.pretrain(run, source, world=distributed.from_environment())
"""


@pytest.mark.long
def test_two_sharded_ranks_are_the_same_with_and_without(
    tiny_settings: list[str], tmp_path: Path, together: Callable[..., list[subprocess.Popen[str]]],
    finish: Callable[..., list[str]], same_runs: Callable[[Path, Path, int], None],
) -> None:  # fmt: skip
    """With sums over the ranks in the trial: batch norm, KoLeo and the center."""
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(RANKS))
    more = [*tiny_settings, "train.shard=true", "train.epochs=1", "loss.koleo_weight=0.1", "eval.knn_every_epochs=0"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    finish(together(2, str(script), str(tmp_path), str(port), *more))
    same_runs(tmp_path / "without" / "tiny", tmp_path / "tried" / "tiny", 5)
    assert SAID in (tmp_path / "tried" / "tiny" / "run.log").read_text()
    assert len(read_metrics(tmp_path / "tried" / "tiny" / "metrics.jsonl")) == 5


def test_nothing_is_tried_where_memory_is_short(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is free has to hold the student's gradients and the activations of an image."""
    monkeypatch.setattr(pace, "SHORT", 0.0)
    run = resolve(tiny("train.batch_size=4"), 40)[0]
    learner, compute = learner_of(run), device.choose("cpu", "fp32", 24)
    need = Pretraining.needed(run, learner, compute)
    gradients, image = need.gradients, (need.activations + need.logits) // 4
    asked: list[int] = []
    monkeypatch.setattr(pace, "step_seconds", lambda *given: asked.append(given[3]) or 1.0)
    for free, most in ((2 * gradients + image, 0), (2 * gradients + 5 * image, 2), (None, 4)):
        monkeypatch.setattr(memory, "free", lambda _, free=free: free)
        costs = set_up.costs_of(Pretraining, run, learner, compute, 10)
        assert (costs.seconds is None) == (most == 0) and (asked.pop() if most else 0) == most


def test_what_is_compiled_later_is_said() -> None:
    line = announce.rough_time_line(12.0, 3000, compiled=True)
    assert line.startswith("3,000 steps to go: roughly 10.0 hours at 12 s a step, by a trial with a few black images, ")
    assert "not compiled yet" in line and "compiled" not in announce.rough_time_line(1.0, 2, compiled=False)
