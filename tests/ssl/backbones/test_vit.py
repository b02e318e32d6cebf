"""Our ViT against timm's own, the published parameter counts, and its switches."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.ssl.backbones import VisionTransformer
from nearfar.ssl.errors import UserError

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def randomized(model: nn.Module) -> nn.Module:
    """Every parameter away from its start, so that none can be swapped or left out unseen."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit_tiny_patch16", 5_717_416),
        ("vit_small_patch16", 22_050_664),
        ("vit_base_patch16", 86_567_656),
        ("vit_tiny_patch16_lgp", 6_058_792),
        ("vit_small_patch16_lgp", 23_175_784),
        ("vit_base_patch16_lgp", 90_587_368),
        ("vit_tiny_patch16_locat", 5_717_416 + 2_340),
        ("vit_base_patch16_lgp_locat", 90_587_368 + 2_340),
        ("vit_small_patch16_lgp_locat_reg4", 23_175_784 + 2_340 + 4 * 384),
        ("vit_tiny_patch16_rope", 5_717_416 - 197 * 192),
        ("vit_base_patch16_lgp_locat_reg4_rope", 90_587_368 + 2_340 + 4 * 768),
    ],
)
def test_published_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert count(timm.create_model(name, num_classes=1000)) == parameters


def test_registered_names() -> None:
    ours = {
        f"vit_{size}_patch16{lgp}{locat}{registers}{rope}"
        for size in ("tiny", "small", "base")
        for lgp in ("", "_lgp")
        for locat in ("", "_locat")
        for registers in ("", "_reg4")
        for rope in ("", "_rope")
    }
    assert ours <= set(timm.list_models())


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 24), (8, 72)])
def test_equals_timm_with_its_weights(height: int, width: int) -> None:
    """At other sizes too, where its positions are resampled as timm does it and not as DINO."""
    theirs = timm.models.VisionTransformer(**SMALL, num_classes=7, dynamic_img_size=True)
    ours = VisionTransformer(**SMALL, num_classes=7, pos_antialias=True).eval()
    ours.load_state_dict(randomized(theirs).state_dict(), strict=True)
    images = torch.randn(2, 3, height, width)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.forward_features(images), theirs.forward_features(images), rtol=1e-5, atol=1e-5)
    options: dict[str, Any] = {"indices": 2, "return_prefix_tokens": True, "norm": True, "intermediates_only": True}
    for a, b in zip(
        ours.forward_intermediates(images, **options), theirs.forward_intermediates(images, **options), strict=True
    ):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_gradients_equal_timm() -> None:
    theirs = timm.models.VisionTransformer(**SMALL, num_classes=7)
    ours = VisionTransformer(**SMALL, num_classes=7, pos_antialias=True).eval()
    ours.load_state_dict(randomized(theirs).state_dict())
    images = torch.randn(2, 3, 32, 32)
    for model in (ours, theirs):
        model(images).square().sum().backward()
    for (name, a), (_, b) in zip(sorted(ours.named_parameters()), sorted(theirs.named_parameters()), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad / b.grad.norm(), b.grad / b.grad.norm(), rtol=1e-4, atol=1e-4, msg=name)


def test_released_layout_loads_strictly() -> None:
    """The key set of the public ViT and DINO weights, full size."""
    with torch.device("meta"):
        theirs = timm.create_model("vit_small_patch16_224", num_classes=0)
        ours = timm.create_model("vit_small_patch16", num_classes=0)
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}


