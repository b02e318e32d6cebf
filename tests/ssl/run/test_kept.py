"""Which checkpoints outlive train.keep_last, and finding one by its step or its score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nearfar.ssl import train
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.disk import checkpoint_names
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.errors import UserError
from nearfar.ssl.run import kept
from nearfar.ssl.settings.run import Run
from nearfar.ssl.training.base import Observers

Make = Callable[..., Run]


@dataclass
class Scores:
    """An online score that says what it is told to, at steps 4, 8, ..."""

    given: list[float]
    calls: list[Any] = field(default_factory=list)

    def __call__(self, *_: Any) -> dict[str, float]:
        self.calls.append(None)
        return {"knn_top1": self.given[len(self.calls) - 1]}


def steps_of(run: Path) -> list[int | None]:
    return [checkpoint_names.step_of(path) for path in checkpoint_names.finished(run / "checkpoints")]


def trained(run: Run, images: ArraySource, quiet: Console, scores: list[float]) -> None:
    assert train.pretrain(run, images, Observers(probe=Scores(scores)), console=quiet).finished


def test_what_is_kept_for_good_outlives_keep_last(tiny: Make, images: ArraySource, quiet: Console) -> None:
    run = tiny("train.keep_every=6", "train.keep_last=1", "train.save_every_steps=4")
    trained(run, images, quiet, [1.0] * 9)
    assert steps_of(run.path) == [6, 12, 18, 20]


@pytest.mark.parametrize("background", ["true", "false"])
def test_the_best_is_kept_until_there_is_a_better(
    tiny: Make, images: ArraySource, quiet: Console, background: str
) -> None:
    settings = "train.keep_best=true", "train.keep_last=1", "eval.knn_every_epochs=0.8"
    run = tiny(*settings, f"train.save_in_background={background}")
    trained(run, images, quiet, [30.0, 50.0, 40.0, 45.0, 50.0])  # at 4, 8, 12, 16, 20: the earlier of two equal ones
    assert [line["step"] for line in read_metrics(run.path / "metrics.jsonl") if "knn_top1" in line] == [
        4,
        8,
        12,
        16,
        20,
    ]
    assert steps_of(run.path) == [8, 20]
    assert kept.best_checkpoint(run.path) == run.path / "checkpoints" / "step-000000008"
    assert kept.checkpoint_of(run.path, "best") == kept.named(f"{run.path}@best") == kept.named(f"{run.path}@8")
    assert kept.named(str(run.path)).name == "step-000000020"


def test_a_stop_and_a_start_do_not_lose_the_best(tiny: Make, images: ArraySource, quiet: Console) -> None:
    run = tiny("train.keep_best=true", "train.keep_last=1", "eval.knn_every_epochs=0.8")
    count = iter(range(100))
    probe = Scores([30.0, 50.0, 40.0, 45.0, 20.0])
    train.pretrain(run, images, Observers(probe=probe), should_stop=lambda: next(count) == 13, console=quiet)
    assert steps_of(run.path) == [8, 14]
    assert train.pretrain(run, images, Observers(probe=probe), console=quiet).finished
    assert steps_of(run.path) == [8, 20]


def test_without_scores_there_is_no_best(tiny: Make, images: ArraySource, quiet: Console, tmp_path: Path) -> None:
    run = tiny("train.keep_best=true")
    train.pretrain(run, images, console=quiet)
    with pytest.raises(UserError, match=r"online k-NN score .* steps 20"):
        kept.checkpoint_of(run.path, "best")
    with pytest.raises(UserError, match=r"no checkpoint of step twelve.* steps 20"):
        kept.checkpoint_of(run.path, "twelve")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no checkpoints"):
        kept.named(str(tmp_path / "empty"))


def test_a_folder_with_an_at_sign_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "a@b" / "checkpoints" / "step-000000003").mkdir(parents=True)
    assert kept.named(str(tmp_path / "a@b")).name == "step-000000003"
    assert kept.named(f"{tmp_path / 'a@b'}@3").name == "step-000000003"
    assert kept.named(str(tmp_path / "a@b" / "checkpoints" / "step-000000003")).name == "step-000000003"
