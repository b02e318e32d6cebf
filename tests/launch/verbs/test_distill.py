"""`nearfar distill`: a thin verb over a run with a teacher; its mistakes are one paragraph and exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nearfar.launch.cli import main
from nearfar.ssl import checkpoint
from nearfar.ssl.backbones import create

TINY = [
    "views.global_crops_size=16", "backbone.name=vit_tiny_patch8", "backbone.embed_dim=12", "backbone.depth=1",
    "backbone.num_heads=2", "train.epochs=1", "train.batch_size=8", "train.world_size=1", "train.threads=1",
    "train.device=cpu", "train.precision=fp32", "data.workers=0", "head.hidden_dim=8", "head.bottleneck_dim=4",
]  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, label=np.arange(16) % 2)
    return tmp_path / "images.npz"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    path = tmp_path / "teacher.safetensors"
    checkpoint.export(path, create("vit_tiny_patch8", img_size=16, embed_dim=20, depth=1, num_heads=2), {"step": 3})
    return path


def distill(teacher: Path | str, images: Path, *settings: str) -> int:
    return main(["distill", str(teacher), f"data.path={images}", f"folder={images.parent / 'runs'}", *TINY, *settings])


def test_a_student_is_distilled_and_scored_like_any_run(
    teacher: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill(teacher, images) == 0
    run = images.parent / "runs" / "distilled"
    assert "Distilled from" in (run / "run.log").read_text()
    assert checkpoint.load(run).embed_dim == 12
    same = ["--train", str(images), "--val", str(images), "--workers", "0"]
    assert main(["eval", "knn", str(run), *same]) == 0
    assert "k-NN" in capsys.readouterr().out and (run / "report.html").exists()


def test_a_public_file_teaches(images: Path, same_bits: Callable[..., None]) -> None:
    """Its network is told from its tensors; the student learns what it learns from the same teacher in our own file."""
    network = create("vit_tiny_patch8", img_size=16, embed_dim=64, depth=1, num_heads=1)
    checkpoint.export(images.parent / "ours.safetensors", network, {"step": 3})
    state = {name.removeprefix("model."): tensor for name, tensor in network.state_dict().items()}
    torch.save({"teacher": state}, images.parent / "public.pth")
    for teacher in ("ours.safetensors", "public.pth"):
        assert distill(images.parent / teacher, images, f"name={teacher[:4]}") == 0
    ours, public = (checkpoint.load(images.parent / "runs" / name) for name in ("ours", "publ"))
    same_bits(public.state_dict(), ours.state_dict())


def test_the_dry_run_says_what_would_be_trained(
    teacher: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill(teacher, images, "--dry-run") == 0
    assert "projections from 12 to 20 numbers" in capsys.readouterr().out
    assert not (images.parent / "runs" / "distilled").exists()


def test_mistakes_are_one_paragraph_and_exit_code_2(
    teacher: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    public = images.parent / "public.pth"
    torch.save({"blocks.0.weight": torch.zeros(2)}, public)
    coarse = images.parent / "coarse.safetensors"
    checkpoint.export(coarse, create("vit_tiny_patch32", img_size=32, embed_dim=20, depth=1, num_heads=2), {"step": 3})
    cases: list[tuple[str | Path, str, str]] = [
        (images.parent / "missing.safetensors", "train.seed=0", "There is no teacher"),
        (public, "train.seed=0", "distill.teacher=NAME"),
        ("timm/vit_tiny_patch16_224", "train.seed=0", "not in the cache"),
        (teacher, "distill.teacher_size=20", "distill.teacher_size=16"),
        (coarse, "train.seed=0", "are smaller than them. Let it see them larger or smaller: distill.teacher_size=32"),
        (coarse, "distill.teacher_size=8", "patches of 32 pixels, and the views it sees (distill.teacher_size=8)"),
        (teacher, "backbone.patch_size=32", "views.global_crops_size=16 is not a multiple of the patch size 32"),
        (teacher, "loss.koleo_weight=0.1", "contradict"),
    ]
    for given, setting, expected in cases:
        assert distill(given, images, setting) == 2
        message = capsys.readouterr().err.strip()
        assert expected in " ".join(message.split()) and "Traceback" not in message and "\n\n" not in message
        assert not list((images.parent / "runs").glob("*/checkpoints"))


def test_a_forgotten_teacher_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "data.path=x"]) == 2
    assert "The teacher comes first" in " ".join(capsys.readouterr().err.split())
