"""The examples run as they are written, and what they print is right."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nearfar.eval.store import FeatureStore
from nearfar.ssl import config
from nearfar.ssl.backbones import create
from nearfar.ssl.data.sources.files import open_source

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """12 images of 32x32 in 2 class folders: dark noise and bright noise."""
    rng = np.random.default_rng(0)
    for i in range(12):
        low, file = (0, 128)[i % 2], tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(low, low + 128, (32, 32, 3), np.uint8)).save(file)
    return tmp_path / "pictures"


def test_every_example_is_tested() -> None:
    here = Path(__file__).read_text()
    assert all(f'"{file.name}"' in here for file in EXAMPLES.glob("*.py"))


def test_pretrain_on_a_folder(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        f"folder={tmp_path}", "views.global_crops_size=32", "views.local_crops_size=16", "views.local_crops_number=2",
        "backbone.name=vit_tiny_patch8", "backbone.embed_dim=24", "backbone.depth=1", "backbone.num_heads=2",
        "head.prototypes=16", "head.hidden_dim=16", "head.bottleneck_dim=8", "train.epochs=1", "train.batch_size=6",
        "train.world_size=1", "train.device=cpu", "train.precision=fp32", "train.threads=1", "data.workers=0",
    ]  # fmt: skip
    out = run("pretrain_folder.py", pictures, *settings, monkeypatch=monkeypatch, capsys=capsys)
    assert "step 2 of 2" in out
    assert "CLS (1, 24), patch map (1, 24, 4, 4)" in out
    assert config.load(tmp_path / "example" / "config.yaml").backbone.lgp  # the example's own settings held


def test_knn_on_saved_features(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    backbone = create("vit_tiny_patch8", img_size=32, embed_dim=24, depth=1, num_heads=2).eval()
    for part in ("train", "val"):
        FeatureStore.write(tmp_path / part, backbone, open_source(pictures), size=32)
    out = run("knn_on_features.py", tmp_path / "train", tmp_path / "val", monkeypatch=monkeypatch, capsys=capsys)
    assert "1-NN: 100.0 % of 12 images" in out  # every image finds itself


def test_knn_without_labels_says_so(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = create("vit_tiny_patch8", img_size=32, embed_dim=24, depth=1, num_heads=2).eval()
    FeatureStore.write(tmp_path / "flat", backbone, open_source(pictures / "a"), size=32)
    with pytest.raises(SystemExit, match="2"):
        run("knn_on_features.py", tmp_path / "flat", tmp_path / "flat", monkeypatch=monkeypatch, capsys=capsys)
    assert "must hold labels" in capsys.readouterr().err


def test_the_ideas_on_a_timm_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("ideas_on_timm.py", monkeypatch=monkeypatch, capsys=capsys)
    assert "add_gaug: +2,340 parameters" in out  # 12 layers of 3 (64 + 1)
    assert "add_prr: +0 parameters" in out
    assert "features (2, 197, 192); gone: pos_embed" in out
