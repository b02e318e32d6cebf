"""Combinations of settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from nearfar.launch.slurm import sweep
from nearfar.ssl import config
from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.run import Run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {epochs: 3}\n")
    return file


def runs_of(recipe: Path, settings: list[str], varied: list[str]) -> tuple[Path, list[Run]]:
    return sweep.runs(lambda more: config.load(recipe, [*settings, *more]), varied)


def test_every_combination_is_a_run_in_the_sweeps_folder(recipe: Path) -> None:
    folder, runs = runs_of(recipe, ["folder=/x y"], ["optim.lr=1e-4,5e-4", "backbone.lgp=true,false"])
    assert folder == Path("/x y/mine")
    assert [run.path.name for run in runs] == [
        "lr=1e-4_lgp=true", "lr=1e-4_lgp=false", "lr=5e-4_lgp=true", "lr=5e-4_lgp=false",
    ]  # fmt: skip
    assert {run.path.parent for run in runs} == {folder}
    assert [(run.optim.lr, run.backbone.lgp) for run in runs] == [
        (1e-4, True), (1e-4, False), (5e-4, True), (5e-4, False),
    ]  # fmt: skip


def test_values_may_be_lists_and_leaves_may_have_the_same_name(recipe: Path) -> None:
    assert sweep.split("[0.3, 1],[0.4, 1]") == ["[0.3, 1]", "[0.4, 1]"]
    _, runs = runs_of(recipe, [], ["views.global_crops_scale=[0.3,1],[0.4,1]", "train.seed=0,1"])
    assert runs[3].views.global_crops_scale == (0.4, 1.0) and runs[3].name == "global_crops_scale=0.4-1_seed=1"
    _, runs = runs_of(recipe, [], ["eval.size=32,64", "eval.resize=64,70"])
    assert runs[0].name == "size=32_resize=64"


def test_one_value_is_a_setting(recipe: Path) -> None:
    _, runs = runs_of(recipe, [], ["optim.lr=1e-4,5e-4", "train.epochs=7", "views.ratio=[0.7, 1.4]"])
    assert [run.name for run in runs] == ["lr=1e-4", "lr=5e-4"]
    assert all(run.train.epochs == 7 and run.views.ratio == (0.7, 1.4) for run in runs)
    assert sweep.split("(0.4, 1.0)") == ["(0.4, 1.0)"]
    with pytest.raises(UserError, match="no setting has two values"):
        runs_of(recipe, [], ["train.epochs=7"])


@pytest.mark.parametrize("wrong", ["optim.lr", "optim.lr=", "optim.lr=1,,2", "name=a,b", "optim.lr=1e-3,1e-3"])
def test_what_is_no_sweep_is_told(recipe: Path, wrong: str) -> None:
    with pytest.raises(UserError, match="--sweep"):
        runs_of(recipe, [], [wrong])
    with pytest.raises(UserError, match=r"did you mean optim\.lr"):
        runs_of(recipe, [], ["optim.lrr=1e-3,1e-4"])
