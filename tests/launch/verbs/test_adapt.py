"""`nearfar adapt`: whose weights they are, what it trains and keeps, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from nearfar.launch import cli
from nearfar.launch.verbs.adapt import settings_for
from nearfar.ssl import checkpoint, config
from nearfar.ssl.backbones import create
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.run.run_folder import START


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_recipe: Callable[..., dict[str, Any]]) -> Path:
    """old/ and new/ (two classes of 20 each), and a run on the old ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    rng = np.random.default_rng(0)
    for k in range(80):
        file = tmp_path / ("old", "new")[k // 40] / ("cat", "dog")[k % 2] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(file)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tiny_recipe(epochs=1)))
    assert cli.main(["pretrain", "mine.yaml", "data.path=old"]) == 0
    return tmp_path


# Small, as the run in `here`; all else is as `nearfar adapt` has it.
SMALL = (
    "data.val=new", "data.workers=0", "views.local_crops_number=2", "head.prototypes=20", "head.hidden_dim=16",
    "head.bottleneck_dim=8", "train.epochs=2", "train.batch_size=8", "train.device=cpu", "train.log_every_steps=1",
    "train.world_size=1", "train.threads=1", "eval.knn_every_epochs=1",
)  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert cli.main(argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("nearfar: ") and message.count("\n") == 1
    return message


def test_heads_learn_alone_first_and_the_start_is_scored_and_watched(
    here: Path, same_bits: Callable[..., None]
) -> None:
    assert cli.main(["adapt", "runs/mine", "new", *SMALL, "train.keep_every=5", "optim.lr=1e-2"]) == 0
    run = Path("runs/adapt-new")
    start, first, last = (
        checkpoint.load(path).state_dict()
        for path in (run / START, run / "checkpoints" / "step-000000005", run / "teacher.safetensors")
    )
    given = checkpoint.load("runs/mine").state_dict()
    same_bits(start, given)
    same_bits(start, first)
    assert any(not torch.equal(start[name], last[name]) for name in given)
    lines = read_metrics(run / "metrics.jsonl")
    similar = [line["start_similarity"] for line in lines if "start_similarity" in line]
    assert similar[0] == pytest.approx(1) and 0 < similar[1] < 1
    anchored = [line["anchor"] for line in lines if "anchor" in line]
    assert len(anchored) == 10  # drop-path is the student's alone, so it is not 0 at the start
    settings = config.load(run / "config.yaml")
    assert (settings.views.global_crops_size, settings.backbone.embed_dim, settings.backbone.gaug) == (32, 24, True)
    assert cli.main(["eval", "knn", str(run), "--baselines"]) == 0
    scores = json.loads((run / "results.json").read_text())["scores"]
    assert {each["subject"] for each in scores} == {"trained", "start", "untrained", "pixels"}  # as each is ready
    assert len({each["weights"] for each in scores}) == 4
    page = (run / "report.html").read_text()
    assert "Starting weights" in page and "runs/mine/teacher.safetensors" in page


def test_stopped_and_continued_it_ends_with_the_same_bits(
    here: Path, same_runs: Callable[[Path, Path, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the backbone is frozen, and the file of weights is gone when it goes on."""
    from nearfar.launch import pretrain

    assert cli.main(["adapt", "runs/mine", "new", *SMALL, "folder=whole"]) == 0
    with monkeypatch.context() as patched:
        count = iter(range(99))
        patched.setattr(pretrain.StopFlag, "__call__", lambda _: next(count) == 2)
        assert cli.main(["adapt", "runs/mine", "new", *SMALL, "folder=parts"]) == 0
    assert checkpoint.about("parts/adapt-new")["step"] == 3
    Path("runs/mine").rename("elsewhere")
    assert cli.main(["pretrain", "parts/adapt-new/config.yaml"]) == 0
    same_runs(Path("parts/adapt-new"), Path("whole/adapt-new"), 10)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16", {}),
        ("vit_tiny_patch8", {"registers": 4, "layer_scale": 1e-5, "depth": 2}),
        ("vit_small_patch16", {"depth": 1, "embed_dim": 128}),
    ],
)
def test_the_network_of_a_file_is_told_from_its_tensors(
    tmp_path: Path, name: str, options: dict[str, Any], same_bits: Callable[..., None]
) -> None:
    """With a head of whoever trained it, and wrapped as DINO's files are."""
    made = create(name, img_size=64, **options)
    state = {f"module.backbone.{key.removeprefix('model.')}": x for key, x in made.state_dict().items()}
    file = tmp_path / "public.pth"
    torch.save({"teacher": state | {"module.head.mlp.0.weight": torch.ones(3, 3)}}, file)
    found = config.load(None, [*settings_for(str(file)), "data.path=x"]).backbone
    expected = {key: value for key, value in found.model_dump().items() if value is not None}
    again = create(img_size=224, **{k: v for k, v in expected.items() if k not in ("drop_path", "pretrained")})
    same_bits(again.state_dict(), made.state_dict())


def test_weights_with_patches_larger_than_what_they_are_to_see(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of timm's networks the patch size is known once they are made, of ours from the name."""
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    checkpoint.export(here / "timm.safetensors", create("timm/vit_tiny_patch16_224", img_size=32, **sizes), {"step": 1})
    checkpoint.export(here / "ours.safetensors", create("vit_tiny_patch16", img_size=32, **sizes), {"step": 1})
    views = ["views.global_crops_size=32", "views.local_crops_size=16"]
    cases = [
        ("timm.safetensors", "views.local_crops_size=8", "views.local_crops_size=8 is smaller than one patch"),
        ("timm.safetensors", "eval.size=12", "eval.size=12 is smaller than one patch. Choose eval.size=16"),
        ("ours.safetensors", "views.local_crops_size=8", "of the patch size 16, and smaller than one patch"),
        ("ours.safetensors", "eval.size=12", "eval.size=12 is smaller than one patch of the backbone (16 pixels)"),
    ]
    for file, setting, message in cases:
        assert message in refused(capsys, "adapt", file, "new", *SMALL, *views, setting)
    large = {"patch_embed.proj.weight": torch.ones(192, 3, 512, 512), "pos_embed": torch.ones(1, 2, 192)}
    blocks = {"blocks.0.norm1.weight": torch.ones(192), "blocks.0.mlp.fc1.weight": torch.ones(1)}
    torch.save(large | blocks, here / "large.pth")
    found = settings_for("large.pth")
    assert {"views.global_crops_size=512", "views.local_crops_size=512"} <= set(found)
    assert not Path("runs/adapt-new").exists()


def test_what_cannot_be_is_one_paragraph(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refused(capsys, "adapt", "nowhere", "new", *SMALL)
    torch.save({"stem.conv.weight": torch.ones(2, 2)}, "other.pth")
    assert "Add backbone.name=" in refused(capsys, "adapt", "other.pth", "new", *SMALL)
    assert "another architecture" in refused(capsys, "adapt", "runs/mine", "new", *SMALL, "backbone.embed_dim=48")
    message = refused(capsys, "adapt", "runs/mine", "new", *SMALL, "views.local_crops_size=4")
    assert "views.local_crops_size=4 is not a multiple of the patch size 8" in message
    message = refused(capsys, "adapt", "runs/mine", "new", *SMALL, "loss.gram_weight=1", "loss.gram_teacher=runs/mine")
    assert "loss.anchor_weight" in message and "contradict" in message
    message = refused(capsys, "pretrain", "adapt", "data.path=new", *SMALL)
    assert "none are named" in message and "nearfar adapt WEIGHTS IMAGES" in message
    assert "optim.freeze_backbone_epochs=3" in refused(
        capsys, "adapt", "runs/mine", "new", *SMALL, "optim.freeze_backbone_epochs=3"
    )
    assert not Path("runs/adapt-new").exists() and not Path("runs/adapt").exists()
