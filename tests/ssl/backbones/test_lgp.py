"""LGP against an explicit recursion through pytorch_wavelets, written from docs/methods.md section 1."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nearfar.ssl.backbones import LGPPatchEmbed, VisionTransformer, bands_permuted, create
from nearfar.ssl.errors import UserError


def recursion(images: Tensor, levels: int, wavelet: str = "haar") -> Tensor:
    """The packet, one 2-D transform at a time; children LL, LH, HL, HH, first level the most significant digit."""
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


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize(("patch", "size"), [(2, (6, 10)), (4, (24, 8)), (8, (24, 40)), (16, (48, 32))])
def test_fold_equals_the_explicit_packet_with_gradients(patch: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    embed = LGPPatchEmbed(patch, 12)
    assert embed.folds
    images = torch.randn(2, 3, *size, requires_grad=True)
    expected = embed.proj(images), embed.bands_proj(recursion(images, embed.levels))
    got = embed.project(images)
    up = [torch.randn_like(y) for y in expected]
    leaves = [images, embed.bands_proj.weight, embed.bands_proj.bias, embed.proj.weight, embed.proj.bias]
    gradients = [torch.autograd.grad(pair, leaves, up) for pair in (got, expected)]
    for a, b in zip((*got, *gradients[0]), (*expected, *gradients[1]), strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4", "sym4", "coif1", "bior2.2"])
def test_packet_of_any_wavelet_equals_pytorch_wavelets(wavelet: str) -> None:
    images = torch.randn(2, 3, 64, 96)
    got = LGPPatchEmbed(8, 4, wavelet=wavelet).packet_of(images)
    assert relative(got, recursion(images, 3, wavelet)) < 1e-5


@pytest.mark.parametrize(("size", "levels"), [((56, 40), 3), ((24, 24), 4), ((8, 12), 2)])
def test_haar_packet_of_any_size_and_depth_equals_pytorch_wavelets(size: tuple[int, int], levels: int) -> None:
    images = torch.randn(1, 3, *size)
    got = LGPPatchEmbed(4, 4, levels=levels).packet_of(images)
    assert relative(got, recursion(images, levels)) < 1e-5


def test_haar_stays_inside_a_patch_and_db2_does_not() -> None:
    images = torch.randn(1, 3, 32, 32)
    other = images.clone()
    other[..., 8:16, 16:24] += 1  # patch (1, 2)
    touched = {}
    for wavelet in ("haar", "db2"):
        embed = LGPPatchEmbed(8, 16, wavelet=wavelet)
        change = (embed.project(images)[1] - embed.project(other)[1]).abs().amax((0, 1)) > 1e-5
        touched[wavelet] = change
    assert touched["haar"].nonzero().tolist() == [[1, 2]]
    assert touched["db2"].sum() > 1


def test_packet_keeps_energy() -> None:
    images = torch.randn(2, 3, 32, 64)
    for wavelet in ("haar", "db4"):
        packet = LGPPatchEmbed(8, 4, wavelet=wavelet).packet_of(images)
        assert packet.shape == (2, 192, 4, 8)
        torch.testing.assert_close(packet.square().sum(), images.square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "options", [{}, {"levels": 2}, {"levels": 5}, {"wavelet": "db2"}, {"levels": 4, "wavelet": "sym4"}]
)
def test_any_size_gives_its_token_grid(options: dict) -> None:
    embed = LGPPatchEmbed(8, 16, **options)
    assert embed(torch.randn(2, 3, 24, 56)).shape == (2, 21, 16)
    assert embed(torch.randn(2, 3, 8, 8)).shape == (2, 1, 16)


def test_whole_embedding_follows_methods() -> None:
    """Every formula of docs/methods.md section 1 written out again, at a gate that is not its initial half."""
    from torch.nn import functional as F

    embed = LGPPatchEmbed(4, 8).double()
    with torch.no_grad():
        embed.gate.normal_()
    images = torch.randn(2, 3, 16, 12, dtype=torch.float64)

    def mix(x: Tensor, layers: torch.nn.Sequential) -> Tensor:
        depthwise, pointwise = layers[0], layers[1]
        x = F.conv2d(x, depthwise.weight, padding=1, groups=8)
        return F.conv2d(x, pointwise.weight, pointwise.bias)

    local = mix(F.gelu(F.conv2d(images, embed.proj.weight, embed.proj.bias, stride=4)), embed.local_mix)
    bands = F.conv2d(recursion(images, 2), embed.bands_proj.weight, embed.bands_proj.bias)
    bands = F.conv2d(F.gelu(mix(F.gelu(bands), embed.bands_mix)), embed.bands_out.weight, embed.bands_out.bias)
    g = ((embed.gate.tanh() + 1) / 2)[:, None, None]
    x = (1 - g) * local + g * bands
    x = F.relu(mix(F.relu(mix(x, embed.fuse[0])), embed.fuse[2]))
    x = mix(local + x, embed.out).flatten(2).transpose(1, 2)
    expected = F.layer_norm(x, (8,), embed.norm.weight, embed.norm.bias, 1e-5)
    torch.testing.assert_close(embed(images), expected, rtol=1e-6, atol=1e-6)  # the oracle's filters are float32


def test_fused_path_can_be_dropped() -> None:
    embed = LGPPatchEmbed(4, 8, drop_path=1 - 1e-9).train()
    images = torch.randn(2, 3, 8, 8)
    local = embed.local_mix(torch.nn.functional.gelu(embed.project(images)[0]))
    torch.testing.assert_close(embed(images), embed.norm(embed.out(local).flatten(2).transpose(1, 2)))


def test_packet_is_float32_under_autocast() -> None:
    embed = LGPPatchEmbed(8, 16)
    images = torch.randn(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        local, bands = embed.project(images)
    assert local.dtype == bands.dtype == torch.float32
    assert torch.equal(bands, embed.project(images)[1])


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_bands_are_permuted_within_the_context_only(wavelet: str) -> None:
    """Reading band order[i] where i was read equals permuting the projection's input channels the other way."""
    embed = LGPPatchEmbed(4, 8, wavelet=wavelet)
    images, order = torch.randn(2, 3, 16, 12), torch.randperm(16)
    before = embed.project(images)[1]
    with bands_permuted(torch.nn.Sequential(embed), order):
        found = embed.project(images)[1]
    packet = recursion(images, 2, wavelet).unflatten(1, (16, 3))[:, order].flatten(1, 2)
    assert relative(found, embed.bands_proj(packet)) < 1e-5
    assert not torch.allclose(found, before)
    assert torch.equal(embed.project(images)[1], before)
    with pytest.raises(UserError, match="permutation of 16"), bands_permuted(embed, torch.arange(8)):
        pass
    with pytest.raises(UserError, match="no LGP"), bands_permuted(torch.nn.Linear(2, 2), order):
        pass


