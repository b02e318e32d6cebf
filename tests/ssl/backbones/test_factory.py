"""create: one contract over our models and timm's."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

from nearfar.ssl.backbones import Backbone, Tokens, create
from nearfar.ssl.errors import UserError

SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 48, "depth": 3}


def same(a: Tokens, b: Tokens) -> None:
    torch.testing.assert_close(a.prefix, b.prefix)
    torch.testing.assert_close(a.patches, b.patches)
    assert a.grid == b.grid


def rebuilt(backbone: Backbone) -> Backbone:
    """A twin made from nothing but `arch`, through JSON, and the weights."""
    twin = create(**json.loads(json.dumps(backbone.arch)))
    twin.load_state_dict(backbone.state_dict(), strict=True)
    return twin.eval()


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"lgp": True},
        {"gaug": True},
        {"prr": True},
        {"registers": 3},
        {"lgp": True, "gaug": True, "prr": True, "registers": 2, "drop_path": 0.1},
    ],
)
def test_ours_follow_the_contract(switches: dict[str, Any]) -> None:
    backbone = create("vit_tiny_patch8", **SMALL, **switches).eval()
    assert (backbone.embed_dim, backbone.patch_size, backbone.num_heads) == (48, 8, 3)
    images = torch.randn(2, 3, 40, 27)
    tokens = backbone(images)
    prefix = 1 + switches.get("registers", 0)
    assert tokens.prefix.shape == (2, prefix, 48)
    assert tokens.patches.shape == (2, 20, 48)
    assert tokens.grid == (5, 4)
    blocks = backbone.blocks(images, 2, norm=True)
    assert [block.grid for block in blocks] == [(5, 4)] * 2
    if not switches.get("prr"):
        same(blocks[-1], tokens)
    attention = backbone.attention(images)
    assert attention.shape == (2, 3, prefix + 20, prefix + 20)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, prefix + 20))
    same(rebuilt(backbone)(images), tokens)


def test_blocks_never_apply_prr_nor_the_norm_unasked() -> None:
    backbone: Any = create("vit_tiny_patch8", **SMALL, prr=True).eval()
    images = torch.randn(2, 3, 32, 32)
    raw, normed = backbone.blocks(images, 3)[-1], backbone.blocks(images, 1, norm=True)[0]
    torch.testing.assert_close(backbone.model.norm(raw.patches), normed.patches)
    assert not torch.allclose(normed.patches, backbone(images).patches)


def test_names_carry_switches_and_settings_overrule() -> None:
    named = create("vit_small_patch16_lgp_locat_reg4", img_size=32, depth=1)
    spelt = create("vit_small_patch8", img_size=32, depth=1, patch_size=16, lgp=True, gaug=True, prr=True, registers=4)
    assert named.arch == spelt.arch
    assert named.arch["name"] == "vit_small_patch16"
    assert create("vit_tiny_patch16", img_size=32, depth=1, embed_dim=128).num_heads == 2
    assert create("vit_tiny_patch16", img_size=32, depth=1, embed_dim=96).num_heads == 3


def test_state_keys_are_timms_below_model() -> None:
    keys = set(create("vit_tiny_patch16", depth=2).state_dict())
    assert keys == {
        "model." + key for key in timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0).state_dict()
    }


# name, options, other size than the one it is made for, expected (patch_size, embed_dim, prefix, num_heads)
TIMM: list[tuple[str, dict[str, Any], bool, tuple[int, int, int, int]]] = [
    ("resnet18", {}, True, (32, 512, 0, 8)),
    ("convnext_atto", {}, True, (32, 320, 0, 5)),
    ("vit_tiny_patch16_224", {"depth": 2}, True, (16, 192, 1, 3)),
    ("deit_tiny_distilled_patch16_224", {"depth": 2}, True, (16, 192, 2, 3)),
    ("swin_tiny_patch4_window7_224", {}, True, (32, 768, 0, 24)),
    ("eva02_tiny_patch14_224", {"depth": 2}, True, (14, 192, 1, 3)),
    ("mambaout_femto", {}, True, (32, 288, 0, 4)),
    ("poolformer_s12", {}, True, (32, 512, 0, 8)),
    ("mixer_s32_224", {}, False, (32, 512, 0, 8)),
]


@pytest.mark.parametrize(("name", "options", "any_size", "expected"), TIMM, ids=[row[0] for row in TIMM])
def test_timms_follow_the_contract(
    name: str, options: dict[str, Any], any_size: bool, expected: tuple[int, int, int, int]
) -> None:
    backbone: Any = create(f"timm/{name}", img_size=96, prr=True, **options)
    assert backbone.training
    backbone.eval()
    prefix = expected[2]
    assert (backbone.patch_size, backbone.embed_dim, prefix, backbone.num_heads) == expected
    stride = backbone.patch_size
    for height, width in [(96, 96), (50, 96)] if any_size else [(96, 96)]:
        images = torch.randn(2, 3, height, width)
        tokens = backbone(images)
        assert tokens.grid == (-(-height // stride), -(-width // stride))
        assert tokens.prefix.shape == (2, prefix, backbone.embed_dim)
        assert tokens.patches.shape == (2, tokens.grid[0] * tokens.grid[1], backbone.embed_dim)
        (last,) = backbone.blocks(images, 1, norm=True)
        assert last.grid == tokens.grid
        assert not torch.allclose(last.patches, tokens.patches)  # PRR
        if backbone.isotropic:
            assert len(backbone.blocks(images, 2, norm=True)) == 2
    if not any_size:
        small = torch.randn(1, 3, 64, 64)
        same(backbone(small), backbone(nn.functional.pad(small, (0, 32, 0, 32))))
        with pytest.raises(UserError, match="128x128 pixels"):
            backbone(torch.randn(1, 3, 128, 128))
    same(rebuilt(backbone)(torch.ones(1, 3, 96, 96)), backbone(torch.ones(1, 3, 96, 96)))


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "convnext_atto",
        "swin_tiny_patch4_window7_224",
        "vit_tiny_patch16_224",
        "mambaout_femto",
        "beit_base_patch16_224",
    ],
)
def test_every_parameter_is_used(name: str) -> None:
    backbone = create(f"timm/{name}", img_size=64, **({"depth": 1} if "patch16" in name else {}))
    tokens = backbone(torch.randn(2, 3, 64, 64))
    (tokens.prefix.sum() + tokens.patches.square().sum()).backward()
    assert not [key for key, parameter in backbone.named_parameters() if parameter.grad is None]


def test_mean_of_tokens_is_timms_pooled_feature() -> None:
    """Where timm's pooled feature is the mean of the map (no norm after it), `mean` gives the same."""
    images = torch.randn(2, 3, 96, 96)
    for name in ("resnet18", "swin_tiny_patch4_window7_224"):
        torch.manual_seed(0)
        backbone = create(f"timm/{name}", img_size=96).eval()
        torch.manual_seed(0)
        options = {} if name == "resnet18" else {"img_size": 96}
        theirs = timm.create_model(name, num_classes=0, **options).eval()
        torch.testing.assert_close(backbone(images).mean, theirs(images), rtol=1e-4, atol=1e-4)


