"""Real tiny trainings: collapses that are forced are named, and healthy runs raise no alarm."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from nearfar.ssl import train
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.learning.losses import DINOLoss, koleo
from nearfar.ssl.settings.run import Run

Make = Callable[..., Run]


@pytest.fixture
def tiles() -> ArraySource:
    """40 images of 4 x 4 flat squares."""
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 256, (40, 4, 4, 3))
    return ArraySource(np.kron(squares, np.ones((1, 8, 8, 1))).astype(np.uint8), labels=np.arange(40) % 4)


def alarms(run: Run, images: ArraySource, quiet: Console) -> list[str]:
    train.pretrain(run, images, console=quiet)
    return [line for line in (run.path / "run.log").read_text().splitlines() if "ollapse" in line]


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(k, marks=pytest.mark.long) for k in (2, 3, 4))])
def test_healthy_runs_raise_no_alarm(tiny: Make, tiles: ArraySource, quiet: Console, seed: int) -> None:
    assert alarms(tiny(f"train.seed={seed}", "train.epochs=12"), tiles, quiet) == []


def test_a_teacher_that_is_too_warm_gives_the_flat_answer(tiny: Make, tiles: ArraySource, quiet: Console) -> None:
    warm = tiny("loss.teacher_temp=5", "loss.warmup_teacher_temp=5", "train.epochs=10")
    (message,) = alarms(warm, tiles, quiet)
    assert "uniform output" in message


def test_a_teacher_without_centering_gives_one_answer(
    tiny: Make, tiles: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DINOLoss, "update_center", lambda *_: None)
    uncentered = tiny(
        "loss.teacher_temp=0.02", "head.batch_norm=false", "optim.teacher_momentum=0.5", "train.epochs=10"
    )
    messages = alarms(uncentered, tiles, quiet)
    assert "one answer" in messages[0]


def test_a_rate_that_is_far_too_high_gives_one_answer(tiny: Make, tiles: ArraySource, quiet: Console) -> None:
    high = tiny("optim.lr=0.3", "optim.warmup_epochs=0", "head.batch_norm=false", "train.epochs=10")
    assert "Collapse to one answer: the teacher does not tell images apart" in alarms(high, tiles, quiet)[0]


def test_a_loss_that_pulls_features_together_gives_nearly_the_same_ones(
    tiny: Make, tiles: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nearfar.ssl.learning.dino.koleo", lambda features: -koleo(features))
    together = tiny("loss.koleo_weight=5", "optim.lr=0.003", "optim.teacher_momentum=0.5", "train.epochs=10")
    assert "Complete collapse: all images get nearly the same features" in alarms(together, tiles, quiet)[0]


def test_a_loss_that_leaves_one_direction_is_told_as_few_of_them(
    tiny: Make, tiles: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_line(features: Tensor) -> Tensor:
        along = F.normalize(features, dim=-1)[..., 0]
        return along.mean().square() - along.square().mean()

    monkeypatch.setattr("nearfar.ssl.learning.dino.koleo", on_a_line)
    plain = [
        "backbone.lgp=false",
        "backbone.gaug=false",
        "backbone.prr=false",
    ]  # whose features begin in more directions
    flat = tiny(*plain, "loss.koleo_weight=100", "optim.lr=0.01", "optim.teacher_momentum=0.5", "train.epochs=10")
    assert "Dimensional collapse: the features share few directions" in alarms(flat, tiles, quiet)[0]
