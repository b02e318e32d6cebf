"""`nearfar VERB --dry-run`: the settings, sizes and costs of a run that is not begun."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from nearfar.launch import cli
from nearfar.launch.verbs.dry_run import dry_run
from nearfar.ssl import config
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.classifier import build_classifier_learner
from nearfar.ssl.learning.dino import build_dino_learner
from nearfar.ssl.settings import finetune_settings
from nearfar.ssl.settings.defaults import resolve
from nearfar.ssl.settings.finetune_settings import FinetuneRun
from nearfar.ssl.settings.run import DataSettings, Run

SETTINGS = [
    "name=dry", "data.path=pictures", "data.workers=0", "views.global_crops_size=16", "views.local_crops_size=8",
    "views.local_crops_number=2", "backbone.name=vit_tiny_patch8", "backbone.embed_dim=24", "backbone.depth=1",
    "backbone.num_heads=2", "head.prototypes=20", "head.hidden_dim=16", "head.bottleneck_dim=8", "train.epochs=3",
    "train.batch_size=4", "train.world_size=1", "train.threads=1", "train.device=cpu", "train.precision=fp32",
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for k in range(21):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "pictures" / f"{k}.png")
    return config.load(None, SETTINGS)


def output_of(run: Run | FinetuneRun) -> str:
    out = io.StringIO()
    dry_run(run, Console(file=out, width=200))
    return out.getvalue()


def test_it_tells_settings_with_reasons_sizes_and_estimates_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.rglob("*"))
    text = output_of(run)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    resolved, derived = resolve(run, 21, 1)
    for key, value, why in derived:
        if key not in ("data.workers", "train.threads"):
            shown = str(value).lower() if isinstance(value, bool) else value
            assert f"  {key}={shown}  (" in text and why in text
    network = build_dino_learner(resolved).student
    for name, module in (("Backbone", network.backbone), ("Head", network.head)):
        count = sum(parameter.numel() for parameter in module.parameters())
        assert f"{count / 1e6:.2f} M parameters" in next(line for line in text.splitlines() if line.startswith(name))
    assert "15: 3 epochs of 5 steps with 4 images each, on 1 process" in text
    assert " timed steps on the first images:\nTime  " in text
    assert "k-NN       none during training" in text and "Nothing was trained or written" in text


def test_what_it_prints_may_be_typed_again(run: Run) -> None:
    lines = output_of(run).partition("Backbone ")[0].splitlines()[1:]
    typed = [line.strip().partition("  (")[0] for line in lines if "=" in line]
    assert resolve(config.load(None, typed), 21, 1)[1] == []


CLASSES = [
    "name=dry", "data.path=classes", "data.val=others", "data.workers=0", "augment.size=16", "classifier.mixup=0.8",
    "backbone.name=vit_tiny_patch8", "backbone.embed_dim=24", "backbone.depth=1", "backbone.num_heads=2",
    "train.epochs=3", "train.batch_size=4", "train.world_size=1", "train.threads=1", "train.device=cpu",
    "train.precision=fp32",
]  # fmt: skip


@pytest.fixture
def labeled(run: Run, tmp_path: Path) -> Path:
    for k in range(0, 21):
        file = tmp_path / "classes" / ("cat", "dog", "owl")[k % 3] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / f"{k}.png").rename(file)
    for name in ("cat", "dog"):
        (tmp_path / "others" / name).mkdir(parents=True)
        first = min((tmp_path / "classes" / name).iterdir())
        shutil.copy(first, tmp_path / "others" / name)
    return tmp_path


def test_of_finetuning_it_tells_the_same_and_writes_nothing(labeled: Path) -> None:
    before = sorted(labeled.rglob("*"))
    run = finetune_settings.load(None, CLASSES)
    text = output_of(run)
    assert sorted(labeled.rglob("*")) == before
    resolved, derived = finetune_settings.resolve_finetune(run, 21)
    for key, value, why in derived:
        assert f"  {key}={value}  (" in text and why in text
    network = build_classifier_learner(resolved, ["cat", "dog", "owl"]).student
    backbone, head = (
        sum(parameter.numel() for parameter in module.parameters()) for module in (network.backbone, network.head)
    )
    assert f"Backbone   {backbone / 1e6:.2f} M parameters" in text
    assert f"Head       {head / 1e6:.2f} M parameters, linear, 3 classes: cat, dog, owl" in text
    assert "15: 3 epochs of 5 steps with 4 images each, on 1 process" in text and "Score      none" not in text
    assert " timed steps on the first images:\nTime  " in text and "Nothing was trained or written" in text
    assert "Score      none" in output_of(finetune_settings.load(None, [*CLASSES, "data.val="]))


def test_of_finetuning_it_refuses_what_the_run_would(labeled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (labeled / "mine.yaml").touch()
    (labeled / "flat").mkdir()
    (labeled / "classes" / "cat" / "0.png").rename(labeled / "flat" / "0.png")
    for wrong, message in (("data.path=flat", "have no labels"), ("data.val=flat", "have no labels")):
        assert cli.main(["finetune", "mine.yaml", *CLASSES, wrong, "--dry-run"]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (labeled / "runs").exists()


def test_it_refuses_what_pretrain_would(run: Run) -> None:
    with pytest.raises(UserError, match=r"data\.path is not set"):
        output_of(run.model_copy(update={"data": DataSettings()}))
