"""Twelve steps with local views against facebookresearch/dino's step, computed a second time.

The reference is written from docs/methods.md section 5 and the paper, in plain torch and numpy, without nearfar: a list
of views, one backbone pass a resolution, attention by explicit products, torch's own resampling of the positions, a
weight-normed last layer, the loss as a loop over pairs, clipping and the teacher's average tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.ssl.learning.dino import build_dino_learner
from nearfar.ssl.learning.learner import Learner
from nearfar.ssl.learning.optim import adamw
from nearfar.ssl.learning.schedule import Schedule
from nearfar.ssl.learning.step import Stepper
from nearfar.ssl.settings.defaults import resolve
from nearfar.ssl.settings.run import Run

Make = Callable[..., Run]
WIDTH, HEADS, DEPTH, PATCH, GLOBAL, LOCAL = 24, 2, 2, 4, 32, 16
PROTOTYPES, HIDDEN, BOTTLENECK = 20, 16, 8
EPOCHS, STEPS_PER_EPOCH, BATCH, LOCAL_VIEWS = 4, 3, 4, 3
CLIP = 0.05  # so low that it acts


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 4 * WIDTH), "fc2": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.attn["qkv"](self.norm1(x)).reshape(n, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5).softmax(-1)
        x = x + self.attn["proj"]((weights @ v).transpose(1, 2).reshape(n, length, WIDTH))
        return x + self.mlp["fc2"](nn.GELU()(self.mlp["fc1"](self.norm2(x))))


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = (GLOBAL // PATCH) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patches, WIDTH))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, PATCH)})
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def positions(self, side: int) -> Tensor:
        if side**2 == self.patches:
            return self.pos_embed
        made_for = int(self.patches**0.5)
        table = self.pos_embed[:, 1:].reshape(1, made_for, made_for, WIDTH).permute(0, 3, 1, 2)
        scale = (side + 0.1) / made_for
        table = F.interpolate(table, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], table.permute(0, 2, 3, 1).reshape(1, -1, WIDTH)], 1)

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-1] // PATCH
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.positions(side)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        first, second = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Sequential(first, nn.GELU(), second, nn.GELU(), nn.Linear(HIDDEN, BOTTLENECK))
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(BOTTLENECK, PROTOTYPES, bias=False))
        self.last_layer.parametrizations.weight.original0.requires_grad_(False)  # the gain, 1

    def forward(self, views: list[Tensor]) -> Tensor:
        sizes = sorted({view.shape[-1] for view in views}, reverse=True)
        features = [self.backbone(torch.cat([view for view in views if view.shape[-1] == size])) for size in sizes]
        return self.last_layer(F.normalize(self.mlp(torch.cat(features)), dim=-1, p=2))

    def start_from(self, tensors: dict[str, Tensor]) -> None:
        """The tensors of one of our networks."""
        mine = {name.replace("head.mlp", "mlp"): t for name, t in tensors.items() if name != "head.prototypes"}
        names = "last_layer.parametrizations.weight.original"
        mine[f"{names}0"], mine[f"{names}1"] = torch.ones(PROTOTYPES, 1), tensors["head.prototypes"]
        self.load_state_dict(mine)

    def tensors(self) -> dict[str, Tensor]:
        """As our networks name them."""
        found = {name.replace("mlp.", "head.mlp.") if name.startswith("mlp.") else name: p
                 for name, p in self.named_parameters() if not name.startswith("last_layer")}  # fmt: skip
        return found | {"head.prototypes": self.last_layer.parametrizations.weight.original1}


def cosine(base: float, final: float, warmup: int = 0) -> np.ndarray:
    rising = np.linspace(0, base, warmup)
    left = np.arange(EPOCHS * STEPS_PER_EPOCH - warmup)
    return np.concatenate([rising, final + 0.5 * (base - final) * (1 + np.cos(np.pi * left / len(left)))])


def reference(
    start: dict[str, Tensor], batches: list[list[Tensor]]
) -> Iterator[tuple[float, Network, Network, Tensor]]:
    """Loss, student, teacher and center after each step."""
    student, teacher = Network().double(), Network().double()
    student.start_from(start)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    still = [p for name, p in named if name.endswith(".bias") or p.ndim == 1]
    decaying = [p for name, p in named if not (name.endswith(".bias") or p.ndim == 1)]
    optimizer = torch.optim.AdamW([{"params": decaying}, {"params": still, "weight_decay": 0.0}])
    center = torch.zeros(1, PROTOTYPES, dtype=torch.float64)
    rates, decays = cosine(5e-3, 1e-6, STEPS_PER_EPOCH), cosine(0.04, 0.4)
    momenta = cosine(0.9, 1.0)
    temperatures = np.concatenate([np.linspace(0.04, 0.07, 3), np.full(EPOCHS - 3, 0.07)])
    for step, views in enumerate(batches):
        optimizer.param_groups[0].update(lr=rates[step], weight_decay=decays[step])
        optimizer.param_groups[1].update(lr=rates[step])
        epoch = step // STEPS_PER_EPOCH
        answers = teacher(views[:2])
        targets = F.softmax((answers - center) / temperatures[epoch], -1).chunk(2)
        outputs = (student(views) / 0.1).chunk(len(views))
        terms = [
            torch.sum(-target * F.log_softmax(output, -1), -1).mean()
            for i, target in enumerate(targets) for j, output in enumerate(outputs) if i != j
        ]  # fmt: skip
        loss = sum(terms, torch.zeros(())) / len(terms)
        center = center * 0.9 + answers.mean(0, keepdim=True) * 0.1
        optimizer.zero_grad()
        loss.backward()
        for parameter in (p for _, p in named):
            factor = CLIP / (parameter.grad.norm(2) + 1e-6)
            if factor < 1:
                parameter.grad.mul_(factor)
        if epoch < 1:
            student.last_layer.parametrizations.weight.original1.grad = None
        optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
                theirs.mul_(momenta[step]).add_((1 - momenta[step]) * ours)
        yield float(loss.detach()), student, teacher, center[0]


def made(tiny: Make) -> tuple[Learner, Stepper, Schedule]:
    run = tiny(
        "backbone.lgp=false", "backbone.gaug=false", "backbone.prr=false", "backbone.drop_path=0",
        "backbone.patch_size=4", "head.batch_norm=false", f"views.local_crops_number={LOCAL_VIEWS}",
        f"train.epochs={EPOCHS}", f"train.batch_size={BATCH}", "optim.lr=5e-3", "optim.warmup_epochs=1",
        "optim.teacher_momentum=0.9", "optim.teacher_momentum_end=1", f"optim.clip_grad={CLIP}",
        "optim.freeze_last_layer_epochs=1", "loss.teacher_temp=0.07", "loss.warmup_teacher_temp_epochs=3",
    )  # fmt: skip
    resolved = resolve(run, BATCH * STEPS_PER_EPOCH)[0]
    learner = build_dino_learner(resolved).double()
    return learner, Stepper(learner, adamw(learner.student), CLIP), Schedule(resolved, STEPS_PER_EPOCH)


def test_twelve_steps_with_local_views_are_dinos(tiny: Make) -> None:
    learner, stepper, schedule = made(tiny)
    generator = torch.Generator().manual_seed(1)

    def drawn(views: int, side: int) -> Tensor:
        return torch.randn((views, BATCH, 3, side, side), generator=generator, dtype=torch.float64)

    batches = [[drawn(2, GLOBAL), drawn(LOCAL_VIEWS, LOCAL)] for _ in range(schedule.steps)]
    start = {name: t.detach().clone() for name, t in ours(learner.student).items()}
    lists = [[*groups[0], *groups[1]] for groups in batches]
    largest = 0.0
    for step, (loss, student, teacher, center) in enumerate(reference(start, lists)):
        frozen = schedule.prototypes_frozen(step)
        report = stepper(batches[step], schedule.at(step), freeze_last_layer=frozen).report.read()
        assert report.finite and report.loss == pytest.approx(loss, rel=1e-12)
        assert report.grad_norm > CLIP  # or clipping would not have been tested
        pairs = [(learner.loss.center, center)]
        for mine, theirs in ((learner.student, student), (learner.teacher, teacher)):
            named, reference_named = ours(mine), theirs.tensors()
            assert named.keys() == reference_named.keys() and len(named) > 30
            pairs += [(named[name], reference_named[name]) for name in named]
        largest = max(largest, *(float((one.detach() - other.detach()).abs().max()) for one, other in pairs))
        assert largest < 1e-12, step
    moved = max(float((tensor.detach() - start[name]).abs().max()) for name, tensor in ours(learner.student).items())
    assert step == 11 and moved > 1e-2


def ours(network: nn.Module) -> dict[str, Tensor]:
    """The parameters of one of our networks, without the wrapper around the backbone."""
    return {name.replace("backbone.model.", "backbone."): p for name, p in network.named_parameters()}
