"""A DINO step as facebookresearch/dino performs it, rewritten from its description: the reference of bench/step.py.

Kept as that code has it, because it is what a user would otherwise run: attention by explicit products, one backbone
pass a resolution, a weight-normed last layer through torch's own `weight_norm`, the loss as a loop over pairs of views,
clipping and the teacher's average parameter by parameter, AdamW without fusing, the loss read on the host each step,
and under fp16 torch's GradScaler.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import nearfar.ssl.backbones  # noqa: F401  # isort: skip  (repairs torchvision, which timm imports)
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """The three-layer projection, L2 normalization and a weight-normed layer whose gain is frozen at 1."""

    def __init__(self, width: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        self.last_layer.weight_g.data.fill_(1)
        self.last_layer.weight_g.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, p=2))


class MultiCrop(nn.Module):
    """Backbone and head over a list of views: one backbone pass for each run of equal resolutions."""

    def __init__(self, backbone: nn.Module, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: list[Tensor]) -> Tensor:
        sides = torch.tensor([view.shape[-1] for view in views])
        ends = torch.cumsum(torch.unique_consecutive(sides, return_counts=True)[1], 0)
        begin, output = 0, torch.empty(0, device=views[0].device)
        for end in ends:
            output = torch.cat((output, self.backbone(torch.cat(views[begin:end]))))
            begin = end
        return self.head(output)


class Loss(nn.Module):
    center: Tensor

    def __init__(self, prototypes: int, views: int) -> None:
        super().__init__()
        self.views = views
        self.register_buffer("center", torch.zeros(1, prototypes))

    def forward(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        students = (student / 0.1).chunk(self.views)
        teachers = F.softmax((teacher - self.center) / temperature, dim=-1).detach().chunk(2)
        total, terms = torch.zeros((), device=student.device), 0
        for i, probabilities in enumerate(teachers):
            for j, logits in enumerate(students):
                if i != j:
                    total = total + torch.sum(-probabilities * F.log_softmax(logits, dim=-1), dim=-1).mean()
                    terms += 1
        with torch.no_grad():
            center = teacher.sum(0, keepdim=True)
            if dist.is_initialized():
                dist.all_reduce(center)
            center = center / (len(teacher) * (dist.get_world_size() if dist.is_initialized() else 1))
            self.center = self.center * 0.9 + center * 0.1
        return total / terms


def _network(model: str, prototypes: int, drop_path: float) -> MultiCrop:
    backbone: Any = timm.create_model(
        model, num_classes=0, dynamic_img_size=True, drop_path_rate=drop_path, global_pool="token"
    )
    for block in backbone.blocks:
        block.attn.fused_attn = False
    return MultiCrop(backbone, Head(backbone.num_features, prototypes))


def dino_step(
    model: str,
    prototypes: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    scaled: bool = False,
) -> tuple[Callable[[list[Tensor]], float], nn.Module]:
    """A function that takes one step on a list of normalized views (the two global ones first), and the student.

    Args:
        model: timm's name of a plain ViT, such as vit_small_patch16_224.
        prototypes: outputs K of the head.
        scaled: scale the loss, as fp16 needs it.
    """
    student, teacher = _network(model, prototypes, 0.1).to(device), _network(model, prototypes, 0.0).to(device)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    trained: nn.Module = nn.parallel.DistributedDataParallel(student) if dist.is_initialized() else student
    decay = [p for n, p in student.named_parameters() if p.requires_grad and p.ndim > 1 and not n.endswith(".bias")]
    rest = [p for n, p in student.named_parameters() if p.requires_grad and (p.ndim <= 1 or n.endswith(".bias"))]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=1e-6)
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)
    losses: dict[int, Loss] = {}

    def step(views: list[Tensor]) -> float:
        criterion = losses.setdefault(len(views), Loss(prototypes, len(views)).to(device))
        with autocast():
            teacher_output = teacher(views[:2])
            student_output = trained(views)
            loss = criterion(student_output, teacher_output, 0.04)
        value = loss.item()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        for parameter in student.parameters():
            if parameter.grad is not None:
                coefficient = 3.0 / (parameter.grad.data.norm(2) + 1e-6)
                if coefficient < 1:
                    parameter.grad.data.mul_(coefficient)
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for mine, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
                theirs.data.mul_(0.996).add_((1 - 0.996) * mine.detach().data)
        return value

    return step, student
