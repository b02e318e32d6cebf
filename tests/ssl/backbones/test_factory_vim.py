"""Vision Mamba through `create`: the contract, its mistakes, and DINO on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from nearfar.ssl import checkpoint, config, train
from nearfar.ssl.backbones import create
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.run import Run


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("vim_tiny_patch8", {}),
        ("vim_tiny_patch16_uni", {"patch_size": 8}),
        ("vim_tiny_patch8_lgp", {"prr": True, "drop_path": 0.1, "num_heads": 3}),
        ("vim_tiny_patch8_uni", {"lgp": True}),
    ],
)
def test_ours_follow_the_contract(name: str, switches: dict[str, Any], tmp_path: Path) -> None:
    backbone: Any = create(name, img_size=32, embed_dim=48, depth=3, **switches).eval()
    assert (backbone.embed_dim, backbone.patch_size, backbone.num_heads) == (48, 8, switches.get("num_heads", 1))
    images = torch.randn(2, 3, 40, 27)
    tokens = backbone(images)
    assert tokens.prefix.shape == (2, 1, 48) and tokens.patches.shape == (2, 20, 48) and tokens.grid == (5, 4)
    torch.testing.assert_close(tokens.cls, backbone.model(images))
    blocks = backbone.blocks(images, 2, norm=True)
    assert [block.grid for block in blocks] == [(5, 4)] * 2
    if not switches.get("prr"):
        torch.testing.assert_close(blocks[-1].patches, tokens.patches)
        torch.testing.assert_close(blocks[-1].prefix, tokens.prefix)
    with pytest.raises(UserError, match="no plain global attention"):
        backbone.attention(images)

    assert create(**json.loads(json.dumps(backbone.arch))).arch == backbone.arch
    checkpoint.export(tmp_path / "teacher.safetensors", backbone, {})
    again = checkpoint.load(tmp_path / "teacher.safetensors")
    torch.testing.assert_close(again(images), tokens)


def test_arch_says_what_it_is_and_not_how_it_is_computed() -> None:
    backbone: Any = create("vim_small_patch16_uni_lgp", depth=1, scan="torch")
    assert backbone.arch["name"] == "vim_small_patch16_uni" and backbone.arch["lgp"]
    assert "scan" not in backbone.arch and backbone.model.blocks[0].mixer.scan == "torch"
    assert backbone.num_heads == 6


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vim_tiny_patch16", {"gaug": True}, "cannot take gaug: it has no attention"),
        ("vim_tiny_patch16", {"registers": 2}, "cannot take registers"),
        ("vim_tiny_patch16", {"pretrained": True}, "no published weights"),
        ("vim_tiny_patch14_lgp", {}, "power of two"),
        ("vim_tiny_patch16", {"embed_dim": 48, "num_heads": 5}, "48 is not divisible by num_heads=5"),
        ("vim_tiny_patch16_lgp_uni", {}, "Did you mean .*vim_tiny_patch16"),
        ("vim_smal_patch16", {}, "Did you mean .*vim_small_patch16"),
        ("vit_tiny_patch16", {"scan": "torch"}, "scan=torch is a setting of Vision Mamba"),
        ("timm/resnet18", {"scan": "mamba"}, "scan=mamba is a setting of Vision Mamba"),
    ],
)
def test_mistakes_are_told(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create(name, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message of a machine without CUDA")
def test_the_kernel_on_a_cpu_is_told_at_once() -> None:
    with pytest.raises(UserError, match="scan=mamba is made of CUDA kernels and cannot run on the device 'cpu'"):
        create("vim_tiny_patch16", scan="mamba")


# DINO


@pytest.mark.parametrize("lgp", ["false", "true"])
def test_dino_learns_and_its_checkpoint_loads(
    tiny: Callable[..., Run], images: ArraySource, quiet: Console, lgp: str
) -> None:
    run = tiny(  # 2 steps an epoch; a teacher that moves slowly, so that the loss shows what the student learns
        "backbone.name=vim_tiny_patch8",
        "backbone.gaug=false",
        "backbone.prr=false",
        "backbone.scan=torch",
        "train.batch_size=20",
        "train.epochs=10",
        "loss.teacher_temp=0.07",
        "loss.warmup_teacher_temp=0.07",
        "backbone.drop_path=0",
        "optim.teacher_momentum=0.996",
        "optim.warmup_epochs=0",
        "optim.freeze_last_layer_epochs=0",
        "optim.lr=3e-3",
        f"backbone.lgp={lgp}",
    )
    outcome = train.pretrain(run, images, console=quiet)
    losses = [line["loss"] for line in read_metrics(run.path / "metrics.jsonl") if "loss" in line]
    assert outcome.finished and len(losses) == 20
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3
    backbone = checkpoint.load(run.path / "checkpoints" / "step-000000020")
    exported = checkpoint.load(run.path)
    sample = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(backbone(sample), exported(sample))
    assert backbone.arch["name"] == "vim_tiny_patch8"


def test_impossible_settings_are_told_together() -> None:
    with pytest.raises(UserError, match=r"2 mistakes.*num_heads=5.*no attention"):
        config.load(None, ["backbone.name=vim_tiny_patch16", "backbone.registers=2", "backbone.embed_dim=48",
                           "backbone.num_heads=5"])  # fmt: skip
    with pytest.raises(UserError, match=r"backbone\.scan=torch is for Vision Mamba"):
        config.load(None, ["backbone.scan=torch"])
