"""Pictures show what they say: the right pixels at the right places, the right attention, the right components."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from torch import Tensor

from nearfar.eval.pictures import attention_maps, contact_sheet, principal_colors, tile, token_pca
from nearfar.ssl.backbones import Backbone, Tokens, create
from nearfar.ssl.data.loaders.base import Batch
from nearfar.ssl.data.transforms.normalize import normalize
from nearfar.ssl.errors import UserError


class Fixed(Backbone):
    """Attention and tokens are given: 2 heads, R prefix tokens, a 2x3 grid."""

    def __init__(self, attention: Tensor, patches: Tensor) -> None:
        super().__init__()
        self.given_attention, self.patches = attention, patches

    def blocks(self, images: Tensor, n: int, norm: bool = False) -> list[Tokens]:
        assert not self.training
        return [Tokens(self.patches[:, :0], self.patches, (2, 3))]

    def attention(self, images: Tensor) -> Tensor:
        assert not self.training
        return self.given_attention


def flat(shade: float) -> Tensor:
    return normalize(torch.full((1, 3, 16, 24), shade))


def panes(strip: Image.Image, count: int) -> list[np.ndarray]:
    width = (strip.width + 4) // count
    return [np.asarray(strip.crop((i * width, 0, i * width + width - 4, strip.height))) for i in range(count)]


def brightest(pane: np.ndarray, rows: int = 2, columns: int = 3) -> tuple[int, int]:
    light = pane.sum(-1, dtype=float)
    h, w = light.shape[0] // rows, light.shape[1] // columns
    cells = light[: h * rows, : w * columns].reshape(rows, h, columns, w).mean((1, 3))
    row, column = np.unravel_index(cells.argmax(), cells.shape)
    return int(row), int(column)


# --- contact sheet ---------------------------------------------------------------------------------------------


def test_the_sheet_has_a_row_a_sample_and_true_sizes() -> None:
    shades = torch.arange(1, 4) / 4
    groups = [
        shades.view(1, 3, 1, 1, 1).expand(2, 3, 3, 32, 32),
        1 - shades.view(1, 3, 1, 1, 1).expand(4, 3, 3, 16, 16),
    ]
    batch = cast(Batch, SimpleNamespace(index=np.array([5, 123, 9])))
    pixels = np.asarray(contact_sheet(batch, groups, rows=2, side=64))
    assert pixels.shape == (20 + 2 * 68, 52 + 2 * 68 + 4 * 36, 3)
    for row in range(2):
        y = 20 + row * 68
        value, inverse = round(float(shades[row]) * 255), round(255 * (1 - float(shades[row])))
        assert np.abs(pixels[y : y + 64, 52 : 52 + 64].astype(int) - value).max() <= 1
        assert np.abs(pixels[y : y + 64, 120 : 120 + 64].astype(int) - value).max() <= 1
        for local in range(4):
            x = 52 + 2 * 68 + local * 36
            assert np.abs(pixels[y : y + 32, x : x + 32].astype(int) - inverse).max() <= 1
            assert (pixels[y + 33 : y + 64, x : x + 32] == 255).all()


def test_fewer_samples_than_rows_and_no_local_views() -> None:
    batch = cast(Batch, SimpleNamespace(index=np.array([0, 1])))
    assert contact_sheet(batch, [torch.rand(2, 2, 3, 24, 24)], rows=6, side=48).height == 20 + 2 * 52


# --- attention -------------------------------------------------------------------------------------------------


def test_attention_shows_what_cls_looks_at_head_by_head() -> None:
    """CLS of head 0 looks at patch (0, 1), of head 1 twice as hard at (1, 2); other rows look elsewhere."""
    prefix, attention = 2, torch.zeros(1, 2, 8, 8)
    attention[0, :, 1:, prefix] = 1.0
    attention[0, 0, 0, prefix + 1] = 0.3
    attention[0, 1, 0, prefix + 5] = 0.6
    model = Fixed(attention, torch.zeros(1, 6, 4)).train()
    (strip,) = attention_maps(model, flat(0.5), heads=2, side=64)
    picture, mean, first, second = panes(strip, 4)
    assert picture.shape == (64, 96, 3)
    assert np.abs(picture.astype(int) - 128).max() <= 1
    assert [brightest(pane) for pane in (mean, first, second)] == [(1, 2), (0, 1), (1, 2)]
    assert model.training  # put back as it was


def test_without_cls_the_mean_over_queries_is_shown() -> None:
    attention = torch.zeros(1, 1, 6, 6)
    attention[..., 4] = 1.0
    (strip,) = attention_maps(Fixed(attention, torch.zeros(1, 6, 4)), flat(0.2))
    assert brightest(panes(strip, 2)[1]) == (1, 1)


def test_a_real_network_gives_a_strip_an_image() -> None:
    model = create("vit_tiny_patch8_lgp_locat", img_size=32, embed_dim=48, depth=2, num_heads=3)
    images = torch.randn(2, 3, 32, 40)
    strips = attention_maps(model, images, heads=2, side=32)
    assert [strip.size for strip in strips] == [(4 * 44 - 4, 32)] * 2
    assert [pair.size for pair in token_pca(model, images, side=32)] == [(2 * 44 - 4, 32)] * 2


def test_a_network_without_attention_says_so() -> None:
    with pytest.raises(UserError):
        attention_maps(create("timm/resnet18", img_size=32), torch.randn(1, 3, 32, 32))


# --- principal components --------------------------------------------------------------------------------------


def test_colors_are_the_first_three_components() -> None:
    tokens = np.random.default_rng(0).normal(size=(200, 12)) * np.arange(12, 0, -1) ** 2
    ours, theirs = principal_colors(tokens), PCA(3).fit_transform(tokens)
    inner = ((ours > 0) & (ours < 1)).all(1)  # the percentiles clip the rest
    assert inner.mean() > 0.9
    for c in range(3):
        assert abs(np.corrcoef(ours[inner, c], theirs[inner, c])[0, 1]) == pytest.approx(1, abs=1e-9)
    assert ours.min() == 0
    assert ours.max() == 1


def test_the_sign_is_fixed_and_an_offset_changes_nothing() -> None:
    tokens = np.random.default_rng(1).normal(size=(50, 8)) * np.arange(8, 0, -1)
    assert principal_colors(tokens + 100) == pytest.approx(principal_colors(tokens), abs=1e-6)


def test_tokens_of_low_rank_leave_the_other_colors_flat() -> None:
    tokens = np.outer(np.arange(20.0), np.ones(6))
    colors = principal_colors(tokens)
    assert np.ptp(colors[:, 0]) == 1
    assert (colors[:, 1:] == 0.5).all()
    assert (principal_colors(np.ones((5, 4))) == 0.5).all()


def test_alike_tokens_are_alike_across_images() -> None:
    """Two images share two kinds of token in swapped halves: the maps are each other's mirror."""
    kinds: Any = torch.eye(2, 8)
    left = kinds[torch.tensor([0, 0, 1, 0, 0, 1])]
    right = kinds[torch.tensor([1, 0, 0, 1, 0, 0])]
    model = Fixed(torch.zeros(0), torch.stack([left, right]))
    one, two = token_pca(model, torch.cat([flat(0.3), flat(0.7)]), side=32)
    a, b = panes(one, 2)[1], panes(two, 2)[1]
    assert np.array_equal(a, b[:, ::-1])
    assert np.ptp(a[..., 0]) == 255


# --- tiles -----------------------------------------------------------------------------------------------------


def test_tiles_go_row_by_row() -> None:
    colors = ["red", "lime", "blue"]
    sheet = tile([Image.new("RGB", (10, 6), c) for c in colors], columns=2)
    assert sheet.size == (24, 16)
    assert [sheet.getpixel(at) for at in ((0, 0), (14, 0), (0, 10), (14, 10), (11, 0))] == [
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (255, 255, 255),
    ]  # fmt: skip