def test_wavelet_and_levels_reach_the_embedding() -> None:
    embed = create("vit_tiny_patch16", img_size=32, depth=1, lgp=True, wavelet="db2", levels=3).model.patch_embed
    assert (embed.levels, embed.folds, len(embed.filters[0])) == (3, False, 4)
    assert (
        VisionTransformer(img_size=28, patch_size=14, depth=1, lgp=True, levels=2)(torch.randn(1, 3, 28, 28))
        .isfinite()
        .all()
    )


@pytest.mark.parametrize(("size", "published"), [("tiny", 0.07), ("small", 0.24), ("base", 0.82)])
def test_multiply_adds_beside_the_published(size: str, published: float) -> None:
    """G a 224 px image that LGP adds to a ViT; what is spent once a batch, on folding the weights, is not counted."""
    width = {"tiny": 192, "small": 384, "base": 768}[size]
    found = []
    for stem in (LGPPatchEmbed(16, width), torch.nn.Conv2d(3, width, 16, 16)):
        for batch in (2, 1):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                stem(torch.randn(batch, 3, 224, 224))
            found.append(counter.get_total_flops() / 2e9)
    assert found[0] - found[1] - (found[2] - found[3]) == pytest.approx(published, abs=0.006)


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="power of two"):
        LGPPatchEmbed(14, 8)
    with pytest.raises(UserError, match=r"'dbb2'.*Did you mean .*db2"):
        LGPPatchEmbed(8, 8, wavelet="dbb2")
    with pytest.raises(UserError, match="at least one"):
        LGPPatchEmbed(8, 8, levels=0)
    with pytest.raises(UserError, match="6 at most"):
        LGPPatchEmbed(8, 8, levels=9)
    with pytest.raises(UserError, match=r"4x8 pixels .* smaller than one patch of 8x8"):
        LGPPatchEmbed(8, 8)(torch.randn(1, 3, 4, 8))
    LGPPatchEmbed(14, 8, levels=3)
