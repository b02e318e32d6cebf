"""Learning rates that decay from the heads to the stem, on every kind of network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nearfar.ssl.backbones import create
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.optim import adamw, parameter_groups, rate_scales, set_rates

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3}


class Student(nn.Module):
    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__()
        self.backbone = create(name, **settings)
        self.head = nn.Linear(3, 3)


def scales(student: Student, decay: float, patch_embed: float = 1.0) -> dict[str, float]:
    """Every parameter's factor, by name, out of the groups that the optimizer gets."""
    of = {id(p): group["lr_scale"] for group in parameter_groups(student, decay, patch_embed) for p in group["params"]}
    return {name: of[id(p)] for name, p in student.named_parameters()}


@pytest.mark.parametrize("name", ["vit_tiny_patch8", "vim_tiny_patch8"])
def test_ours_follow_dinov2s_rule(name: str) -> None:
    """rate * decay ** (depth + 1 - layer): stem 0, block i i + 1, everything after the blocks depth + 1."""
    ours = {"lgp": True, "mask_token": True, "layer_scale": 0.1, **SMALL}
    found = scales(Student(name, **ours), 0.9, 0.2)
    for key, scale in found.items():
        inner = key.removeprefix("backbone.model.")
        if inner.startswith("blocks."):
            layer = int(inner.split(".")[1]) + 1
        else:
            layer = 0 if inner.startswith(("patch_embed", "cls_token", "mask_token")) else 4
        assert scale == pytest.approx(0.9 ** (4 - layer) * (0.2 if "patch_embed" in inner else 1)), key
    assert found["head.weight"] == 1 and found["backbone.model.mask_token"] == pytest.approx(0.9**4)


@pytest.mark.parametrize(
    ("name", "stem", "last", "norm"),
    [
        ("timm/test_vit", "patch_embed.proj.weight", "blocks.5.mlp.fc1.weight", "norm.weight"),
        ("timm/test_convnext", "stem.0.weight", "stages.3.blocks.1.mlp.fc1.weight", None),
        ("timm/test_resnet", "conv1.0.weight", "layer4.0.conv1.weight", None),
    ],
)
def test_timms_own_layers_are_taken(name: str, stem: str, last: str, norm: str | None) -> None:
    found = scales(Student(name), 0.5)
    inner = {key.removeprefix("backbone.model."): value for key, value in found.items()}
    assert min(found.values()) == inner[stem] < 0.5**3
    assert inner[last] == 0.5 and found["head.weight"] == 1
    assert norm is None or inner[norm] == 1


def test_rates_reach_the_optimizer_and_weight_decay_stays_with_matrices() -> None:
    student = Student("vit_tiny_patch8", **SMALL)
    optimizer = adamw(student, 0.9, 0.2)
    set_rates(optimizer, 1e-2, 0.3)
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(list(student.parameters()))
    for group in optimizer.param_groups:
        assert group["params"] and group["lr"] == pytest.approx(1e-2 * group["lr_scale"])
        assert all((p.ndim > 1) == (group["weight_decay"] == 0.3) for p in group["params"])
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    set_rates(optimizer, 1e-2, 0.0)
    optimizer.step()  # Adam's first step is as long as the rate
    moved = {name: float((before[name] - p.detach()).abs().mean()) for name, p in student.named_parameters()}
    for name, scale in scales(student, 0.9, 0.2).items():
        assert moved[name] == pytest.approx(1e-2 * scale, rel=1e-3), name


def test_off_is_two_groups_and_asks_no_network() -> None:
    assert rate_scales(nn.Linear(2, 2), 1.0, 1.0) == {}
    assert [group["lr_scale"] for group in parameter_groups(nn.Linear(2, 2))] == [1, 1]


def test_what_a_network_does_not_have_is_said() -> None:
    with pytest.raises(UserError, match=r"timm/test_resnet has no patch embedding, so optim\.patch_embed_lr_mult"):
        adamw(Student("timm/test_resnet"), 0.9, 0.2)
    student = Student("vit_tiny_patch8", **SMALL)
    student.backbone.model.group_matcher = None
    with pytest.raises(UserError, match=r"does not say which layers.*optim\.layerwise_decay=1"):
        adamw(student, 0.9)
