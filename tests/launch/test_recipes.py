"""Recipes for clusters: they resolve, say that nobody here ran them, and their commands are right."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nearfar.launch.cli import build_parser, main
from nearfar.launch.recipes import find_recipe
from nearfar.ssl import config
from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.defaults import resolve

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
CLUSTER = {file.stem: file for file in FOLDER.glob("*.yaml") if re.match(r"imagenet1|dinov", file.stem)}
IMAGES = {"imagenet1k": 1_281_167, "imagenet100": 126_689, "dinov2": 1_281_167}


def test_they_are_all_here() -> None:
    hundred = {f"imagenet100_{kind}_{size}" for kind in ("vit", "vim") for size in ("tiny", "small")}
    assert set(CLUSTER) == hundred | {"imagenet1k_vit_small", "dinov2_vit_small"}


@pytest.mark.parametrize("name", sorted(CLUSTER))
def test_a_cluster_recipe_resolves_and_says_that_it_was_not_run(name: str) -> None:
    text = CLUSTER[name].read_text()
    assert "NOT RUN BY US" in text
    images = IMAGES[name.partition("_")[0]]
    commands = re.findall(r"^#   nearfar (launch .*)$", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        parsed = build_parser().parse_args(shlex.split(command))
        settings = list(parsed.settings)
        run, derived = resolve(config.load(CLUSTER[name], settings), images, 8, world_size=8)
        assert run.train.batch_size in (512, 1024, 2048) and run.head.prototypes == 65536
        decided = {"optim.lr"} if "dinov2" not in name else set()
        published = {"optim.teacher_momentum", "optim.warmup_epochs", "loss.teacher_temp", "head.batch_norm"}
        assert decided <= {each.key for each in derived} and not published & {each.key for each in derived}


@pytest.mark.parametrize("name", sorted(CLUSTER))
def test_a_cluster_recipe_takes_another_schedule_and_has_the_published_end_of_the_momentum(name: str) -> None:
    images = IMAGES[name.partition("_")[0]]
    assert resolve(config.load(CLUSTER[name]), images, 8, world_size=8)[0].optim.teacher_momentum_end == 1
    own_end = ["optim.weight_decay_end=0.04"] if "dinov2" in name else []
    for other in ("optim.schedule=wsd", "loss.recipe=dinov3"):
        settings = [other, *own_end]
        optim = resolve(config.load(CLUSTER[name], settings), images)[0].optim
        assert optim.schedule != "cosine" and optim.teacher_momentum_end == optim.teacher_momentum


def test_published_rates() -> None:
    def lr(name: str, *settings: str) -> float:
        return resolve(config.load(CLUSTER[name], settings), 1_281_167)[0].optim.lr

    assert lr("imagenet1k_vit_small") == pytest.approx(5e-4 * 512 / 256)
    assert lr("imagenet1k_vit_small", "train.batch_size=1024") == pytest.approx(5e-4 * 1024 / 256)
    assert lr("dinov2_vit_small") == pytest.approx(4e-3 * (2048 / 1024) ** 0.5, rel=1e-3)


def test_what_is_no_recipe_is_told_with_what_was_meant(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("train: {epochs: 2}\n")
    with pytest.raises(UserError, match=r"There is no recipe .*my\.yml\. Did you mean .*my\.yaml\?"):
        find_recipe(str(tmp_path / "my.yml"))
    with pytest.raises(UserError, match=r"Did you mean .*my\.yaml\?"):
        find_recipe(str(tmp_path / "my"))
    with pytest.raises(UserError, match="is a folder, and a recipe is a file") as caught:
        find_recipe(str(tmp_path))
    assert "Did you mean" not in str(caught.value)
    with pytest.raises(UserError, match="Did you mean imagenette"):
        find_recipe("imagenete")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "finetune_cifar10"], "write nearfar finetune finetune_cifar10 ..."),
        (["finetune", "cifar10"], "write nearfar pretrain cifar10 ..."),
        (["pretrain", "classes.yaml"], "has the section classifier"),
        (["distill", "runs/mine", "--recipe", "classes.yaml"], "write nearfar finetune classes.yaml ..."),
        (["finetune", "views.yaml"], "has the section views"),
        (["finetune", "both.yaml"], "views is unknown"),  # of neither kind: what is wrong is told one by one
    ],
)
def test_a_recipe_of_the_other_kind_is_told_with_its_command(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    written = {"classes": "classifier", "views": "views", "both": "augment: {}\nviews"}
    for name, section in written.items():
        (tmp_path / f"{name}.yaml").write_text(f"{section}: {{}}\ntrain: {{epochs: 3}}\n")
    assert main([*arguments, "data.path=pictures"]) == 2
    error = capsys.readouterr().err
    assert message.lower() in error.lower() and error.startswith("nearfar: ") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
