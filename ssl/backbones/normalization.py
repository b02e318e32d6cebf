"""Networks that were trained on images normalized otherwise than ours are, made to see ours as they saw theirs."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from torch import nn

from nearfar.ssl.backbones.lgp import LGPPatchEmbed
from nearfar.ssl.disk import bounded_files

Numbers = tuple[float, ...]  # one for each color

log = logging.getLogger(__name__)


def see_as_published(model: nn.Module, name: str, mean: Numbers, std: Numbers) -> None:
    """Have a network that saw images normalized by `mean` and `std` see those normalized by ImageNet's as it did.

    Google's ViTs, for one, saw values from -1 to 1. What differs is a factor and an offset for each color, which go
    into the first convolution; where that pads its input (it would pad with another color) or has no bias, a warning
    says so. name: of the network or its file, for what is said.
    """
    here, theirs = (torch.tensor(each) for each in ((MEAN, STD), (mean, std)))
    if torch.allclose(here, theirs, atol=1e-3):  # some write them with three digits
        return
    factor, offset = here[1] / theirs[1], (here[0] - theirs[0]) / theirs[1]
    first = _first_convolution(model)
    if first is None or first.bias is None or any(first.padding) or first.groups > 1:
        log.warning(
            "%s was trained on images with mean %s and deviation %s, and sees them here with ImageNet's: its features "
            "can be worse than published.", name, mean, std,
        )  # fmt: skip
        return
    with torch.no_grad():
        first.bias += (first.weight.sum((2, 3)) * offset).sum(1)
        first.weight *= factor[:, None, None]
    log.info(
        "%s saw images with mean %s and deviation %s: its first layer allows for it.", name, tuple(mean), tuple(std)
    )


def of_published(model: nn.Module) -> tuple[Numbers, Numbers]:
    """Mean and deviation of the images that timm's published weights of this network were trained on."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return config.get("mean") or MEAN, config.get("std") or STD


def beside(weights: Path) -> tuple[Numbers, Numbers] | None:
    """Mean and deviation that a folder of transformers or of timm says of its model.safetensors; None: it does not."""
    if weights.name != "model.safetensors":
        return None
    for name, section, keys in (
        ("preprocessor_config.json", None, ("image_mean", "image_std")),
        ("config.json", "pretrained_cfg", ("mean", "std")),
    ):
        try:
            found = json.loads(bounded_files.read_text(weights.parent / name, bounded_files.MAX_BYTES))
            found = found[section] if section else found
            mean, std = (tuple(float(number) for number in found[key]) for key in keys)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if len(mean) == len(std) == 3 and all(map(math.isfinite, mean)) and all(1e-3 < each < 1e3 for each in std):
            return mean, std
    return None


def _first_convolution(model: nn.Module) -> nn.Conv2d | None:
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("first_conv") or "patch_embed.proj"
    try:
        first = model.get_submodule(name) if isinstance(name, str) else None
    except AttributeError:
        return None
    if isinstance(first, LGPPatchEmbed):  # which stands in its place
        first = first.proj
    return first if isinstance(first, nn.Conv2d) else None