def test_gaug_is_added_to_the_logits_and_prr_comes_last() -> None:
    model: Any = randomized(VisionTransformer(**SMALL, gaug=True, prr=True, registers=2, num_classes=0))
    images = torch.randn(2, 3, 24, 40)
    x, grid = model.embed(images)

    def split(x: Tensor) -> Tensor:
        return x.reshape(2, -1, 3, 16).transpose(1, 2)

    for block in model.blocks:
        q, k, v = (split(part) for part in block.attn.qkv(block.norm1(x)).chunk(3, -1))
        weights = (q @ k.transpose(2, 3) / 4 + block.attn.gaug(q, grid)).softmax(-1)
        x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    x = model.norm(x)
    heads = split(x)
    x = ((heads @ heads.transpose(2, 3) / 4).softmax(-1) @ heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(model.forward_features(images), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.last_attention(images), weights, rtol=1e-4, atol=1e-5)


def test_gaug_bias_leaves_prefix_alone_and_adapts_to_the_grid() -> None:
    model = VisionTransformer(**SMALL, gaug=True, registers=2)
    bias = model.blocks[0].attn.gaug(torch.randn(1, 3, 3 + 16, 16), (4, 4))
    assert bias[..., :3, :].abs().sum() == bias[..., :3].abs().sum() == 0
    assert (bias[..., 3:, 3:] > 0).all()


def test_lgp_has_no_positions_and_mean_head() -> None:
    model = randomized(VisionTransformer(**SMALL, lgp=True, registers=2, num_classes=5))
    assert "pos_embed" not in model.state_dict()
    images = torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(images)
    mean = torch.cat([tokens[:, :1], tokens[:, 3:]], 1).mean(1)
    torch.testing.assert_close(model(images), model.head(mean))


def test_encoder_without_positions_does_not_see_the_order_of_tokens() -> None:
    """Token shuffle of docs/methods.md section 1: exact invariance of the mean, and of CLS."""
    model: Any = randomized(VisionTransformer(**SMALL, lgp=True, num_classes=0))
    x, grid = model.embed(torch.randn(2, 3, 32, 32))
    shuffled = torch.cat([x[:, :1], x[:, 1 + torch.randperm(16)]], 1)
    for block in model.blocks:
        x, shuffled = block(x, grid), block(shuffled, grid)
    torch.testing.assert_close(x[:, 0], shuffled[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.mean(1), shuffled.mean(1), rtol=1e-4, atol=1e-4)


def test_drop_path_is_for_training_only_and_seeded() -> None:
    model = VisionTransformer(**SMALL, drop_path_rate=0.5, num_classes=0)
    images = torch.randn(4, 3, 32, 32)
    model.eval()
    assert torch.equal(model(images), model(images))
    model.train()
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model(images))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert [getattr(block.drop_path, "drop_prob", 0) for block in model.blocks] == pytest.approx([0, 0.25, 0.5])


def test_checkpointing_changes_nothing() -> None:
    model = VisionTransformer(**SMALL, lgp=True, gaug=True, prr=True, num_classes=0).train()
    images = torch.randn(2, 3, 32, 32)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) == len(list(model.parameters()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_finite_under_bfloat16(scale: float) -> None:
    model = VisionTransformer(**SMALL, lgp=True, gaug=True, prr=True, registers=1, num_classes=0)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 3, 24, 32) * scale)
    out.float().square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_stays_near_float32() -> None:
    model = VisionTransformer(**SMALL, lgp=True, gaug=True, num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images).float()
    assert F.cosine_similarity(exact, rough).min() > 0.999


def test_classifier_can_be_replaced() -> None:
    model = VisionTransformer(**SMALL, num_classes=5)
    images = torch.randn(1, 3, 32, 32)
    model.reset_classifier(9, "avg")
    assert model(images).shape == (1, 9)
    model.reset_classifier(0)
    assert model(images).shape == (1, 48)
    model.reset_classifier(0, "")
    assert model(images).shape == (1, 17, 48)
    with pytest.raises(UserError, match="pooling"):
        model.reset_classifier(3, "maximum")


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="48 is not divisible by num_heads=5"):
        VisionTransformer(**{**SMALL, "num_heads": 5})
    with pytest.raises(UserError, match="no published weights"):
        timm.create_model("vit_tiny_patch16_lgp", pretrained=True)
    with pytest.raises(UserError, match="power of two"):
        VisionTransformer(patch_size=14, lgp=True)
