"""Segmentation heads: the layers of docs/methods.md section 3, and bilinear upsampling with half-pixel centers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from nearfar.ssl.errors import UserError
from nearfar.ssl.heads.segmentation import SegmentationHead


def test_linear_head_is_one_matrix_for_every_patch() -> None:
    head = SegmentationHead(6, 4)
    x = torch.randn(2, 6, 3, 5)
    weight, bias = head.layers[0].weight[:, :, 0, 0], head.layers[0].bias
    expected = torch.einsum("bdhw,cd->bchw", x, weight) + bias[:, None, None]
    torch.testing.assert_close(head(x), expected)


def test_mlp_head_recomputed_in_float64() -> None:
    torch.manual_seed(0)
    head = SegmentationHead(6, 4, "mlp", hidden=8)
    x = torch.randn(2, 6, 3, 5)
    p = {name: value.double() for name, value in head.state_dict().items()}
    hidden = torch.einsum("bdhw,cd->bchw", x.double(), p["layers.0.weight"][:, :, 0, 0])
    hidden = hidden + p["layers.0.bias"][:, None, None]
    mean = hidden.mean((1, 2, 3), keepdim=True)
    var = hidden.var((1, 2, 3), keepdim=True, correction=0)
    hidden = (hidden - mean) / (var + 1e-5).sqrt()
    hidden = hidden * p["layers.1.weight"][:, None, None] + p["layers.1.bias"][:, None, None]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = torch.einsum("bdhw,cd->bchw", hidden, p["layers.3.weight"][:, :, 0, 0])
    expected = expected + p["layers.3.bias"][:, None, None]
    torch.testing.assert_close(head(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_default_hidden_width_is_that_of_the_paper() -> None:
    count = sum(p.numel() for p in SegmentationHead(192, 11, "mlp").parameters())
    assert count == 192 * 512 + 512 + 2 * 512 + 512 * 11 + 11


def test_upsampling_agrees_with_pillow() -> None:
    head = SegmentationHead(1, 1)
    torch.nn.init.ones_(head.layers[0].weight)
    torch.nn.init.zeros_(head.layers[0].bias)
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    ours = head(torch.from_numpy(x)[None, None], (16, 35))[0, 0].detach().numpy()
    theirs = np.asarray(Image.fromarray(x, mode="F").resize((35, 16), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_unknown_kind_is_explained() -> None:
    with pytest.raises(UserError, match='"linear" or "mlp"'):
        SegmentationHead(3, 2, "conv")
