"""Command lines: answered without heavy imports, and every wrong word with the nearest right one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nearfar.launch import cli
from nearfar.launch.verbs import command_line, paths
from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.listing import KEYS
from nearfar.ssl.settings.run import Run

LIGHT = {"torch", "torchvision", "timm", "numpy", "matplotlib", "safetensors", "submitit", "PIL", "sklearn", "numba"}


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["pretrain", "--help"],
        ["launch", "--help"],
        ["pretrian"],
        ["pretrain"],
        ["pretrain", "demo", "--epochs", "3"],
        ["pretrain", "demo", "train.epoch=3"],
        ["pretrain", "nosuch"],
        ["pretrain", "cifar10", "data.path="],
        ["eval", "lienar", "x"],
        ["launch", "demo", "--cpu", "--dry-run", "train.epoch=3"],
        ["eval", "knn", "runs/nowhere"],
        ["features", "runs/nowhere", "images", "out"],
        ["report", "runs/nowhere"],
        ["eval", "knn", "README.md"],
        ["eval", "knn", "docs", "--val", "nowhere"],
        ["pretrain", "cifar10", "data.path=nowhere"],
        ["pretrain", "cifar10", "data.path=docs", "data.val=nowhere"],
        ["pretrain", "cifar10", "data.path=docs", "backbone.weights=nowhere"],
        ["pretrain", "--from", "nowhere", "name=x"],
        ["pretrain", "cifar10", "--from", "nowhere", "name=x", "data.path=docs"],
        ["distill", "vit_tiny_patch16", "distill.teacher_weights=nowhere", "data.path=docs"],
        ["adapt", "nowhere", "docs"],
        ["adapt", "docs", "nowhere"],
        ["distill", "nowhere", "data.path=docs"],
        ["finetune", "finetune_cifar10", "--from", "nowhere", "data.path=docs"],
        ["predict", "docs", "nowhere", "--csv", "x.csv"],
        ["replay", "nowhere"],
        ["data", "beton", "nowhere", "x.beton"],
        ["data", "info", "nowhere"],
        ["data", "look", "docs", "--weights", "nowhere"],
        ["launch", "cifar10", "data.path=docs", "--dry-run"],
        ["launch", "cifar10", "data.path=nowhere", "--gpus-per-node", "1", "--dry-run"],
    ],
)
def test_help_and_mistakes_load_none_of_the_slow_packages(argv: list[str]) -> None:
    code = (
        "import sys\nfrom nearfar.launch.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=120, check=True)
    loaded, output = set(done.stdout.rpartition("LOADED")[2].split()), " ".join(done.stderr.split())
    if "nowhere" in " ".join(argv):
        assert re.search("nowhere.* does not exist|There is (nothing at|no run folder|no teacher) .*nowhere", output)
    assert "argparse" in loaded and not loaded & LIGHT
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["adapt", "WEIGHTS", "nowhere"], True),
        (["launch", "adapt", "WEIGHTS", "nowhere", "--gpus-per-node", "1"], False),  # a node's set-up may bring them
        (["launch", "adapt", "nowhere", "docs", "--gpus-per-node", "1"], True),
        (["eval", "knn", "WEIGHTS"], False),
        (["eval", "knn", "TEXT"], True),
        (["adapt", "TEXT", "FOLDER"], False),  # anyone's file, which its own reader judges
        (["pretrain", "cifar10", "train.epochs=3"], False),
    ],
)
def test_paths_of_a_command_line_are_looked_at(tmp_path: Path, words: list[str], refused: bool) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "blob")  # whatever its name ends in
    (tmp_path / "notes.txt").write_text("no weights at all")
    given = {"WEIGHTS": str(tmp_path / "blob"), "TEXT": str(tmp_path / "notes.txt"), "FOLDER": str(tmp_path)}
    arguments = cli.parsed([given.get(word, word) for word in words])
    if refused:
        with pytest.raises(UserError, match=r"nowhere|notes\.txt"):
            paths.require_paths(arguments)
    else:
        paths.require_paths(arguments)


@pytest.mark.parametrize(
    ("given", "turns"), [({}, cli.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_waiting_threads_leave_their_core_to_others_unless_the_user_says_how_they_wait(
    given: dict[str, str], turns: str | None
) -> None:
    code = (
        "import os\nfrom nearfar.launch.cli import main\ntry: main(['--version'])\nexcept SystemExit: pass\n"
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(turns)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pretrian"], "There is no verb 'pretrian'; did you mean pretrain?"),
        (["evl", "all"], "did you mean eval?"),
        (["--epochs", "3"], "The verb comes first: write `nearfar VERB ...`, then --epochs. There are demo, pretrain,"),
        (["--epochs", "3", "pretrain", "x.yaml"], "The verb comes first: write `nearfar pretrain ...`"),
        (["xyzzy"], "there are demo, pretrain, adapt"),
        (["mine.yaml"], "`nearfar pretrain mine.yaml`"),
        (["cifar10"], "`nearfar pretrain cifar10`"),
        (["train.epochs=3"], "`nearfar pretrain RECIPE train.epochs=3`"),
        (["pretrain", "demo", "--epochs", "3"], "the setting is written train.epochs=3"),
        (["pretrain", "demo", "--epochs=3"], "the setting is written train.epochs=3"),
        (["pretrain", "--lr", "1e-3", "demo", "train.seed=1"], "the setting is written optim.lr=1e-3"),
        (["pretrain", "demo", "--batch-size"], "the setting is written train.batch_size=VALUE"),
        (["demo", "--epochs", "3"], "the setting is written train.epochs=3"),
        (["launch", "demo", "--epochs", "3"], "the setting is written train.epochs=3"),
        (["pretrain", "demo", "-x"], "-x is not a flag of `nearfar pretrain`."),
        (["export", "a", "b", "c"], "'c' is not expected by `nearfar export`"),
        (["export"], "model and out are missing"),
        (
            ["eval", "lienar", "x"],
            "position, all; did you mean linear?",
        ),
        (["features", "a", "b", "c", "--device", "gpu"], "'gpu' is not one of auto, cpu, cuda; did you mean cuda?"),
        (["launch", "demo", "--cluster", "slrum"], "did you mean slurm?"),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_one(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    output = capsys.readouterr()
    assert caught.value.code == 2 and message in output.err and output.out == ""


@pytest.mark.parametrize(
    "argv",
    [
        ["pretrain", "demo", "train.epochs=3", "--dry-run"],
        ["pretrain", "demo", "--dry-run", "train.epochs=3"],
        ["pretrain", "--dry-run", "demo", "train.epochs=3"],
    ],
)
def test_settings_may_stand_on_either_side_of_a_flag(argv: list[str]) -> None:
    arguments = cli.parsed(argv)
    assert (arguments.recipe, arguments.settings, arguments.dry_run) == ("demo", ["train.epochs=3"], True)


def test_the_verbs_are_those_of_the_parser() -> None:
    help_text = cli.build_parser().format_help()
    assert re.findall(r"^    (\w+) ", help_text, re.MULTILINE) == list(cli.VERBS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    output = capsys.readouterr().out
    assert caught.value.code == 0 and output.startswith(f"nearfar {version('nearfar')} (torch {version('torch')}, ")


@pytest.mark.parametrize("width", [40, 80, 150])
def test_the_settings_fit_the_terminal(width: int) -> None:
    lines = command_line.settings_help(width, Run).splitlines()
    assert all(len(line) < width for line in lines if not line.strip().startswith(tuple(KEYS)))
