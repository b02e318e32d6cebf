"""The `nearfar` command: exit codes, one paragraph for a mistake, runs that stop and continue."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from nearfar.launch import cli
from nearfar.launch.recipes import SUPERVISED, find_recipe
from nearfar.ssl import checkpoint, config
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.run.run_folder import RunFolder
from nearfar.ssl.settings import finetune_settings
from nearfar.ssl.settings.listing import all_settings

STEPS = 25

Refused = Callable[..., str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_recipe: Callable[..., dict[str, Any]]) -> Path:
    """A folder to work in, with pictures/ (two classes of 20) and mine.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    rng = np.random.default_rng(0)
    for k in range(40):
        file = tmp_path / "pictures" / ("cat", "dog")[k % 2] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(file)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tiny_recipe(epochs=5)))
    return tmp_path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must fail as a user's mistake; the paragraph it tells."""

    def run(*argv: str) -> str:
        capsys.readouterr()
        assert cli.main(argv) == 2
        message = capsys.readouterr().err
        assert message.startswith("nearfar: ") and message.count("\n") == 1 and "Traceback" not in message
        return message

    return run


PRETRAIN = ("pretrain", "mine.yaml", "data.path=pictures")


# Mistakes


def test_settings_are_checked_before_anything_is_touched(here: Path, refused: Refused) -> None:
    message = refused(*PRETRAIN, "train.epoch=3", "views.global_crops_size=33", "optim.lr=-1")
    for part in ("3 mistakes", "did you mean train.epochs?", "not a multiple of the patch size 8", "optim.lr=-1"):
        assert part in message
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("nowhere", ["nowhere"]),
        ("empty", ["empty"]),
        ("texts", ["texts"]),
        ("pictures.npz", ["pictures.npz"]),
        ("", ["data.path is not set"]),
    ],
)
def test_data_that_is_none(here: Path, refused: Refused, path: str, parts: list[str]) -> None:
    (here / "empty").mkdir()
    (here / "texts").mkdir()
    (here / "texts" / "a.txt").write_text("a")
    (here / "pictures.npz").write_bytes(b"no zip file")
    message = refused("pretrain", "mine.yaml", *([f"data.path={path}"] if path else []))
    assert all(word in message for word in parts)
    assert not (here / "runs").exists()


def test_validation_data_that_is_none(here: Path, refused: Refused) -> None:
    assert "nowhere" in refused(*PRETRAIN, "data.val=nowhere")


def test_recipes_that_are_none(here: Path, refused: Refused) -> None:
    message = refused("pretrain", "cifar100")
    assert "There is no recipe cifar100" in message and "demo" in message
    assert "'statsu', and it is no recipe; did you mean status?" in refused("launch", "statsu", "runs/mine")
    assert "There is no recipe missing.yaml" in refused("pretrain", "missing.yaml")
    assert "the recipe comes before the settings" in refused("pretrain", "train.epochs=3")
    assert "cannot be read" in refused("pretrain", "pictures/cat/0.png")
    (here / "list.yaml").write_text("- 1\n")
    assert "must hold sections" in refused("pretrain", "list.yaml")


def test_a_backbone_that_is_none_may_be_corrected(here: Path, refused: Refused) -> None:
    assert "Did you mean" in refused(*PRETRAIN, "backbone.name=vit_tinny_patch8")
    assert "timm/resnet18 cannot take embed_dim" in refused(*PRETRAIN, "backbone.name=timm/resnet18")
    message = refused(*PRETRAIN, "train.batch_size=64")
    assert "40 images cannot fill one batch of 64" in message
    assert cli.main([*PRETRAIN, "train.epochs=1"]) == 0


def test_a_run_of_other_settings_and_a_folder_in_use(here: Path, refused: Refused) -> None:
    assert cli.main([*PRETRAIN, "train.epochs=1"]) == 0
    assert "train.seed: 0 -> 1" in refused(*PRETRAIN, "train.epochs=1", "train.seed=1")
    assert "train.epochs cannot be raised from 1 to 5" in refused(*PRETRAIN)
    with RunFolder(Path("runs/mine")):
        assert "runs/mine is in use by process" in refused(*PRETRAIN, "train.epochs=1")


