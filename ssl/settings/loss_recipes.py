"""What `loss.recipe` and a teacher to distill stand for: parts, each a setting of its own; what the user writes wins.

Only what makes the method is here. What follows from the size of the job (prototypes, momentum, temperatures, rates) is
derived as for DINO, and the architecture (registers, rotary positions) is the user's.
"""

from __future__ import annotations

from typing import Any

DINOV2: dict[str, Any] = {
    "loss.ibot_weight": 1.0,
    "loss.centering": "sinkhorn_knopp",
    "loss.koleo_weight": 0.1,
    "head.ibot_separate": True,
    "backbone.layer_scale": 1e-5,
    "optim.layerwise_decay": 0.9,
    "optim.patch_embed_lr_mult": 0.2,
    "views.global_crops_scale": (0.32, 1.0),
    "views.local_crops_scale": (0.05, 0.32),
}
DINOV3: dict[str, Any] = DINOV2 | {
    "loss.gram_weight": 2.0,
    "optim.layerwise_decay": 0.98,
    "optim.schedule": "constant",
}
PARTS = {"dino": dict[str, Any](), "dinov2": DINOV2, "dinov3": DINOV3}

# Both see the same views, so views of different sizes teach nothing; DINOv2, section 5: no stochastic depth.
DISTILLING: dict[str, Any] = {"views.local_crops_number": 0, "backbone.drop_path": 0.0}

# A part that means nothing without another one, and goes with it when the user turns that off.
NEEDS = {"head.ibot_separate": "loss.ibot_weight"}
# Weights that are started from say whether their network has layer scale.
STARTING_WEIGHTS = ("weights", "pretrained")


def with_bundle(tree: Any) -> Any:
    """Settings as nested dicts -> the same with the parts of their `loss.recipe`, and those of distilling, wherever
    they say nothing.
    """
    written = tree.get("loss") if isinstance(tree, dict) else None
    name = written.get("recipe") if isinstance(written, dict) else None
    parts = dict(PARTS[name]) if isinstance(name, str) and name in PARTS else {}
    backbone = tree.get("backbone") if parts else None
    if isinstance(backbone, dict) and any(backbone.get(key) for key in STARTING_WEIGHTS):
        parts.pop("backbone.layer_scale", None)
    for part, needed in NEEDS.items():
        if not _value(tree, needed, parts.get(needed)):
            parts.pop(part, None)
    if _value(tree, "distill.teacher", None):
        parts = DISTILLING | parts
    if not parts:
        return tree
    out = dict(tree)
    for key, value in parts.items():
        section, _, field = key.partition(".")
        before = out.get(section) or {}
        if isinstance(before, dict):  # anything else is a mistake, which the validation names
            out[section] = {field: value} | before
    return out


def _value(tree: Any, key: str, default: Any) -> Any:
    section, _, field = key.partition(".")
    inner = tree.get(section) if isinstance(tree, dict) else None
    return inner.get(field, default) if isinstance(inner, dict) else default
