"""Weights in the layout of Hugging Face transformers (`ViTModel`, `Dinov2Model`), under the names that DINO gives them.

Both are ViTs as ours are; what differs is names, and that query, key and value are three matrices there.
"""

import re

import torch
from torch import Tensor

State = dict[str, Tensor]

MARK = "embeddings.patch_embeddings.projection.weight"
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias|lambda1)")
_PARTS = {
    "norm1": "norm1", "layernorm_before": "norm1", "norm2": "norm2", "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj", "mlp.fc1": "mlp.fc1", "intermediate.dense": "mlp.fc1",
    "mlp.fc2": "mlp.fc2", "output.dense": "mlp.fc2", "layer_scale1": "ls1", "layer_scale2": "ls2",
}  # fmt: skip
_OTHERS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}


def in_dinos_names(state: State) -> State:
    """The tensors of such a file as DINO names them; any other file's as they are.

    A layer scale that is 1 throughout, which that layout writes for networks without one, is left out. Names that are
    not known keep theirs, so that strict loading tells them.
    """
    wrapper = next((key.removesuffix(MARK) for key in state if key.endswith(MARK)), None)
    if wrapper is None:
        return state
    found: State = {}
    projections: dict[str, State] = {}
    for key, tensor in state.items():
        name = key.removeprefix(wrapper)
        if name.startswith(("pooler.", "classifier.")):
            continue
        layer = _LAYER.fullmatch(name)
        part = layer[2] if layer else ""
        if layer and part in _PARTS:
            kind = "gamma" if layer[3] == "lambda1" else layer[3]
            found[f"blocks.{layer[1]}.{_PARTS[part]}.{kind}"] = tensor
        elif layer and part.startswith("attention.attention."):
            whole = f"blocks.{layer[1]}.attn.qkv.{layer[3]}"
            projections.setdefault(whole, {})[name] = tensor
        else:
            found[_OTHERS.get(name, name)] = tensor
    for whole, parts in projections.items():
        found |= _joined(whole, parts)
    scales = [name for name in found if name.endswith(".gamma")]
    if all(bool((found[name] == 1).all()) for name in scales):
        found = {name: tensor for name, tensor in found.items() if name not in scales}
    return found


def _joined(name: str, parts: State) -> State:
    """Query, key and value as one tensor of this name; as they are where they do not fit each other."""
    ordered = [parts[key] for role in ("query", "key", "value") for key in parts if f".{role}." in key]
    if len(ordered) < len(parts) or len({part.shape[1:] for part in ordered}) > 1 or not ordered[0].ndim:
        return parts
    return {name: torch.cat(ordered)}