def test_a_fork_has_the_settings_of_the_run_that_it_left(here: Path, refused: Refused) -> None:
    assert cli.main([*PRETRAIN, "train.epochs=1"]) == 0
    assert "runs/mine has no checkpoint of step 99" in refused("pretrain", "--from", "runs/mine@99", "name=a")
    assert "There is no run folder nowhere" in refused("pretrain", "--from", "nowhere", "name=a")
    assert not (here / "runs" / "a").exists()
    assert cli.main(["pretrain", "--from", "runs/mine", "optim.lr=1e-4", "train.epochs=2"]) == 0
    fork, mine = (config.load(Path(f"runs/{name}/config.yaml")) for name in ("mine-fork", "mine"))
    assert (fork.optim.lr, fork.train.epochs, fork.head) == (1e-4, 2, mine.head)
    assert (
        cli.main(["pretrain", "--from", "runs/mine", "optim.schedule=constant", "train.epochs=2", "name=constant"]) == 0
    )
    optim = config.load(Path("runs/constant/config.yaml")).optim
    assert optim.teacher_momentum_end == optim.teacher_momentum and optim.weight_decay_end == optim.weight_decay
    larger = ["views.global_crops_size=48", "train.restart_schedule=true", "name=larger"]
    assert cli.main(["launch", "--cluster", "debug", larger[0], "--from", "runs/mine-fork", *larger[1:]]) == 0
    stage = config.load(Path("runs/larger/config.yaml"))
    assert (stage.eval.size, stage.backbone.img_size) == (48, mine.views.global_crops_size)
    assert cli.main(["report", "runs/larger"]) == 0
    page = Path("runs/larger/report.html").read_text()
    assert "runs/mine-fork, step " in page and "runs/mine, step " in page


def test_a_fork_of_a_run_from_before_there_was_an_end_of_the_momentum(here: Path) -> None:
    assert cli.main([*PRETRAIN, "train.epochs=1"]) == 0
    file = Path("runs/mine/config.yaml")
    written, ending = file.read_text(), r"teacher_momentum_end: [\d.]+,\s+"
    assert config.load(file).optim.teacher_momentum_end == 0.98
    file.write_text(re.sub(ending, "", written))
    assert config.load(file).optim.teacher_momentum_end is None
    assert cli.main(["pretrain", "--from", "runs/mine", "train.epochs=2"]) == 0
    assert config.load(Path("runs/mine-fork/config.yaml")).optim.teacher_momentum_end == 1


