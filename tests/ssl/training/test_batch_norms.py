"""optim.freeze_batch_norm: a run from trained weights begins with the features that they have."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nearfar.ssl import config
from nearfar.ssl.backbones import create
from nearfar.ssl.checkpoint import export
from nearfar.ssl.settings.defaults import resolve
from nearfar.ssl.training.choose_learner import learner_of


def trained(path: Path) -> Path:
    """A network whose running statistics are not those of the images below."""
    torch.manual_seed(3)
    backbone: Any = create("timm/resnet10t", img_size=32)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    export(path, backbone, {"step": 1})
    return path


@pytest.mark.parametrize("distilled", [False, True])
def test_statistics_stay_as_they_were(tmp_path: Path, distilled: bool) -> None:
    file = trained(tmp_path / "trained.safetensors")
    settings = [
        "backbone.name=timm/resnet10t", f"backbone.weights={file}", "optim.freeze_batch_norm=true",
        "views.global_crops_size=32", "views.local_crops_number=0", "head.prototypes=8", "head.hidden_dim=16",
        *([f"distill.teacher={file}"] if distilled else ["loss.anchor_weight=1"]),
    ]  # fmt: skip
    learner = learner_of(resolve(config.load(None, settings), 100)[0])
    start = {name: buffer.clone() for name, buffer in learner.named_buffers() if ".backbone." in name}
    views = torch.randn(2, 4, 3, 32, 32)
    outputs = learner([views], 0.04)
    outputs.loss.backward()
    assert start and all(torch.equal(buffer, dict(learner.named_buffers())[name]) for name, buffer in start.items())
    if not distilled:  # the student sees what its weights saw before: at first the anchor has nothing to hold
        torch.testing.assert_close(outputs.parts["anchor"], torch.tensor(0.0), atol=1e-5, rtol=0)
    learner.teacher.backbone.eval()  # as between two steps, for the online k-NN
    learner.teacher.backbone.train()
    norms = [m for m in learner.teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)


def test_without_it_each_step_has_its_own() -> None:
    settings = [
        "backbone.name=timm/resnet10t", "views.global_crops_size=32", "views.local_crops_number=0",
        "head.prototypes=8", "head.hidden_dim=16",
    ]  # fmt: skip
    learner = learner_of(resolve(config.load(None, settings), 100)[0])
    norms = [m for m in learner.student.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.training for norm in norms)
