"""Gram anchoring against the loop over pairs of patches in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nearfar.ssl.learning.gram import gram_loss


def test_it_is_the_mean_squared_difference_of_all_cosines() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5, 7))  # the widths may differ
    total = 0.0
    for a, b in zip(ours, theirs, strict=True):
        for i in range(5):
            for j in range(5):
                mine = a[i] @ a[j] / np.linalg.norm(a[i]) / np.linalg.norm(a[j])
                other = b[i] @ b[j] / np.linalg.norm(b[i]) / np.linalg.norm(b[j])
                total += (mine - other) ** 2
    assert float(gram_loss(torch.from_numpy(ours), torch.from_numpy(theirs))) == pytest.approx(total / 75, rel=1e-12)


def test_lengths_and_rotations_cost_nothing_and_gradients_are_right() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 4, dtype=torch.float64, generator=generator)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator)).Q
    lengths = torch.rand(2, 6, 1, dtype=torch.float64, generator=generator) + 0.1
    assert float(gram_loss(lengths * x @ rotation, x)) < 1e-28
    y = torch.randn(2, 6, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: gram_loss(y, x), y)


def test_half_precision_is_widened() -> None:
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gram_loss(x, x.flip(1)), gram_loss(x, x.flip(1)).float())
        assert float(gram_loss(x, 2 * x)) < 1e-12
    assert gram_loss(x.bfloat16(), x).dtype == torch.float32
