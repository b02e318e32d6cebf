"""DINO's projection head against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import erf
from torch import nn

from nearfar.ssl.heads.dino import DINOHead, cosine_logits


def head(batch_norm: bool = False, prototypes: int = 40) -> DINOHead:
    torch.manual_seed(0)
    return DINOHead(24, prototypes, hidden=32, bottleneck=12, batch_norm=batch_norm)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_outputs_are_cosines_with_unit_prototypes_in_float64(batch_norm: bool) -> None:
    made = head(batch_norm).double()
    with torch.no_grad():
        for parameter in made.parameters():  # biases and gains are trivial at the start
            parameter.add_(torch.randn_like(parameter) * 0.1)
    x = torch.randn(10, 24, dtype=torch.float64)
    *layers, w = sorted((p.detach().numpy() for p in made.parameters()), key=lambda p: p.shape == (40, 12))
    h, following = x.numpy(), iter(layers)
    for _ in range(2):
        h = h @ next(following).T
        if batch_norm:
            h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5) * next(following)
        h = h + next(following)
        h = h * (1 + erf(h / np.sqrt(2))) / 2
    h = h @ next(following).T + next(following)
    h = h / np.linalg.norm(h, axis=1, keepdims=True)
    w = w / np.linalg.norm(w, axis=1, keepdims=True)
    np.testing.assert_allclose(made(x).detach().numpy(), h @ w.T, rtol=1e-9, atol=1e-12)


def test_the_length_of_a_prototype_and_of_the_embedding_do_not_count() -> None:
    made = head()
    x = torch.randn(10, 24)
    before = made(x)
    assert before.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        made.prototypes.mul_(torch.rand(40, 1) * 10 + 0.1)
        made.mlp[-1].weight.mul_(7)
        made.mlp[-1].bias.mul_(7)
    torch.testing.assert_close(made(x), before, rtol=1e-5, atol=1e-6)


def test_it_equals_the_published_weight_normed_layer_with_gain_one() -> None:
    made = head()
    published = nn.utils.parametrizations.weight_norm(nn.Linear(12, 40, bias=False))
    with torch.no_grad():
        published.parametrizations.weight.original0.fill_(1)
        published.parametrizations.weight.original1.copy_(made.prototypes)
    x = torch.randn(10, 24)
    logits = published(F.normalize(made.mlp(x), dim=-1))
    torch.testing.assert_close(made(x), logits)
    made(x).square().sum().backward()
    logits.square().sum().backward()
    torch.testing.assert_close(made.prototypes.grad, published.parametrizations.weight.original1.grad)


def test_batch_norm_is_there_only_when_asked_for() -> None:
    kinds = [type(layer) for layer in head(batch_norm=True).mlp]
    assert sum(issubclass(kind, nn.BatchNorm1d) for kind in kinds) == 2
    plain = [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    assert [type(layer) for layer in head().mlp] == plain
    assert [kind for kind in kinds if not issubclass(kind, nn.BatchNorm1d)] == plain
    assert [layer.bias is None for layer in head(batch_norm=True).mlp if isinstance(layer, nn.Linear)] == [1, 1, 0]


def test_the_shape_published_for_vit_small() -> None:
    with torch.device("meta"):
        made = DINOHead(384, 65536)
    assert [tuple(p.shape) for p in made.parameters()] == [
        (65536, 256), (2048, 384), (2048,), (2048, 2048), (2048,), (256, 2048), (256,)
    ]  # fmt: skip


def test_it_starts_as_published() -> None:
    torch.manual_seed(0)
    made = DINOHead(64, 256, hidden=256, bottleneck=64)
    for layer in made.mlp:
        if isinstance(layer, nn.Linear):
            assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05) and not layer.bias.any()


def test_under_autocast_the_logits_are_finite_and_close() -> None:
    made, x = head(), torch.randn(10, 24)
    with torch.autocast("cpu", torch.bfloat16):
        logits = made(x)
    torch.testing.assert_close(logits.float(), made(x), atol=0.03, rtol=0.03)


def test_cosines_are_float32_under_autocast() -> None:
    """A temperature of .04 multiplies their rounding by 25."""
    torch.manual_seed(0)
    head = DINOHead(8, 16, hidden=32, bottleneck=8)
    with torch.autocast("cpu", torch.bfloat16):
        cosines = head(torch.randn(4, 8))
    assert cosines.dtype == torch.float32
    assert not torch.equal(cosines, cosines.bfloat16().float())


def test_gradients_of_the_cosines_are_those_of_normalized_prototypes_in_float64() -> None:
    generator = torch.Generator().manual_seed(3)
    x, w, grad = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((6, 5), (9, 5), (6, 9)))
    x.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(cosine_logits, (x, w))
    plain = torch.autograd.grad(F.linear(x, F.normalize(w, dim=-1)), (x, w), grad)
    torch.testing.assert_close(torch.autograd.grad(cosine_logits(x, w), (x, w), grad), plain, rtol=1e-12, atol=1e-14)


def test_frozen_prototypes_cost_no_gradient_and_change_nothing_for_the_embedding() -> None:
    generator = torch.Generator().manual_seed(4)
    x, w = torch.randn(6, 5, generator=generator, requires_grad=True), torch.randn(9, 5, generator=generator)
    (frozen,) = torch.autograd.grad(cosine_logits(x, w).square().sum(), x)
    moving = w.clone().requires_grad_()
    (same,) = torch.autograd.grad(cosine_logits(x, moving).square().sum(), x)
    assert torch.equal(frozen, same) and moving.grad is None
