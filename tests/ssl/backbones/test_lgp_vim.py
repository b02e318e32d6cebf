"""LGP for Vision Mamba against the explicit, unfolded computation of docs/methods.md section 1."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.ssl.backbones import VimLGPPatchEmbed
from nearfar.ssl.errors import UserError


def recursion(images: Tensor, levels: int, wavelet: str) -> Tensor:
    """The packet by pytorch_wavelets; children LL, LH, HL, HH, first level the most significant digit."""
    from pytorch_wavelets import DWTForward

    transform = DWTForward(J=1, wave=wavelet, mode="periodization").to(images)
    packets = [images]
    for _ in range(levels):
        children = []
        for packet in packets:
            low, high = transform(packet)
            children += [low, *high[0].unbind(2)]
        packets = children
    return torch.cat(packets, 1)


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.parametrize(("patch", "size"), [(4, (16, 12)), (8, (24, 40))])
def test_equals_the_unfolded_computation_with_gradients(patch: int, size: tuple[int, int], wavelet: str) -> None:
    torch.manual_seed(0)
    dim = 12
    embed = VimLGPPatchEmbed(patch, dim, wavelet=wavelet)
    assert torch.equal(embed.weights, torch.tensor([0.5, 0.5]))
    with torch.no_grad():
        embed.weights.copy_(torch.tensor([0.7, -1.3]))

    def mix(x: Tensor, layers: nn.Module) -> Tensor:
        depthwise, pointwise = layers[0], layers[1]
        x = F.conv2d(x, depthwise.weight, depthwise.bias, padding=1, groups=dim)
        return F.conv2d(x, pointwise.weight, pointwise.bias)

    images = torch.randn(2, 3, *size, requires_grad=True)
    x = F.conv2d(images, embed.proj.weight, embed.proj.bias, stride=patch)
    g = F.conv2d(recursion(images, embed.levels, wavelet), embed.bands_proj.weight, embed.bands_proj.bias)
    u = 0.7 * x - 1.3 * g
    u = F.relu(mix(F.relu(mix(u, embed.fuse[0])), embed.fuse[2])) + x
    expected = (x + mix(u, embed.out)).flatten(2).transpose(1, 2)

    got = embed(images)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    leaves = [images, *(p for name, p in embed.named_parameters() if name != "weights")]
    up = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, up), torch.autograd.grad(expected, leaves, up), strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


def test_levels_and_mistakes() -> None:
    assert VimLGPPatchEmbed(8, 16, levels=2, wavelet="sym4")(torch.randn(2, 3, 24, 56)).shape == (2, 21, 16)
    with pytest.raises(UserError, match="power of two"):
        VimLGPPatchEmbed(14, 8)
    with pytest.raises(UserError, match="no discrete wavelet"):
        VimLGPPatchEmbed(8, 8, wavelet="haarr")
