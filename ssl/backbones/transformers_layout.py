"""Weights in the layouts of Hugging Face transformers, under the names that their first authors gave them.

`ViTModel`, `Dinov2Model` and `DINOv3ViTModel` are ViTs as DINO's are; what differs is names, and that query, key and
value are three matrices there. `DINOv3ConvNextModel` is a ConvNeXt under other names.
"""

import re

import torch
from torch import Tensor

State = dict[str, Tensor]

MARK = "embeddings.patch_embeddings.projection.weight"
DINOV3_MARK = "embeddings.patch_embeddings.weight"
CONVNEXT_MARK = "stages.0.layers.0.depthwise_conv.weight"
_LAYER = re.compile(r"(?:encoder\.|model\.)?layer\.(\d+)\.(.+)\.(weight|bias|lambda1)")
_PARTS = {
    "norm1": "norm1", "layernorm_before": "norm1", "norm2": "norm2", "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj", "mlp.fc1": "mlp.fc1", "intermediate.dense": "mlp.fc1",
    "mlp.fc2": "mlp.fc2", "output.dense": "mlp.fc2", "layer_scale1": "ls1", "layer_scale2": "ls2",
    "attention.o_proj": "attn.proj", "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2",
}  # fmt: skip
_GATED = {"mlp.gate_proj": "mlp.w1", "mlp.up_proj": "mlp.w2", "mlp.down_proj": "mlp.w3"}  # DINOv3's SwiGLU
_PROJECTION = re.compile(r"attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)")
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
_DINOV3_OTHERS = _OTHERS | {
    "embeddings.register_tokens": "storage_tokens",
    "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
}
_CONVNEXT = (
    (r"^(?:model\.)?stages\.(\d+)\.downsample_layers\.(\d+)\.", r"downsample_layers.\1.\2."),
    (r"^(?:model\.)?stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.\2."),
    (r"\.depthwise_conv\.", ".dwconv."),
    (r"\.layer_norm\.", ".norm."),
    (r"\.pointwise_conv([12])\.", r".pwconv\1."),
    (r"^layer_norm\.", "norm."),
)


def in_their_authors_names(state: State) -> State:
    """The tensors of such a file as DINO, DINOv2 or DINOv3 name them; any other file's as they are.

    A layer scale that is 1 throughout, which DINOv2's layout writes for networks without one, is left out. Names that
    are not known keep theirs, so that strict loading tells them.
    """
    if any(key.endswith(CONVNEXT_MARK) for key in state):
        return _of_convnext(state)
    mark = next((mark for mark in (MARK, DINOV3_MARK) if any(key.endswith(mark) for key in state)), None)
    if mark is None:
        return state
    wrapper = next(key.removesuffix(mark) for key in state if key.endswith(mark))
    gated = any(".mlp.gate_proj." in key for key in state)
    names, others = (_PARTS | _GATED if gated else _PARTS), (_OTHERS if mark == MARK else _DINOV3_OTHERS)
    found: State = {}
    projections: dict[str, State] = {}
    for key, tensor in state.items():
        name = key.removeprefix(wrapper)
        if name.startswith(("pooler.", "classifier.")):
            continue
        layer = _LAYER.fullmatch(name)
        part = layer[2] if layer else ""
        if layer and part in names:
            kind = "gamma" if layer[3] == "lambda1" else layer[3]
            found[f"blocks.{layer[1]}.{names[part]}.{kind}"] = tensor
        elif layer and _PROJECTION.fullmatch(part):
            whole = f"blocks.{layer[1]}.attn.qkv.{layer[3]}"
            projections.setdefault(whole, {})[name] = tensor
        else:
            found[others.get(name, name)] = tensor
    for whole, parts in projections.items():
        found |= _joined(whole, parts)
    scales = [name for name in found if name.endswith(".gamma")]
    if mark == MARK and all(bool((found[name] == 1).all()) for name in scales):
        found = {name: tensor for name, tensor in found.items() if name not in scales}
    return found


def _joined(whole: str, parts: State) -> State:
    """Query, key and value as one tensor of this name; as they are where they do not fit each other.

    A bias that DINOv3's keys do not have is 0.
    """
    roles = {match[1][0]: tensor for name, tensor in parts.items() if (match := _PROJECTION.search(name))}
    if whole.endswith(".bias") and roles.keys() == {"q", "v"}:
        roles["k"] = torch.zeros_like(roles["q"])
    ordered = [roles[role] for role in "qkv" if role in roles]
    if len({part.shape[1:] for part in ordered}) > 1 or not ordered[0].ndim:
        return parts
    return {whole: torch.cat(ordered)}


def _of_convnext(state: State) -> State:
    found = {}
    for key, tensor in state.items():
        name = key
        for theirs, first in _CONVNEXT:
            name = re.sub(theirs, first, name)
        found[name] = tensor
    return found
