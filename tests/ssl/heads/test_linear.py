"""Heads of a sweep are independent linear maps."""

from __future__ import annotations

import torch

from nearfar.ssl.heads.linear import LinearHeads


def test_each_head_is_its_own_linear_map() -> None:
    heads = LinearHeads(5, 3, heads=4)
    torch.nn.init.normal_(heads.weight)
    torch.nn.init.normal_(heads.bias)
    x = torch.randn(7, 5)
    out = heads(x)
    assert out.shape == (7, 4, 3)
    for i in range(4):
        torch.testing.assert_close(out[:, i], x @ heads.weight[i].T + heads.bias[i])


def test_starts_undecided() -> None:
    assert not LinearHeads(5, 3)(torch.randn(2, 5)).any()