def test_maps_keep_their_orientation() -> None:
    images = torch.zeros(1, 3, 96, 64)
    images[..., 64:, 32:] = 3.0  # last row, second column at stride 32
    for name in ("resnet18", "mambaout_femto"):
        backbone = create(f"timm/{name}", img_size=96).eval()
        raw = backbone.model.forward_features(images)
        expected = raw if name == "resnet18" else raw.permute(0, 3, 1, 2)
        found = backbone(images)
        assert found.grid == (3, 2)
        if name == "resnet18":
            torch.testing.assert_close(found.map(), expected)
        else:
            torch.testing.assert_close(found.map(), backbone.final_norm(raw).permute(0, 3, 1, 2))


@pytest.mark.parametrize(("name", "layout"), [("resnet10t", torch.channels_last), ("vit_tiny_patch16_224", None)])
def test_convolutions_run_with_channels_last(name: str, layout: torch.memory_format | None) -> None:
    """On a CPU a step of most convolutional networks takes .5 to .9 of the time so, and their weights stay as saved."""
    backbone: Any = create(f"timm/{name}", img_size=32)
    seen: list[bool] = []
    last = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)][-1]
    last.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous(memory_format=layout or torch.contiguous_format))
    )
    backbone(torch.randn(2, 3, 64, 64))
    assert seen and all(seen)  # a size is tried once before its first pass
    assert all(parameter.is_contiguous() for parameter in backbone.parameters())


