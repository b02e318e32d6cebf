"""Perturbations: what they move and what they must leave alone, against plain loops and SciPy's blur."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from nearfar.eval.robustness import (
    at_resolution,
    bands_shuffled,
    blurred,
    coarsened,
    flipped,
    shuffle_patches,
    tokens_shuffled,
)
from nearfar.ssl.backbones import create
from nearfar.ssl.errors import UserError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def patches(image: Tensor, size: int) -> list[tuple[float, ...]]:
    """The patches of one image as a list of tuples, row by row."""
    _, height, width = image.shape
    return [
        tuple(image[:, r : r + size, c : c + size].flatten().tolist())
        for r in range(0, height, size)
        for c in range(0, width, size)
    ]


def test_patch_shuffle_moves_whole_patches_and_loses_none() -> None:
    images = torch.rand(3, 3, 8, 12, generator=seeded())
    got = shuffle_patches(images, 4, seeded(1))
    orders = []
    for before, after in zip(images, got, strict=True):
        cut = patches(before, 4)
        orders.append([cut.index(patch) for patch in patches(after, 4)])
        assert sorted(orders[-1]) == list(range(6))
    assert len({tuple(order) for order in orders}) > 1
    assert torch.equal(got, shuffle_patches(images, 4, seeded(1)))
    with pytest.raises(UserError, match="cannot be cut"):
        shuffle_patches(images, 5, seeded())


def small(name: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    backbone = create(name, img_size=32, embed_dim=24, depth=2, **settings).eval()
    for parameter in backbone.parameters():  # a gate or position at zero would hide what is tested
        torch.nn.init.normal_(parameter, std=0.2)
    return backbone


@torch.inference_mode()
def test_token_shuffle_means_nothing_without_positions_and_something_with_them() -> None:
    images = torch.randn(2, 3, 32, 32, generator=seeded())
    for name, same in (("vit_tiny_patch8_lgp", True), ("vit_tiny_patch8", False)):
        backbone = small(name)
        plain = backbone(images)
        with tokens_shuffled(backbone, seeded(1)):
            shuffled = backbone(images)
        assert torch.allclose(plain.mean, shuffled.mean, atol=1e-4) is same
        assert not torch.allclose(plain.patches, shuffled.patches, atol=1e-4)
        assert torch.equal(backbone(images).patches, plain.patches)  # and it is over afterwards


@torch.inference_mode()
def test_band_shuffle_changes_lgp_and_is_over_afterwards() -> None:
    images = torch.randn(2, 3, 32, 32, generator=seeded())
    backbone = small("vit_tiny_patch8_lgp")
    plain = backbone(images).mean
    with bands_shuffled(backbone, seeded(1)):
        assert not torch.allclose(backbone(images).mean, plain, atol=1e-4)
    assert torch.equal(backbone(images).mean, plain)
    with pytest.raises(UserError, match="no LGP"), bands_shuffled(small("vit_tiny_patch8"), seeded()):
        pass


def test_token_shuffle_needs_one_patch_embedding() -> None:
    with pytest.raises(UserError, match="one patch embedding"), tokens_shuffled(torch.nn.Linear(2, 2), seeded()):
        pass


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_blur_is_scipys(sigma: float) -> None:
    images = torch.rand(2, 3, 17, 23, generator=seeded(), dtype=torch.float64)
    expected = gaussian_filter(images.numpy(), (0, 0, sigma, sigma), mode="nearest", radius=int(np.ceil(3 * sigma)))
    np.testing.assert_allclose(blurred(images, sigma).numpy(), expected, atol=1e-6)
    with pytest.raises(UserError, match="positive"):
        blurred(images, 0)


def test_flips_and_sizes() -> None:
    images = torch.rand(2, 3, 16, 16, generator=seeded())
    assert torch.equal(flipped(images)[..., 0], images[..., -1])
    assert torch.equal(flipped(images, vertical=True)[..., 0, :], images[..., -1, :])
    assert at_resolution(images, 24).shape == (2, 3, 24, 24)
    checkers = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).float().expand(1, 3, 16, 16)
    assert float(coarsened(checkers, 4).std()) < 0.1 < float(checkers.std())
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    torch.testing.assert_close(coarsened(ramp, 2)[..., 4:12], ramp[..., 4:12], atol=0.01, rtol=0)
