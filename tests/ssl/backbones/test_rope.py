"""Rotary positions against timm's, and as a model's only positions."""

from typing import Any

import pytest
import torch
from timm.layers import RotaryEmbeddingCat, apply_rot_embed_cat

from nearfar.ssl.backbones import GaugBias, VisionTransformer
from nearfar.ssl.backbones.rope import AxialRope, rotate

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}


@pytest.mark.parametrize("grid", [(4, 4), (3, 7)])
def test_equals_timms_axial_form(grid: tuple[int, int]) -> None:
    theirs = RotaryEmbeddingCat(16, temperature=100.0, in_pixels=False, feat_shape=None).get_embed(grid)
    x = torch.randn(2, 3, 2 + grid[0] * grid[1], 16)
    expected = torch.cat([x[:, :, :2], apply_rot_embed_cat(x[:, :, 2:], theirs)], 2)
    torch.testing.assert_close(rotate(x, *AxialRope(16)(grid)), expected, rtol=1e-5, atol=1e-5)


def test_products_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).expand(-1, -1, -1, 35, -1)
    rotation = AxialRope(16).double()((5, 7))
    table = (rotate(q, *rotation) @ rotate(k, *rotation).transpose(2, 3))[0, 0].reshape(5, 7, 5, 7)
    torch.testing.assert_close(table[:4, :6, 1, 1], table[1:, 1:, 2, 2])
    assert not torch.allclose(table[0, 0, 0, 1], table[0, 0, 1, 0])


def test_gaug_reads_queries_before_they_turn() -> None:
    model: Any = VisionTransformer(**SMALL, rope=True, gaug=True, registers=1, num_classes=0).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    attn, x, grid = model.blocks[0].attn, torch.randn(2, 2 + 15, 48), (3, 5)
    q, k, v = attn.qkv(x).reshape(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
    rotation = model.rope(grid)
    logits = rotate(q, *rotation) @ rotate(k, *rotation).transpose(2, 3) / 4 + attn.gaug(q, grid)
    expected = attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x, grid, rotation), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attn.weights(x, grid, rotation), logits.softmax(-1), rtol=1e-4, atol=1e-5)
    assert isinstance(attn.gaug, GaugBias)


def test_no_learned_positions_and_any_size() -> None:
    model = VisionTransformer(**SMALL, rope=True, num_classes=0).eval()
    assert "pos_embed" not in model.state_dict()
    assert not any("rope" in key for key in model.state_dict())
    images = torch.randn(1, 3, 32, 48)
    assert model.forward_features(torch.randn(1, 3, 40, 72)).shape == (1, 1 + 45, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).isfinite().all()


def test_positions_matter() -> None:
    model: Any = VisionTransformer(**SMALL, rope=True, num_classes=0).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, grid = model.embed(torch.randn(1, 3, 32, 32))
    shuffled = torch.cat([x[:, :1], x[:, 1:].flip(1)], 1)
    rotation = model.rope(grid)
    plain = model.blocks[0](x, grid)[:, 0]
    torch.testing.assert_close(model.blocks[0](shuffled, grid)[:, 0], plain, rtol=1e-4, atol=1e-4)
    a, b = model.blocks[0](x, grid, rotation), model.blocks[0](shuffled, grid, rotation)
    assert not torch.allclose(a[:, 1:], b[:, 1:].flip(1), atol=1e-3)