def test_attention_of_timms_vit_equals_ours() -> None:
    theirs: Any = create("timm/vit_tiny_patch16_224", img_size=48, depth=2).eval()
    ours: Any = create("vit_tiny_patch16", img_size=48, depth=2).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 48, 48)  # at other sizes each resamples its positions by its own rule
    torch.testing.assert_close(ours.attention(images), theirs.attention(images), rtol=1e-4, atol=1e-5)
    same(ours(images), theirs(images))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_smal_patch16", {}, "Did you mean .*vit_small_patch16"),
        ("resnet18", {}, "Did you mean timm/resnet18"),
        ("timm/resnet81", {}, "Did you mean timm/resnet"),
        ("vit_small_patch16_locat_lgp", {}, "Did you mean"),
        ("zzzzzz", {}, "in this order"),
        ("timm/resnet18", {"lgp": True}, "ResNet does not begin with one"),
        ("timm/resnet18", {"gaug": True}, "ResNet is none of these"),
        ("timm/vit_tiny_patch16_224", {"registers": 4}, "registers is not supported"),
        ("timm/vit_tiny_patch16_224", {"rope": True}, "rope is not supported"),
        ("timm/vit_tiny_patch16_224", {"wavelet": "db2"}, "turn on lgp"),
        ("vit_tiny_patch16", {"levels": 3}, "turn on lgp"),
        ("vit_tiny_patch16_lgp", {"wavelet": "haar2"}, "haar"),
        ("vit_tiny_patch16_rope", {"embed_dim": 30, "num_heads": 3}, "multiple of 4, not 10"),
        ("timm/resnet18", {"depth": 3}, "cannot take depth"),
        ("timm/vgg11", {"drop_path": 0.1}, "cannot take drop_path"),
        ("timm/crossvit_9_240", {}, "crossvit"),
        ("vit_tiny_patch16", {"pretrained": True}, "no published weights"),
        ("vit_tiny_patch14", {"lgp": True}, "power of two"),
        ("vit_tiny_patch16", {"embed_dim": 100}, "100 is not divisible by num_heads=3"),
    ],
)
def test_mistakes_are_told(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create(name, **options)


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "vit_tiny_patch16_lgp", "timm/vit_tiny_patch16_224"])
def test_an_image_smaller_than_a_patch_is_told(name: str) -> None:
    backbone = create(name, img_size=32, depth=1).eval()
    with pytest.raises(UserError, match=r"8x40 pixels .* smaller than one patch of 16x16"):
        backbone(torch.randn(1, 3, 8, 40))


def test_a_trial_of_a_size_leaves_no_trace(same_bits: Callable[..., None]) -> None:
    """Batch norms and random numbers must not see it, or continuing a run would differ."""
    backbone = create("timm/resnet18", img_size=64, drop_path=0.1)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    seed = torch.get_rng_state()
    backbone._fit(torch.randn(2, 3, 96, 96).mul_(0))
    same_bits(before, backbone.state_dict())
    assert all(module.training for module in backbone.modules())
    torch.set_rng_state(seed)


def test_what_a_network_lacks_is_told() -> None:
    backbone = create("timm/resnet18", img_size=64).eval()
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(UserError, match="attention"):
        backbone.attention(images)
    with pytest.raises(UserError, match="last stage only"):
        backbone.blocks(images, 2, norm=True)
    with pytest.raises(UserError, match="choose between 1 and 3"):
        create("vit_tiny_patch8", **SMALL).blocks(images, 4)
