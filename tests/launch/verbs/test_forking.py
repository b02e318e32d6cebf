"""Which settings a fork takes over from its run, and which it derives anew."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nearfar.launch.verbs.forking import recipe_and_settings
from nearfar.ssl import config
from nearfar.ssl.settings.defaults import ResolvedOptim, resolve

CHECKPOINT = "runs/mine/checkpoints/step-000000600"


@pytest.fixture
def forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(what the run has, what `pretrain --from` it says) -> the optimizer's settings of the fork."""
    monkeypatch.chdir(tmp_path)
    Path(CHECKPOINT).mkdir(parents=True)

    def fork(begun: list[str], *settings: str) -> ResolvedOptim:
        run, _ = resolve(config.load(None, ["name=mine", "train.epochs=20", *begun]), 2_000)
        Path("runs/mine/config.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
        first, *rest = settings
        arguments = Namespace(recipe=first, settings=rest, start_from=CHECKPOINT)
        return resolve(config.load(*recipe_and_settings(arguments)), 2_000)[0].optim

    return fork


def test_a_cosine_keeps_its_ends(forked: Any) -> None:
    begun = ["optim.weight_decay_end=0.2", "optim.teacher_momentum_end=0.99"]
    for settings in (["train.epochs=40"], ["optim.schedule=cosine"], ["optim.lr=1e-4", "optim.weight_decay=0.1"]):
        optim = forked(begun, *settings)
        assert (optim.weight_decay_end, optim.teacher_momentum_end) == (0.2, 0.99), settings
    assert forked(begun, "optim.schedule=cosine", "optim.teacher_momentum_end=1").teacher_momentum_end == 1


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_without_a_cosine_the_ends_are_the_starts(forked: Any, schedule: str) -> None:
    optim = forked([f"optim.schedule={schedule}"], "optim.teacher_momentum=0.99", "optim.weight_decay=0.1")
    assert optim.teacher_momentum == optim.teacher_momentum_end == 0.99
    assert optim.weight_decay == optim.weight_decay_end == 0.1
    ends = ["optim.weight_decay_end=0.2", "optim.teacher_momentum_end=1"]
    optim = forked(ends, f"optim.schedule={schedule}")
    assert (optim.teacher_momentum_end, optim.weight_decay_end) == (optim.teacher_momentum, optim.weight_decay)


def test_another_schedule_has_ends_and_a_cooldown_of_its_own(forked: Any) -> None:
    optim = forked(["optim.schedule=constant", "optim.teacher_momentum=0.97"], "optim.schedule=cosine")
    assert (optim.teacher_momentum_end, optim.weight_decay_end) == (0.97, 0.4)
    assert forked(["optim.schedule=wsd"], "optim.schedule=constant").cooldown_epochs is None
    assert forked(["optim.schedule=wsd", "optim.cooldown_epochs=3"], "optim.schedule=wsd").cooldown_epochs == 3
