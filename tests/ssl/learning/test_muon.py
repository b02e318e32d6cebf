"""Muon against torch's own (where it has one), the singular value decomposition, and AdamW for the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nearfar.ssl.backbones import create
from nearfar.ssl.learning.muon import Muon, matrices, orthogonal
from nearfar.ssl.learning.optim import optimizer_of, parameter_groups, set_rates
from nearfar.ssl.settings.optimization import OptimSettings


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall, self.qkv = nn.Linear(48, 20), nn.Linear(16, 40), nn.Linear(24, 72)
        self.conv, self.depthwise = nn.Conv2d(18, 16, 3), nn.Conv2d(20, 20, 3, groups=20)
        self.pixels, self.gate, self.prototypes = (
            nn.Conv2d(3, 32, 4),
            nn.Linear(32, 2),
            nn.Parameter(torch.randn(32, 32)),
        )


def made(seed: int = 0) -> tuple[Student, Muon]:
    torch.manual_seed(seed)
    student = Student().double()
    optimizer = optimizer_of(OptimSettings(name="muon"), student)
    assert isinstance(optimizer, Muon)
    return student, optimizer


def gradients(student: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in student.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("shape", [(3, 20, 48), (2, 48, 20), (1, 32, 32)])
def test_every_direction_comes_to_about_the_same_length(shape: tuple[int, ...]) -> None:
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    lengths = u.mT @ orthogonal(given) @ v.mT
    torch.testing.assert_close(lengths, torch.diag_embed(lengths.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-12)
    assert 0.6 < float(lengths.diagonal(dim1=1, dim2=2).min()) <= float(lengths.max()) < 1.3
    assert not orthogonal(torch.zeros(shape)).any()


def test_the_products_follow_autocast() -> None:
    given = torch.randn((2, 24, 40), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        low = orthogonal(given)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), orthogonal(given), rtol=0, atol=0.03)


def test_what_is_a_matrix() -> None:
    assert matrices(Student()) == {"wide.weight", "tall.weight", "qkv.weight", "conv.weight"}
    settings: dict[str, Any] = {"img_size": 32, "embed_dim": 32, "depth": 1}
    blocks = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    ours = create("vit_tiny_patch8", num_heads=2, gaug=True, mask_token=True, **settings)
    assert matrices(ours) == {f"model.blocks.0.{name}.weight" for name in blocks}
    lgp = {name.removeprefix("model.") for name in matrices(create("vim_tiny_patch8", lgp=True, **settings))}
    assert {"blocks.0.mixer.in_proj.weight", "blocks.0.mixer.out_proj.weight"} < lgp
    assert {"patch_embed.bands_proj.weight", "patch_embed.out.1.weight"} < lgp
    assert not [name for name in lgp if name.endswith(("A_log", "conv1d.weight", "patch_embed.proj.weight"))]
    resnet = matrices(create("timm/test_resnet", img_size=32))
    assert "model.layer1.0.conv1.weight" in resnet and "model.conv1.0.weight" not in resnet


def test_steps_are_those_of_torchs_muon_and_of_adamw() -> None:
    """torch iterates in bf16 and knows neither convolutions nor queries, keys and values in one layer."""
    theirs = getattr(torch.optim, "Muon", None)
    if theirs is None:
        pytest.skip("torch 2.9 and later have Muon")
    student, optimizer = made()
    names = matrices(student)
    begin = {name: p.detach().clone() for name, p in student.named_parameters()}
    twin = {name: nn.Parameter(value.clone()) for name, value in begin.items() if name not in names}
    parts = {
        (name, number): nn.Parameter(part.clone())
        for name in names
        for number, part in enumerate(begin[name].flatten(1).chunk(3 if name == "qkv.weight" else 1))
    }
    others = torch.optim.AdamW(
        [{"params": [p for p in twin.values() if p.ndim > 1]}, {"params": [p for p in twin.values() if p.ndim < 2]}]
    )
    muon = theirs(parts.values(), momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        rate = 0.01 * (step + 1)
        gradients(student, step)
        set_rates(optimizer, rate, 0.3)
        for group, decay in ((others.param_groups[0], 0.3), (others.param_groups[1], 0.0), (muon.param_groups[0], 0.3)):
            group["lr"], group["weight_decay"] = rate, decay
        for name, p in student.named_parameters():
            assert p.grad is not None
            if name in twin:
                twin[name].grad = p.grad.clone()
            for (whole, number), part in parts.items():
                if whole == name:
                    part.grad = p.grad.flatten(1).chunk(3 if name == "qkv.weight" else 1)[number].clone()
        optimizer.step()
        others.step()
        muon.step()
    for name, p in student.named_parameters():
        if name in twin:
            torch.testing.assert_close(p, twin[name], rtol=1e-9, atol=1e-9)
        else:
            expected = torch.cat([part for (whole, _), part in parts.items() if whole == name]).view(p.shape)
            moved = float((expected - begin[name]).detach().norm())
            assert float((p - expected).detach().norm()) < 0.02 * moved, name
            assert set(optimizer.state[p]) == {"momentum"}


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    student, optimizer = made()
    gradients(student, 0)
    set_rates(optimizer, 0.01, 0.1)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    before = [p.detach().clone() for p in student.parameters()]
    moments = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in student.parameters()]
    for p in student.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for p, weight, of in zip(student.parameters(), before, moments, strict=True):
        assert torch.equal(p, weight)
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in of.items())
    optimizer.found_inf = torch.zeros(())
    gradients(student, 1)
    optimizer.step()
    assert all(
        torch.isfinite(p).all() and not torch.equal(p, w) for p, w in zip(student.parameters(), before, strict=True)
    )


def test_what_has_no_gradient_stays_and_many_of_a_shape_move_as_each_alone() -> None:
    torch.manual_seed(0)
    many = nn.ModuleList(nn.Linear(20, 20, bias=False) for _ in range(70))
    alone = nn.ModuleList(nn.Linear(20, 20, bias=False) for _ in range(70))
    alone.load_state_dict(many.state_dict())
    gradients(many, 0)
    many[5].weight.grad = None
    kept = many[5].weight.detach().clone()
    groups = parameter_groups(many, muon=True)
    optimizer = Muon(group for group in groups if group["params"])
    set_rates(optimizer, 0.01, 0.1)
    optimizer.step()
    for number, (layer, twin) in enumerate(zip(many, alone, strict=True)):
        if number == 5:
            assert torch.equal(layer.weight, kept)
            continue
        one = Muon([{"params": [twin.weight], "matrices": True, "decays": True, "lr_scale": 1.0}])
        set_rates(one, 0.01, 0.1)
        twin.weight.grad = layer.weight.grad
        one.step()
        torch.testing.assert_close(layer.weight, twin.weight)
