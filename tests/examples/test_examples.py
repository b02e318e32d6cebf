"""The examples run as they are written, and what they print is right."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nearfar.launch import cli
from nearfar.ssl import config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

SMALL = [
    "views.global_crops_size=32", "views.local_crops_size=16", "views.local_crops_number=2",
    "backbone.name=vit_tiny_patch8", "backbone.embed_dim=24", "backbone.depth=1", "backbone.num_heads=2",
    "head.prototypes=16", "head.hidden_dim=16", "head.bottleneck_dim=8", "train.epochs=1", "train.batch_size=6",
    "train.world_size=1", "train.device=cpu", "train.precision=fp32", "train.threads=1", "data.workers=0",
]  # fmt: skip


def run(name: str, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images of 32x32 in 2 class folders: dark noise and bright noise."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(12):
        low, file = (0, 128)[i % 2], folder / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(low, low + 128, (32, 32, 3), np.uint8)).save(file)
    return folder


@pytest.fixture(scope="module")
def runs(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the first example made its run."""
    folder = tmp_path_factory.mktemp("runs")
    run("pretrain_folder.py", pictures, f"folder={folder}", *SMALL)
    return folder


def test_every_example_is_tested() -> None:
    here = Path(__file__).read_text()
    assert all(f'"{file.name}"' in here for file in EXAMPLES.glob("*.py"))


def test_pretrain_on_a_folder(pictures: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("pretrain_folder.py", pictures, f"folder={runs}", *SMALL)  # the same call again: it finds itself finished
    out = capsys.readouterr().out
    assert "step 2 of 2" in out
    assert "CLS (1, 24), patch map (1, 24, 4, 4)" in out
    assert config.load(runs / "example" / "config.yaml").backbone.lgp  # the example's own settings held


def test_knn_on_saved_features(pictures: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        assert cli.main(["features", str(runs / "example"), str(pictures), str(tmp_path / part)]) == 0
    run("knn_on_features.py", tmp_path / "train", tmp_path / "val")
    assert "1-NN: 100.0 % of 12 images" in capsys.readouterr().out  # every image finds itself


def test_knn_without_labels_says_so(
    pictures: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["features", str(runs / "example"), str(pictures / "a"), str(tmp_path / "flat")]) == 0
    with pytest.raises(SystemExit, match="2"):
        run("knn_on_features.py", tmp_path / "flat", tmp_path / "flat")
    assert "must hold labels" in capsys.readouterr().err


def test_the_ideas_on_a_timm_model(capsys: pytest.CaptureFixture[str]) -> None:
    run("ideas_on_timm.py")
    out = capsys.readouterr().out
    assert "add_gaug: +2,340 parameters" in out  # 12 layers of 3 (64 + 1)
    assert "add_prr: +0 parameters" in out
    assert "features (2, 197, 192); gone: pos_embed" in out
