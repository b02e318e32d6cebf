"""Which network a public file of weights holds, told from the names and shapes of its tensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nearfar.ssl.backbones.factory import create
from nearfar.ssl.backbones.tokens import Backbone
from nearfar.ssl.backbones.weights import antialiased, has_query_or_value_bias, read_state, weights_in
from nearfar.ssl.disk import bounded_files
from nearfar.ssl.errors import UserError

HEAD_WIDTH = 64  # of attention, which tensors do not tell, in all public ViTs but these:
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}  # ViT-SO400M, H, g and G, by width
VITS = {192: "vit_tiny", 384: "vit_small", 768: "vit_base"}  # ours, by width
# DINOv3's networks as timm calls them: ViTs by width and whether their MLP is gated, ConvNeXts by width and depth.
DINOV3_VITS = {
    (192, False): "tiny", (384, False): "small", (384, True): "small_plus", (768, False): "base",
    (1024, False): "large", (1280, True): "huge_plus", (4096, True): "7b",
}  # fmt: skip
DEPTHS = {"large": 24, "huge_plus": 32, "7b": 40}  # others have 12 blocks
# By the blocks of each stage, and whether a block has a third convolution.
RESNETS: dict[tuple[int | bool, ...], int] = {
    (2, 2, 2, 2, False): 18, (3, 4, 6, 3, False): 34, (3, 4, 6, 3, True): 50, (3, 4, 23, 3, True): 101,
    (3, 8, 36, 3, True): 152,
}  # fmt: skip
CONVNEXTS = {(96, 9): "tiny", (96, 27): "small", (128, 27): "base", (192, 27): "large"}


def load_public(path: str | Path) -> Backbone:
    """The network of a public file of weights, in evaluation mode: at every size what its authors' code computes.

    Raises:
        UserError: unreadable, or a network that its tensors do not tell (then `create(name, weights=path)` takes it).
    """
    backbone = create(**architecture_of(path), weights=path)
    return backbone.eval().requires_grad_(False)


def architecture_of(path: str | Path) -> dict[str, Any]:
    """Arguments of `create` for the network that a file holds, as DINO, DINOv2, DINOv3, torchvision and timm write it,
    or Hugging Face transformers: a plain ViT, one of DINOv3's, a ConvNeXt or a ResNet.

    Raises:
        UserError: unreadable, or none of these.
    """
    file = weights_in(Path(path))
    tensors = {re.sub(r"^(module\.|backbone\.|_orig_mod\.|model\.)+", "", k): t for k, t in read_state(file).items()}
    found = _plain_vit(tensors, file) or _dinov3_vit(tensors) or _convnext(tensors) or _resnet(tensors)
    if found is None:
        raise UserError(
            f"The tensors of {file} are not those of a plain ViT with learned positions, of a network of DINOv3 or of "
            "a ResNet, so it is not known which network they belong to."
        )
    return found


def patch_size_of(arch: Mapping[str, Any]) -> int:
    """The side in pixels of a patch of such a network (of a ConvNeXt: its total stride)."""
    named = re.search(r"patch(\d+)", arch["name"])
    return int(named[1]) if named else 32


def _plain_vit(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Any] | None:
    """A ViT with learned positions, which ours can be. Raises UserError where its number of heads is not known."""
    patch, positions = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    depth = _count(tensors, r"blocks\.(?:\d+\.)?(\d+)\.norm1\.weight")
    plain = any(name.endswith("mlp.fc1.weight") for name in tensors)
    if patch is None or positions is None or patch.ndim != 4 or positions.ndim != 3 or not depth or not plain:
        return None
    width, side = patch.shape[0], patch.shape[-1]
    grid = math.isqrt(positions.shape[1])  # with CLS it is one more than a square
    found: dict[str, Any] = {"name": f"{VITS.get(width, 'vit_base')}_patch{side}", "pos_size": grid * side}
    if width not in VITS:
        found["embed_dim"] = width
    heads = _heads_beside(file) or HEADS.get(width, width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else None)
    if heads is None:
        raise UserError(
            f"{file} holds a ViT of width {width}, and its tensors do not tell how many heads it has: name them "
            "(backbone.name, backbone.embed_dim, backbone.num_heads)."
        )
    if width not in VITS or heads != width // HEAD_WIDTH:
        found["num_heads"] = heads
    if depth != 12:
        found["depth"] = depth
    registers = tensors.get("register_tokens", tensors.get("reg_token"))
    if registers is not None:
        found["registers"] = registers.shape[1]
    if antialiased(tensors):
        found["pos_antialias"] = True
    if any(".ls1." in name for name in tensors):
        found["layer_scale"] = 1e-5
    return found


def _heads_beside(file: Path) -> int | None:
    """The number of heads that a folder of transformers says of its model.safetensors."""
    if file.name != "model.safetensors":
        return None
    try:
        config = json.loads(bounded_files.read_text(file.with_name("config.json"), bounded_files.MAX_BYTES))
        heads = config["num_attention_heads"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return heads if type(heads) is int and 0 < heads <= 1024 else None


def _dinov3_vit(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """A ViT with rotary positions, registers and layer scale, in its authors' names or timm's."""
    patch = tensors.get("patch_embed.proj.weight")
    has_registers = "storage_tokens" in tensors or ("reg_token" in tensors and "blocks.0.gamma_1" in tensors)
    if patch is None or not has_registers or "pos_embed" in tensors or patch.shape[2:] != (16, 16):
        return None
    gated = "blocks.0.mlp.w1.weight" in tensors or "blocks.0.mlp.fc1_g.weight" in tensors
    size = DINOV3_VITS.get((patch.shape[0], gated))
    if size is None or _count(tensors, r"blocks\.(\d+)\.norm1\.weight") != DEPTHS.get(size, 12):
        return None
    biases = any(has_query_or_value_bias(name, tensor) for name, tensor in tensors.items())
    return {"name": f"timm/vit_{size}_patch16_dinov3{'_qkvb' if biases or size == 'tiny' else ''}"}


def _convnext(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """A ConvNeXt as its authors write it, and DINOv3's."""
    stem = tensors.get("downsample_layers.0.0.weight")
    depth = _count(tensors, r"stages\.2\.(\d+)\.dwconv\.weight")
    if stem is None or stem.ndim != 4 or (stem.shape[0], depth) not in CONVNEXTS or "stages.0.0.gamma" not in tensors:
        return None
    return {"name": f"timm/convnext_{CONVNEXTS[stem.shape[0], depth]}"}


def _resnet(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """A ResNet of the usual width in the names of torchvision, which are timm's."""
    first, inner = tensors.get("conv1.weight"), tensors.get("layer1.0.conv2.weight")
    if first is None or first.shape != (64, 3, 7, 7) or inner is None or inner.shape != (64, 64, 3, 3):
        return None
    blocks = [_count(tensors, rf"layer{stage}\.(\d+)\.conv1\.weight") for stage in (1, 2, 3, 4)]
    depth = RESNETS.get((*blocks, "layer1.0.conv3.weight" in tensors))
    return {"name": f"timm/resnet{depth}"} if depth else None


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return len({found[1] for name in tensors if (found := re.fullmatch(pattern, name))})
