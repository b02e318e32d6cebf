"""Settings for weights of any network, in a recipe that was written for another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nearfar.launch.recipes import find_recipe
from nearfar.launch.starting_weights import architecture_settings
from nearfar.ssl import checkpoint
from nearfar.ssl.backbones import create
from nearfar.ssl.settings import finetune_settings

NETWORKS: dict[str, dict[str, Any]] = {
    "timm/resnet10t": {},
    "vim_tiny_patch4": {"depth": 2},
    "vit_tiny_patch4": {"depth": 2, "pos_size": 64, "registers": 2},
    "vit_tiny_patch8_lgp": {"embed_dim": 64, "depth": 1, "num_heads": 2, "rope": False},
}


@pytest.mark.parametrize(("name", "public"), [*((name, False) for name in NETWORKS), ("vit_tiny_patch4", True)])
def test_a_recipe_takes_the_network_of_the_weights(
    tmp_path: Path, name: str, public: bool, same_bits: Callable[..., None]
) -> None:
    """`finetune_cifar10` has a ViT with LGP, GAug and PRR, of a width and depth that others cannot have."""
    made = create(name, img_size=32, **NETWORKS[name])
    file = tmp_path / ("public.pth" if public else "ours.safetensors")
    if public:
        torch.save({key.removeprefix("model."): tensor for key, tensor in made.state_dict().items()}, file)
    else:
        checkpoint.export(file, made, {"step": 1})
    recipe = find_recipe("finetune_cifar10", supervised=True)
    run = finetune_settings.load(recipe, [*architecture_settings(str(file)), "data.path=x"])
    settings = run.backbone.model_dump(exclude={"drop_path", "img_size"})
    same_bits(create(img_size=32, **settings).state_dict(), made.state_dict())


def test_what_timm_publishes_needs_no_file() -> None:
    recipe = find_recipe("finetune_cifar10", supervised=True)
    run = finetune_settings.load(recipe, [*architecture_settings("timm/resnet10t"), "data.path=x"])
    assert run.backbone.name == "timm/resnet10t" and run.backbone.pretrained and run.backbone.embed_dim is None
