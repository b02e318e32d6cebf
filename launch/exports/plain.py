"""Our plain ViT in the words of timm and of transformers: names of tensors, and their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfar.launch.exports.exported import ExportedBackbone
from nearfar.ssl.backbones import VisionTransformer

Config = dict[str, Any]


def plain_vit(exported: ExportedBackbone) -> VisionTransformer | None:
    """Our ViT where it has none of the parts that others do not know; registers are known."""
    model = exported.backbone.model
    return model if isinstance(model, VisionTransformer) and not exported.ideas else None


def timm_tensors(vit: VisionTransformer) -> dict[str, Tensor]:
    """As timm's VisionTransformer. Its positions count registers too, and ours have none: they get zeros."""
    tensors = {name: tensor for name, tensor in vit.state_dict().items() if name != "mask_token"}
    if vit.reg_token is not None:
        positions, registers = tensors["pos_embed"], torch.zeros_like(vit.reg_token.detach())
        tensors["pos_embed"] = torch.cat([positions[:, :1], registers, positions[:, 1:]], 1)
    return tensors


def timm_arguments(vit: VisionTransformer) -> dict[str, Any]:
    """With which timm's `vit_tiny_patch16_224` (or any other size of it) is this network."""
    return {
        "img_size": [side * vit.patch_size for side in vit.pos_grid],
        "patch_size": vit.patch_size,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": vit.num_heads,
        "reg_tokens": vit.num_prefix_tokens - 1,
        "num_classes": 0,
        "global_pool": "token",
        "dynamic_img_size": True,
        **({"init_values": 1e-5} if layer_scaled(vit) else {}),
    }


def layer_scaled(vit: VisionTransformer) -> bool:
    """Has it a layer scale, whose weights replace whatever it starts from?"""
    return any(".ls1." in name for name, _ in vit.named_parameters())


def dinov2_config(vit: VisionTransformer) -> Config:
    """As transformers' Dinov2Config: a ViT whose registers have no positions either. Without a layer scale, it is 1."""
    registers = vit.num_prefix_tokens - 1
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config: Config = {
        "architectures": [f"{kind}Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "image_size": vit.pos_grid[0] * vit.patch_size,
        "patch_size": vit.patch_size,
        "num_channels": 3,
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": vit.num_heads,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "layerscale_value": 1.0,
        "use_swiglu_ffn": False,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "torch_dtype": "float32",
    }
    return config | ({"num_register_tokens": registers} if registers else {})


def dinov2_tensors(vit: VisionTransformer) -> dict[str, Tensor]:
    """The weights under transformers' names. Without a mask token it is of zeros, since DINOv2's layout has one."""
    ours = vit.state_dict()
    ones = torch.ones(vit.embed_dim)
    found = {
        "embeddings.cls_token": ours["cls_token"],
        "embeddings.mask_token": ours.get("mask_token", torch.zeros(1, vit.embed_dim)),
        "embeddings.position_embeddings": ours["pos_embed"],
        "layernorm.weight": ours["norm.weight"],
        "layernorm.bias": ours["norm.bias"],
    }
    if vit.reg_token is not None:
        found["embeddings.register_tokens"] = ours["reg_token"]
    for kind in ("weight", "bias"):
        found[f"embeddings.patch_embeddings.projection.{kind}"] = ours[f"patch_embed.proj.{kind}"]
    for i in range(len(vit.blocks)):
        block, layer = f"blocks.{i}.", f"encoder.layer.{i}."
        for kind in ("weight", "bias"):
            query_key_value = ours[f"{block}attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), query_key_value, strict=True):
                found[f"{layer}attention.attention.{name}.{kind}"] = part.clone()
            found[f"{layer}attention.output.dense.{kind}"] = ours[f"{block}attn.proj.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{layer}{name}.{kind}"] = ours[f"{block}{name}.{kind}"]
        for number in (1, 2):
            found[f"{layer}layer_scale{number}.lambda1"] = ours.get(f"{block}ls{number}.gamma", ones).clone()
    return found


def dinov2_tokens(tensors: Mapping[str, Tensor], config: Config, images: Tensor) -> Tensor:
    """What transformers' Dinov2Model computes from a folder's tensors: all tokens (B, 1 + R + N, D), in float64.

    Written from the description of that layout alone, to check a folder where transformers is not installed. images:
    (B, 3, H, W), normalized, of the size that the positions are made for.
    """
    t = {name: tensor.double() for name, tensor in tensors.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], config["layer_norm_eps"])

    patches = "embeddings.patch_embeddings.projection"
    x = F.conv2d(images.double(), t[f"{patches}.weight"], t[f"{patches}.bias"], stride=config["patch_size"])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([t["embeddings.cls_token"].expand(len(x), -1, -1), x], 1) + t["embeddings.position_embeddings"]
    if "embeddings.register_tokens" in t:
        x = torch.cat([x[:, :1], t["embeddings.register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        y = norm(x, f"{layer}.norm1")
        q, k, v = (
            linear(y, f"{layer}.attention.attention.{name}").unflatten(-1, (config["num_attention_heads"], -1))
            for name in ("query", "key", "value")
        )
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        y = linear(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2), f"{layer}.attention.output.dense")
        x = x + t[f"{layer}.layer_scale1.lambda1"] * y
        y = linear(F.gelu(linear(norm(x, f"{layer}.norm2"), f"{layer}.mlp.fc1")), f"{layer}.mlp.fc2")
        x = x + t[f"{layer}.layer_scale2.lambda1"] * y
    return norm(x, "layernorm")
