"""Muon against torch's own (where it has one), the singular value decomposition, and AdamW for the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nearfar.ssl.backbones import create
from nearfar.ssl.heads.dino import DINOHead
from nearfar.ssl.learning.muon import Muon, matrices, orthogonal
from nearfar.ssl.learning.optim import moment_bytes, optimizer_of, parameter_groups, set_rates
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
    assert matrices(Student()) == {"wide.weight": 1, "tall.weight": 1, "qkv.weight": 3, "conv.weight": 1}
    settings: dict[str, Any] = {"img_size": 32, "embed_dim": 32, "depth": 1}
    blocks = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}
    ours = create("vit_tiny_patch8", num_heads=2, gaug=True, mask_token=True, **settings)
    assert matrices(ours) == {f"model.blocks.0.{name}.weight": parts for name, parts in blocks.items()}
    lgp = {name.removeprefix("model.") for name in matrices(create("vim_tiny_patch8", lgp=True, **settings))}
    assert {"blocks.0.mixer.in_proj.weight", "blocks.0.mixer.out_proj.weight"} < lgp
    assert {"patch_embed.bands_proj.weight", "patch_embed.out.1.weight"} < lgp
    assert not [name for name in lgp if name.endswith(("A_log", "conv1d.weight", "patch_embed.proj.weight"))]
    resnet = matrices(create("timm/test_resnet", img_size=32))
    assert "model.layer1.0.conv1.weight" in resnet and "model.conv1.0.weight" not in resnet


def test_what_lies_below_each_other_is_told_by_name_and_not_by_shape() -> None:
    """A head as wide as three times its features is one matrix; Hiera's wider queries, keys and values are three."""
    head = DINOHead(32, prototypes=64, hidden=96, bottleneck=32)
    assert tuple(dict(head.named_parameters())["mlp.0.weight"].shape) == (96, 32)
    assert set(matrices(head).values()) == {1}
    hiera = matrices(create("timm/hiera_tiny_224", img_size=64))
    qkv = {name: parts for name, parts in hiera.items() if name.endswith("qkv.weight")}
    assert len(qkv) == 12 and set(qkv.values()) == {3}
    pvt = matrices(create("timm/pvt_v2_b0", img_size=64))
    assert {parts for name, parts in pvt.items() if name.endswith("attn.kv.weight")} == {2}


def test_moments_take_the_bytes_that_are_announced() -> None:
    student, optimizer = made()
    gradients(student, 0)
    set_rates(optimizer, 0.01, 0.1)
    optimizer.step()
    held = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert moment_bytes(optimizer) == sum(value.numel() * value.element_size() for value in held)


def test_rates_by_depth_reach_matrices_and_all_else() -> None:
    """Each weight's step is as long as its factor on the rate."""

    class Learner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = create("vit_tiny_patch8", img_size=32, embed_dim=32, depth=2, num_heads=2)
            self.head = nn.Linear(32, 32)

    def moved(**factors: float) -> dict[str, Tensor]:
        torch.manual_seed(0)
        student = Learner()
        optimizer = optimizer_of(OptimSettings(name="muon", **factors), student)
        before = {name: p.detach().clone() for name, p in student.named_parameters()}
        gradients(student, 0)
        set_rates(optimizer, 0.01, 0.0)
        optimizer.step()
        return {name: p.detach() - before[name] for name, p in student.named_parameters()}

    plain = moved()
    scaled = moved(layerwise_decay=0.5, patch_embed_lr_mult=0.1, backbone_lr_mult=3.0)
    expected = {"head.weight": 1, "backbone.model.blocks.1.attn.qkv.weight": 1.5}
    expected |= {"backbone.model.blocks.0.mlp.fc1.weight": 0.75, "backbone.model.blocks.0.mlp.fc1.bias": 0.75}
    expected |= {"backbone.model.patch_embed.proj.weight": 0.0375, "backbone.model.norm.weight": 3}
    for name, factor in expected.items():
        torch.testing.assert_close(scaled[name], factor * plain[name], rtol=1e-3, atol=1e-6)


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
        one = Muon([{"params": [twin.weight], "matrices": 1, "decays": True, "lr_scale": 1.0}])
        set_rates(one, 0.01, 0.1)
        twin.weight.grad = layer.weight.grad
        one.step()
        torch.testing.assert_close(layer.weight, twin.weight)
