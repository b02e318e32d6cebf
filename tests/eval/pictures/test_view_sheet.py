"""The contact sheet has the right pixels at the right places."""

from __future__ import annotations

import numpy as np
import torch

from nearfar.eval.pictures.view_sheet import contact_sheet


def test_the_sheet_has_a_row_a_sample_and_true_sizes() -> None:
    shades = torch.arange(1, 4) / 4
    groups = [
        shades.view(1, 3, 1, 1, 1).expand(2, 3, 3, 32, 32),
        1 - shades.view(1, 3, 1, 1, 1).expand(4, 3, 3, 16, 16),
    ]
    pixels = np.asarray(contact_sheet(groups, rows=2, side=64))
    assert pixels.shape == (20 + 2 * 68 - 4, 2 * 68 + 4 * 36 - 4, 3)
    for row in range(2):
        y = 20 + row * 68
        value, inverse = round(float(shades[row]) * 255), round(255 * (1 - float(shades[row])))
        assert np.abs(pixels[y : y + 64, :64].astype(int) - value).max() <= 1
        assert np.abs(pixels[y : y + 64, 68 : 68 + 64].astype(int) - value).max() <= 1
        for local in range(4):
            x = 2 * 68 + local * 36
            assert np.abs(pixels[y : y + 32, x : x + 32].astype(int) - inverse).max() <= 1
            assert (pixels[y + 33 : y + 64, x : x + 32] == 255).all()


def test_fewer_samples_than_rows_and_no_local_views() -> None:
    assert contact_sheet([torch.rand(2, 2, 3, 24, 24)], rows=6, side=48).height == 20 + 2 * 52 - 4
