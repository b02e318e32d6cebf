"""Attention maps show what CLS looks at; layer statistics are those of a brute-force count."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nearfar.eval.pictures.attention_maps import attention_maps, heated, holding, looks, mirrored, spotlight
from nearfar.ssl.backbones import Backbone, Tokens, create
from nearfar.ssl.errors import UserError


class Fixed(Backbone):
    """Attention is given: R prefix tokens, a 2x3 grid. Images are too small to be mirrored."""

    patch_size = 8

    def __init__(self, attention: Tensor) -> None:
        super().__init__()
        self.given = attention

    def blocks(self, images: Tensor, n: int, norm: bool = False) -> list[Tokens]:
        assert not self.training
        return [Tokens(torch.zeros(1, 0, 4), torch.zeros(1, 6, 4), (2, 3))]

    def attention(self, images: Tensor) -> Tensor:
        assert not self.training
        return self.given


IMAGE = torch.zeros(1, 3, 16, 24)


def test_attention_is_that_of_cls_and_the_mean_over_heads() -> None:
    """CLS of head 0 looks at patch (0, 1), of head 1 twice as hard at (1, 2); other rows look elsewhere."""
    prefix, attention = 2, torch.zeros(1, 2, 8, 8)
    attention[0, :, 1:, prefix] = 1.0
    attention[0, 0, 0, prefix + 1] = 0.3
    attention[0, 1, 0, prefix + 5] = 0.6
    model = Fixed(attention).train()
    assert attention_maps(model, IMAGE)[0] == pytest.approx(np.array([[0, 1 / 3, 0], [0, 0, 2 / 3]]))
    assert model.training  # put back as it was


def test_without_cls_it_is_the_mean_over_queries() -> None:
    attention = torch.zeros(1, 1, 6, 6)
    attention[..., 4] = 1.0
    assert attention_maps(Fixed(attention), IMAGE)[0].tolist() == [[0, 0, 0], [0, 1, 0]]


def test_a_real_network_gives_maps_of_the_images_own_grid() -> None:
    torch.manual_seed(0)
    model = create("vit_tiny_patch8_lgp_locat", img_size=32, embed_dim=48, depth=2, num_heads=3)
    found = attention_maps(model, torch.randn(2, 3, 32, 40))
    assert found.shape == (2, 4, 5)
    assert found.sum((1, 2)) == pytest.approx(1)


def test_networks_without_attention_say_so() -> None:
    for name in ("timm/resnet18", "vim_tiny_patch16"):
        model = create(name, img_size=32)
        for show in (attention_maps, looks):
            with pytest.raises(UserError, match="no plain global attention"):
                show(model, torch.randn(1, 3, 32, 32))


def test_mirrored_images_hold_the_image_within_their_margin() -> None:
    images = torch.rand(1, 3, 32, 40)
    padded, inner = mirrored(images, 8)
    assert padded.shape == (1, 3, 64, 72) and inner == slice(2, -2)
    assert torch.equal(padded[..., 16:-16, 16:-16], images) and torch.equal(padded[..., 15, 16:-16], images[..., 1, :])


def test_the_fewest_places_hold_the_mass() -> None:
    values = np.array([[0.5, 0.1], [0.3, 0.1]])
    assert holding(values, 0.5).tolist() == [[True, False], [False, False]]
    assert holding(values, 0.6).tolist() == [[True, False], [True, False]]
    assert holding(values, 1.0).all()


def test_the_spotlight_leaves_colors_where_the_mass_is() -> None:
    values = np.zeros((4, 4))
    values[1, 1] = 1.0
    pixels = np.asarray(spotlight(Image.new("RGB", (64, 64), (200, 40, 40)), values)).astype(int)
    assert pixels[24, 24].tolist() == [200, 40, 40]
    assert np.ptp(pixels[56, 56]) == 0 and pixels[56, 56, 0] < 60
    glow = np.asarray(heated(Image.new("RGB", (64, 64), (100, 100, 100)), values)).astype(int)
    assert glow[24, 24].sum() > 450 and np.ptp(glow[60, 60]) == 0


# --- layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_tiny_patch8", "timm/vit_tiny_patch16_224"])
def test_distances_and_offsets_are_those_of_a_count_over_all_pairs(name: str) -> None:
    torch.manual_seed(0)
    size = {"embed_dim": 24, "depth": 2, "num_heads": 2} if name.startswith("vit") else {"depth": 2}
    model = create(name, img_size=64, **size).eval()
    images, p = torch.randn(2, 3, 48, 64), model.patch_size
    h, w = 48 // p, 64 // p
    *_, last = found = looks(model, images)
    assert len(found) == 2 and last.std is None
    between = model.attention(images)[:, :, 1:, 1:].mean(0)
    weights = (between / between.sum(-1, keepdim=True)).tolist()
    places = [(y, x) for y in range(h) for x in range(w)]
    for head, rows in enumerate(weights):
        far = [
            a * math.dist(q, k) * p
            for q, row in zip(places, rows, strict=True)
            for k, a in zip(places, row, strict=True)
        ]
        assert last.distance[head] == pytest.approx(sum(far) / len(places), rel=1e-4)
        share: dict[tuple[int, int], list[float]] = {}
        for q, row in zip(places, rows, strict=True):
            for k, a in zip(places, row, strict=True):
                share.setdefault((k[0] - q[0], k[1] - q[1]), []).append(a)
        best = max(sum(v) / len(v) for v in share.values() if 2 * len(v) >= len(places))
        assert last.offset_share[head] == pytest.approx(best, rel=1e-4)


def test_gaug_starts_with_a_variance_of_one_patch() -> None:
    torch.manual_seed(0)
    model = create("vit_tiny_patch8_locat", img_size=64, embed_dim=24, depth=1, num_heads=2)
    gaug = model.model.blocks[0].attn.gaug
    with torch.no_grad():
        gaug.var.weight.zero_()
        gaug.alpha.weight.zero_()
    (layer,) = looks(model, torch.randn(2, 3, 64, 64))
    assert layer.std == pytest.approx((math.sqrt(1.1),) * 2, rel=1e-4)  # epsilon is 0.1
    assert layer.strength == pytest.approx(math.log(2), rel=1e-4)
