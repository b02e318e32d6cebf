"""DINO on every family of backbones: 20 steps of the real loop, two sizes of views, and the loss falls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from timm.models import register_model
from timm.models.gcvit import GlobalContextVit
from timm.models.mambaout import MambaOut
from timm.models.maxxvit import MaxxVit, MaxxVitCfg
from timm.models.shvit import SHViT
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from nearfar.ssl import train
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.settings.run import Run

Make = Callable[..., Run]

OURS = ["backbone.name=vit_tiny_patch8", "backbone.embed_dim=24", "backbone.depth=2", "backbone.num_heads=2"]
PLAIN = ["backbone.lgp=false", "backbone.gaug=false", "backbone.prr=false"]
AS_THE_NAME_SAYS = ["backbone.embed_dim=null", "backbone.depth=null", "backbone.num_heads=null", "backbone.drop_path=0"]


def timms(name: str, *more: str) -> list[str]:
    return [*PLAIN, *AS_THE_NAME_SAYS, f"backbone.name=timm/{name}", *more]


FAMILIES: dict[str, list[str]] = {
    "vit": [*OURS, *PLAIN],
    "vit_lgp": [*OURS, *PLAIN, "backbone.lgp=true"],
    "vit_locat": [*OURS, *PLAIN, "backbone.gaug=true", "backbone.prr=true"],
    "vit_lgp_locat": [*OURS],
    "reg": [*OURS, *PLAIN, "backbone.registers=4"],
    "rope": [*OURS, *PLAIN, "backbone.rope=true"],
    "rope_locat": [*OURS, "backbone.lgp=false", "backbone.rope=true"],
    "swin": timms("tiny_swin"),
    "swin_lgp_gaug": timms("tiny_swin", "backbone.lgp=true", "backbone.gaug=true"),
    "swinv2_lgp_gaug": timms("tiny_swinv2", "backbone.lgp=true", "backbone.gaug=true"),
    "resnet": timms("test_resnet"),
    "convnext": timms("test_convnext"),
    "maxvit": timms("tiny_maxvit"),
    "gcvit": timms("tiny_gcvit"),
    "shvit": timms("tiny_shvit", "optim.lr=4e-3"),  # at 2e-3 one seed in ten still stood above its start after 20 steps
    "mambaout": timms("tiny_mambaout"),
    "timm_vit_locat": timms("test_vit", "backbone.gaug=true", "backbone.prr=true"),
}


def network(make: Callable[..., nn.Module], *args: Any, **small: Any) -> Callable[..., nn.Module]:
    def build(**given: Any) -> nn.Module:
        for timms_own in ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            given.pop(timms_own, None)
        return make(*args, **small, **given)

    return build


# timm's families in a size for tests (it has test_resnet and the like for some)
SMALL: dict[str, Callable[..., nn.Module]] = {
    "tiny_swin": network(SwinTransformer, embed_dim=16, depths=(1, 2), num_heads=(1, 2), window_size=4),
    "tiny_swinv2": network(SwinTransformerV2, embed_dim=16, depths=(1, 2), num_heads=(1, 2), window_size=4),
    "tiny_maxvit": network(MaxxVit, MaxxVitCfg((32, 64), (1, 1), block_type=("M", "M"), stem_width=8)),
    "tiny_gcvit": network(GlobalContextVit, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
    "tiny_shvit": network(SHViT, embed_dim=(16, 24, 32), partial_dim=(8, 8, 8), depth=(1, 1, 1)),
    "tiny_mambaout": network(MambaOut, depths=(1, 1, 1, 1), dims=(16, 24, 32, 48)),
}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    for name, build in SMALL.items():
        build.__name__, build.__module__ = name, __name__
        register_model(build)


@pytest.fixture
def shades() -> ArraySource:
    """40 images that differ in color and direction, so that there is something to learn within seconds."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64] / 64
    angle, color = rng.uniform(0, 2 * np.pi, 40), rng.uniform(0.2, 1, (40, 3))
    waves = 0.5 + 0.5 * np.sin(8 * (np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y))
    return ArraySource((255 * waves[..., None] * color[:, None, None]).astype(np.uint8), labels=np.arange(40) % 4)


SLOW = ("maxvit", "gcvit", "rope_locat", "swinv2_lgp_gaug", "mambaout", "reg")  # with what the others have


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.long) if f in SLOW else f for f in FAMILIES])
def test_loss_falls(family: str, tiny: Make, shades: ArraySource, quiet: Console) -> None:
    easy = [
        "views.global_crops_scale=[0.7,1]",
        "views.local_crops_scale=[0.3,0.6]",
        "views.color_jitter_prob=0",
        "views.blur_prob=[0,0,0]",
    ]
    sizes = ["views.global_crops_size=64", "views.local_crops_size=32", "head.prototypes=64"]
    run = tiny(*easy, *sizes, "optim.lr=2e-3", "optim.teacher_momentum=0.9", *FAMILIES[family])
    assert train.pretrain(run, shades, console=quiet).step == 20
    lines = [json.loads(line) for line in (Path(run.path) / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