def test_no_space_left_is_told_with_the_checkpoint_before_intact(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    child = os.fork()
    if child == 0:
        writes = iter(range(99))
        save_file = checkpoint.save_file

        def fails_later(*arguments: object) -> None:
            if next(writes) >= 4:  # two checkpoints, each with its export
                raise OSError(28, "No space left on device")
            save_file(*arguments)

        checkpoint.save_file = fails_later  # type: ignore[assignment]
        os._exit(cli.main([*PRETRAIN, "train.save_every_steps=5"]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    message = capfd.readouterr().err
    assert "No space left on device" in message and "step-000000010 is intact" in message
    assert cli.main(list(PRETRAIN)) == 0
    assert "Continuing from step 10 of 25." in Path("runs/mine/run.log").read_text()


def test_no_space_left_between_two_checkpoints_is_told_too(here: Path, refused: Refused) -> None:
    (here / "runs" / "mine").mkdir(parents=True)
    (here / "runs" / "mine" / "run.log").symlink_to("/dev/full")
    assert "No space left on the disk. Checkpoints saved before are intact" in refused(*PRETRAIN)


@pytest.mark.parametrize("argv", [[], ["pretrian"], ["pretrain"], ["eval", "color", "x"]])
def test_what_is_no_command_is_answered_with_the_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2 and "usage: nearfar" in capsys.readouterr().err


def test_a_model_that_is_none(here: Path, refused: Refused) -> None:
    assert "nowhere does not exist" in refused("export", "nowhere", "out.safetensors")


# Help and recipes


def test_help_lists_every_setting_with_default_and_meaning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    with pytest.raises(SystemExit) as caught:
        cli.main(["pretrain", "--help"])
    output = capsys.readouterr().out
    assert caught.value.code == 0
    for setting in all_settings():
        default = f"  {setting.typed}" if setting.default is None else f"={setting.typed}"
        assert f"  {setting.key}{default}\n" in output
        assert setting.description in " ".join(output.split())
    assert "demo" in output


@pytest.mark.parametrize("verb", ["", "demo", "pretrain", "features", "eval", "export", "report"])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"] if verb else ["--help"])
    assert caught.value.code == 0 and capsys.readouterr().out.startswith(f"usage: nearfar {verb}".rstrip() + " ")


def test_bundled_recipes_are_found_by_name_and_are_right() -> None:
    folder = Path(__file__).resolve().parents[2] / "recipes"
    names = {file.stem for file in folder.glob("*.yaml")}
    assert "demo" in names
    for name in names:
        supervised = name.startswith(SUPERVISED)
        file = find_recipe(name, supervised)
        assert file.samefile(folder / f"{name}.yaml")
        assert (finetune_settings if supervised else config).load(file).name == name


def test_a_file_of_that_name_beside_you_is_meant_by_its_suffix(here: Path) -> None:
    (here / "demo.yaml").write_text("train: {epochs: 3}\n")
    assert config.load(find_recipe("demo.yaml")).train.epochs == 3
    assert config.load(find_recipe("demo")).train.epochs != 3


# Runs


def test_a_run_with_its_pictures_scores_and_export(
    here: Path, capsys: pytest.CaptureFixture[str], same_bits: Callable[..., None]
) -> None:
    assert cli.main([*PRETRAIN, "data.val=pictures", "eval.knn_every_epochs=2"]) == 0
    run = here / "runs" / "mine"
    assert Image.open(run / "views.png").size[0] > 64
    scored = [line for line in read_metrics(run / "metrics.jsonl") if "knn_top1" in line]
    assert [line["step"] for line in scored] == [10, 20, 25] and all(0 <= line["knn_top1"] <= 100 for line in scored)
    output = capsys.readouterr().out
    assert "derived optim.lr = " in output and "25/25" in output

    assert cli.main(["export", "runs/mine", "out.safetensors"]) == 0
    same_bits(checkpoint.load(here / "out.safetensors").state_dict(), checkpoint.load(run).state_dict())

    before = (run / "metrics.jsonl").read_bytes()
    assert cli.main([*PRETRAIN, "data.val=pictures", "eval.knn_every_epochs=2"]) == 0
    output = capsys.readouterr().out
    assert "already finished" in output and "Next: `nearfar eval all" in output.splitlines()[-1]
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("sent", "workers"), [(signal.SIGTERM, 2), (signal.SIGINT, 0)])
def test_a_signal_saves_and_ends_with_0_and_the_same_command_continues(
    here: Path, sent: signal.Signals, workers: int, same_runs: Callable[[Path, Path, int], None]
) -> None:
    """The real command in a process of its own; Ctrl-C reaches its whole process group, as in a terminal."""
    command = [str(Path(sys.executable).with_name("nearfar")), *PRETRAIN, f"data.workers={workers}"]
    metrics = here / "runs" / "mine" / "metrics.jsonl"
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    until = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3) and time.monotonic() < until:
        assert child.poll() is None, child.communicate()
        time.sleep(0.005)
    os.killpg(child.pid, sent)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert "Traceback" not in err
    stopped = len(read_metrics(metrics))
    assert 3 <= stopped < STEPS
    assert f"Stopped after step {stopped} of 25. The same command continues from here." in out
    assert (here / "runs" / "mine" / "checkpoints" / f"step-{stopped:09d}").is_dir()
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)  # no worker is left

    assert cli.main(PRETRAIN) == 0
    assert cli.main([*PRETRAIN, "folder=reference"]) == 0
    same_runs(here / "runs" / "mine", here / "reference" / "mine", STEPS)
